"""The refinement behind the synthesis: what it computes, its windows, its weights, and files from before it."""

from __future__ import annotations

import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import DATA
from scipy.ndimage import correlate

import lic
from lic import denoising
from lic.denoising import groups
from lic.errors import UnsupportedError
from lic.model import refinement as module
from lic.model import store
from lic.model.codec import CodecModel, Corrections, Share, softly_rounded, step_of
from lic.model.config import CONFIGS, Config
from lic.model.refinement import Refinement
from lic.pipeline import windows
from lic.pipeline.restoration import REACH

TINY = DATA / "models" / "tiny.safetensors"
CONFIG = replace(CONFIGS["tiny"], refinement=(6, 2, 2))
WITHOUT_GROUPS = replace(CONFIG, refinement=(6, 2))
SCRIPTS = Path(__file__).parent.parent / "scripts"


def randomised(refinement: Refinement, seed: int = 3) -> Refinement:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in refinement.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return refinement.requires_grad_(False)


def inputs(height: int, width: int, seed: int = 4) -> tuple[torch.Tensor, ...]:
    """Pixels of a texture in [-0.5, 0.5], features, codes and steps, of two pictures."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = torch.stack([torch.sin(x / (2 + c)) * torch.cos(y / (3 + c)) for c in range(3)], dim=-1)
    pixels = 0.3 * waves + 0.03 * torch.randn(2, height, width, 3, generator=generator)
    features = torch.randn(2, height // 4, width // 4, CONFIG.widths[0], generator=generator)
    code = torch.tensor([9_000.0, 31_000.0])
    return pixels.clamp(-0.5, 0.5), features, code, step_of(code)


def table(values: np.ndarray, code: float) -> np.ndarray:
    place = code * (len(values) - 1) / 50_000
    left = min(int(place), len(values) - 2)
    return values[left] + (place - left) * (values[left + 1] - values[left])


def by_the_specification(
    net: Refinement, pixels: np.ndarray, features: np.ndarray, code: float, step: float
) -> np.ndarray:
    """Chapter 6.5, of pixels (H, W, 3) in [-0.5, 0.5]; what denoising changes is tested with the filter, and groups."""
    arrays = {name: value.double().numpy() for name, value in net.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    def space_to_depth(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-1)

    def depth_to_space(x: np.ndarray) -> np.ndarray:
        height, width, channels = x.shape
        out = np.empty((2 * height, 2 * width, channels // 4))
        for at, part in enumerate(np.split(x, 4, axis=-1)):
            out[at // 2 :: 2, at % 2 :: 2] = part
        return out

    def scaled(x: np.ndarray, name: str) -> np.ndarray:
        scale, offset = np.split(table(arrays[f"{name}.table"], code), 2)
        return x * (1 + scale) + offset

    def leaky(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, x / 8)

    s = 255 * (pixels.astype(np.float64) + 0.5)
    reach = denoising.REACH
    padded = np.pad(s, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    planes = torch.stack(denoising.planes_of(torch.from_numpy(padded).float())) / step
    changes = denoising.changes(planes, 1).flatten(0, 1)
    if net.grouped:
        wider = F.pad(planes, (groups.REACH - reach,) * 4, mode="replicate")
        changes = torch.cat([changes, groups.grouped(wider, 1).flatten(0, 1)])
    changes = changes.permute(1, 2, 0).double().numpy()
    box = [correlate(np.pad(a, 2), np.ones((5, 5)))[2:-2, 2:-2] for a in (*np.moveaxis(s, -1, 0), np.ones(s.shape[:2]))]
    detail = (s - np.stack(box[:3], -1) / box[3][..., None]) / step
    detail = detail / (1 + np.abs(detail) / 4)
    v = linear("pixels", space_to_depth(np.concatenate([(s - 127.5) / 64, detail], -1)))
    v = v + linear("changes", space_to_depth(changes)) + depth_to_space(linear("features", features))
    v = scaled(v, "before")
    for i in range(2):
        inner = leaky(linear(f"blocks.{i}.inner", v))
        kernels = arrays[f"blocks.{i}.spatial.weight"]
        mixed = [correlate(inner[..., c], kernels[..., c], mode="constant") for c in range(inner.shape[-1])]
        v = v + linear(f"blocks.{i}.outer", np.stack(mixed, -1))
    own = depth_to_space(linear("last", leaky(scaled(v, "after"))))
    t = (table(arrays["weights.table"], code) * changes).reshape(*s.shape[:2], -1, 3).sum(2)
    mean, first, second = np.moveaxis(t, -1, 0)
    coloured = np.stack([mean + first + 2 / 3 * second, mean - 4 / 3 * second, mean - first + 2 / 3 * second], -1)
    return step * (own + coloured) / 255


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_GROUPS])
@pytest.mark.parametrize("band", [16, 128])
def test_it_does_what_the_specification_says(band: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BAND", band)
    net = randomised(Refinement(config))
    pixels, features, code, step = inputs(64, 48)
    with torch.no_grad():
        found = net(pixels, features, code, step).numpy()
    for i in range(2):
        expected = by_the_specification(net, pixels[i].numpy(), features[i].numpy(), float(code[i]), float(step[i]))
        np.testing.assert_allclose(found[i], expected, atol=2e-4, rtol=2e-3)


def test_it_reaches_no_farther_than_windows_have_room_for() -> None:
    with pytest.raises(ValueError, match="4 blocks"):
        Refinement(replace(CONFIG, refinement=(4, 4)))
    with pytest.raises(ValueError, match="1 kinds of changes by groups"):
        Refinement(replace(CONFIG, refinement=(4, 3, 1)))
    for numbers in ((4,), (4, 3, 2, 1)):
        with pytest.raises(ValueError, match=f"a refinement of {len(numbers)} numbers"):
            Refinement(replace(CONFIG, refinement=numbers))
    net = randomised(Refinement(replace(CONFIG, refinement=(4, 3, 2))))
    pixels, features, code, step = inputs(160, 32)
    other = pixels.clone()
    other[:, 0] = -other[:, 0]
    with torch.no_grad():
        changed = (net(pixels, features, code, step) != net(other, features, code, step)).any(dim=(0, 2, 3))
    reach = int(changed.nonzero().max())
    assert reach <= groups.REACH + net.reach  # what matches depends on the pixels
    assert 88 + groups.REACH + net.reach + REACH <= windows.HALO * 16


def test_with_gradients_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BAND", 16)
    net = randomised(Refinement(CONFIG)).requires_grad_(True)
    given = inputs(48, 32)
    whole = net(*given)
    with torch.no_grad():
        torch.testing.assert_close(whole, net(*given), atol=1e-5, rtol=1e-4)
    whole.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_a_fresh_one_changes_nothing() -> None:
    assert not Refinement(CONFIG)(*inputs(32, 32)).any()


def write_refined(folder: Path, seed: int = 5) -> store.ModelInfo:
    """The tiny model with a refinement, in place of itself."""
    shutil.copy(TINY, folder)
    parent = store.read_info(folder / TINY.name)
    net = store.load_file(parent).net
    net.config = replace(net.config, refinement=CONFIG.refinement)
    net.refinement = randomised(Refinement(net.config), seed)
    store.write_model(parent.path, net, {"provenance": {}}, parent)
    return store.read_info(parent.path)


@pytest.fixture
def refined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.ModelInfo:
    monkeypatch.setenv("LIC_MODELS", str(tmp_path))
    return write_refined(tmp_path)


def test_weights_hold_it_and_still_are_those_without(refined: store.ModelInfo, picture: np.ndarray) -> None:
    before = store.read_info(TINY)
    assert refined.entropy_id == before.entropy_id
    assert refined.synthesis_id != before.synthesis_id == refined.plain_synthesis_id
    assert "refinement" in refined.kmac and refined.plain().plain() == refined.plain()
    net = store.load_file(refined).net
    assert net.refinement is not None and net.config.refinement == CONFIG.refinement
    expected = randomised(Refinement(net.config), 5).state_dict()
    for name, value in net.refinement.state_dict().items():  # of 8 or 16 bits now
        torch.testing.assert_close(value, expected[name], atol=0.01, rtol=0.01)
    plain = store.load_file(refined.plain()).net
    assert plain.refinement is None
    y, code = torch.randn(1, 8, 8, CONFIG.latent), torch.tensor([20_000.0])
    with torch.no_grad():
        assert torch.equal(plain.decoded(y, code), store.load_file(before).net.decoded(y, code))
        assert not torch.equal(net.decoded(y, code), plain.decoded(y, code))
        assert torch.equal(net.synthesis(y, code), plain.synthesis(y, code))


def test_files_of_weights_without_it_decode_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: np.ndarray
) -> None:
    monkeypatch.setenv("LIC_MODELS", str(TINY.parent))
    before = lic.Codec("tiny", "cpu")
    old = before.encode(picture, 40)
    expected = before.decode_array(old)
    monkeypatch.setenv("LIC_MODELS", str(tmp_path))
    write_refined(tmp_path)
    after = lic.Codec("tiny", "cpu")
    result = after.encode_result(picture, 40)
    assert result.data != old and np.array_equal(after.decode_array(result.data), result.reconstruction)
    assert np.array_equal(after.decode_array(old), expected)
    together = after.decode([old, result.data, old])  # each with its own
    assert [np.array_equal(np.asarray(one), expected) for one in together] == [True, False, True]
    monkeypatch.setenv("LIC_MODELS", str(TINY.parent))
    with pytest.raises(UnsupportedError, match="other weights"):
        lic.Codec("tiny", "cpu").decode_array(result.data)


def test_windows_leave_no_seam(refined: store.ModelInfo, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = lic.Codec("tiny", "cpu")
    large = np.tile(picture, (7, 5, 1))[:300, :340]
    data = codec.encode(large, 60)
    whole = codec.decode_array(data)
    monkeypatch.setattr(windows, "WINDOW", 4)
    in_parts = codec.decode_array(data)
    assert np.abs(whole.astype(int) - in_parts).max() <= 1
    region = codec.decode_array(data, region=(161, 62, 100, 170))
    assert np.array_equal(region, in_parts[62:232, 161:261])


def test_gray_without_a_refinement_is_the_mean_of_what_lies_beyond_white_too() -> None:
    net = store.load_file(store.read_info(TINY)).net
    y, code = 40 * torch.randn(1, 8, 8, CONFIG.latent, generator=torch.Generator().manual_seed(1)), torch.tensor([9e3])
    with torch.no_grad():
        (found,) = windows.synthesis(net, y, code, [windows.Samples(gray=True)])
        expected = 255 * (net.synthesis(y, code)[0].mean(-1, keepdim=True) + 0.5)
    assert (expected > 255).any() and (found.float() - expected.clamp(0, 255)).abs().max() <= 0.51


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_gray_and_deep_pictures(refined: store.ModelInfo, picture: np.ndarray, kind: type[np.generic]) -> None:
    codec = lic.Codec("tiny", "cpu")
    gray = picture[..., :1].astype(kind) * (257 if kind == np.uint16 else 1)
    result = codec.encode_result(gray, 60)
    assert np.array_equal(codec.decode_result(result.data).rgb, result.reconstruction)


def test_models_with_the_same_synthesis_get_it(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        shutil.copy(TINY, folder)
    parent = store.read_info(old / TINY.name)
    for name, change in (("same", 0.0), ("other", 0.5)):
        net = store.load_file(parent).net
        net.config = replace(net.config, name=name)
        net.g_s.first.bias += change
        store.write_model(old / f"{name}.safetensors", net, {"provenance": {}}, parent)
    base = write_refined(new)
    main = runpy.run_path(str(SCRIPTS / "follow_transforms.py"))["main"]
    result = CliRunner().invoke(main, [str(old), str(new), "--base", "tiny"])
    assert result.exit_code == 0, result.output
    same, other = (store.read_info(new / f"{name}.safetensors") for name in ("same", "other"))
    assert same.synthesis_id == base.synthesis_id and same.plain_synthesis_id == base.plain_synthesis_id
    assert same.path.stat().st_size < 4096  # all of it is shared
    assert other.synthesis_id == store.read_info(old / "other.safetensors").synthesis_id
    assert CodecModel(CONFIGS["tiny"]).refinement is None and store.load_file(other).net.refinement is None


@pytest.mark.parametrize("refined", [False, True])
def test_a_correction_goes_by_the_pixels_that_it_says(refined: bool) -> None:
    net = store.load("base").net
    x, code = inputs(64, 96)[0], torch.tensor([9_000.0, 31_000.0])
    y = net.analysis(x, code)
    v = softly_rounded(y)
    shown = (net.decoded if refined else net.synthesis)(v, code)
    expected = v + net.shortcut.analysis(x - shown) * net.gain(code)[:, None, None]
    found = net.corrected(x, y, code, corrections=Corrections((Share(1, 1, refined),)))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
