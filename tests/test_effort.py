"""Encoder-side optimisation: smaller files of the same quality, for every context model and kind of picture."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, Run
from PIL import Image

import lic
from lic import container
from lic.bench import metrics
from lic.bench.bdrate import Curve, bd_rate
from lic.images import mse
from lic.model import store
from lic.model.context import Geometry
from lic.pipeline import codec, decode_rgb, encode_rgb, encode_rgbs, windows
from lic.pipeline.distortion import DISTORTIONS, MsSsim, SquaredError, ms_ssim
from lic.pipeline.optimise import EFFORTS
from lic.quality import TUNES, code_of, lambda_of


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.asarray(Image.open(DATA / "demo.png").convert("RGB").crop((300, 250, 440, 350)))


def model_of(name: str = "tiny") -> store.LoadedModel:
    return store.load_file(store.read_info(DATA / "models" / f"{name}.safetensors"))


def cost(encoded: codec.Encoded, rgb: np.ndarray) -> float:
    """Bits of the whole file + λ·squared error."""
    header = encoded.container.header
    error = mse(rgb, encoded.reconstruction) * rgb.shape[0] * rgb.shape[1]
    return 8 * len(container.pack(encoded.container)) + lambda_of(header.quality) * error


MODELS = ("tiny", "tiny-econtextformer", "tiny-hyperprior", "tiny-msp", "tiny-nlaic")


@pytest.mark.parametrize("name", MODELS)
def test_costs_less_and_decodes(name: str, photo: np.ndarray) -> None:
    model, code = model_of(name), code_of(50)
    costs = []
    for effort in (0, 2, 4):
        encoded = encode_rgb(model, photo, code, effort=effort)
        assert encoded.container.header.effort == effort
        decoded = decode_rgb(model, container.parse(container.pack(encoded.container)))
        assert np.array_equal(decoded.rgb, encoded.reconstruction)
        assert decoded.symbols_sha256 == encoded.symbols_sha256
        costs.append(cost(encoded, photo))
    assert max(costs) == costs[0]  # effort 2 may find nothing
    if name == "tiny":  # the others have random weights, whose tables may have nothing to gain from
        assert costs[2] < costs[0]
    assert model.net.exact


@pytest.mark.parametrize("quality", [0, 30, 70, 100])
def test_gains_grow_with_effort(quality: float, photo: np.ndarray) -> None:
    model = model_of()
    costs = [cost(encode_rgb(model, photo, code_of(quality), effort=effort), photo) for effort in (0, 1, 3, 6)]
    assert costs[0] > max(costs[1:]) and costs[3] < 1.002 * min(costs)


@pytest.mark.parametrize(
    "rgb",
    [
        np.full((1, 1, 3), 200, np.uint8),
        np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8),
        np.random.default_rng(1).integers(0, 2**16, (20, 60, 3), dtype=np.uint16),
        np.linspace(0, 255, 130 * 40).reshape(130, 40, 1).astype(np.uint8),
        np.zeros((64, 64, 3), np.uint8),
    ],
    ids=["one pixel", "noise", "16 bits", "gray", "black"],
)
def test_never_costs_more(rgb: np.ndarray) -> None:
    model = model_of()
    for quality in (10, 90):
        plain = encode_rgb(model, rgb, code_of(quality))
        for effort in (1, 5):
            encoded = encode_rgb(model, rgb, code_of(quality), effort=effort)
            assert cost(encoded, rgb) <= cost(plain, rgb)
            decoded = decode_rgb(model, encoded.container, bits=16 if rgb.dtype == np.uint16 else 8)
            assert np.array_equal(decoded.rgb, encoded.reconstruction)


def test_tiles_and_windows(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "TILE", 64)
    monkeypatch.setattr(codec, "LARGEST_TILE", 64 * 64)
    monkeypatch.setattr(windows, "WINDOW", 16)
    model, code = model_of(), code_of(40)
    rgb = np.tile(photo, (3, 3, 1))
    done: list[tuple[int, int]] = []
    encoded = encode_rgb(model, rgb, code, effort=4, progress=lambda a, b: done.append((a, b)))
    assert encoded.container.header.tile == 64
    assert cost(encoded, rgb) < cost(encode_rgb(model, rgb, code), rgb)
    assert done == sorted(done) and done[-1][0] == done[-1][1] and len({total for _, total in done}) == 1


def test_slope_of_the_error_does_not_depend_on_the_windows(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model_of().net
    rgb = np.tile(photo, (4, 4, 1))[:370]
    code = torch.tensor([20_000.0])
    grid = Geometry(1, 24, 36)
    with torch.no_grad():
        y = torch.round(windows.analysis(net, [rgb], grid, code))
        error, slope = windows.error(net, y, code, rgb, SquaredError(), with_slope=True)
        assert windows.error(net, y, code, rgb, SquaredError(), with_slope=False) == (pytest.approx(error), None)
        monkeypatch.setattr(windows, "WINDOW", 16)
        again, other = windows.error(net, y, code, rgb, SquaredError(), with_slope=True)
    assert again == pytest.approx(error, rel=1e-5)
    assert slope is not None and other is not None
    assert torch.allclose(slope, other, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    # What is counted is what the decoder shows, but for the rounding of its samples.
    shown = windows.synthesis(net, y, code, [windows.Samples()])[0][:370, : rgb.shape[1]].numpy()
    assert error == pytest.approx(mse(rgb, shown) * rgb.shape[0] * rgb.shape[1], rel=0.02)


def test_time_is_bounded(photo: np.ndarray) -> None:
    rgb = np.tile(photo, (2, 2, 1))
    tiny = lic.Codec("tiny")
    plain = tiny.encode(rgb, 40)
    start = time.monotonic()
    data = tiny.encode(rgb, 40, effort=9, effort_seconds=0)
    short = time.monotonic() - start
    assert len(data) == len(plain) or data != plain  # one pass has no gradient step behind it
    start = time.monotonic()
    tiny.encode(rgb, 40, effort=9)
    assert short < time.monotonic() - start
    assert lic.info(data).effort == 9


@pytest.mark.parametrize(("effort", "seconds"), [(10, None), (-1, None), (1.5, None), (3, -1.0), (3, math.nan)])
def test_efforts_that_do_not_exist(effort: int, seconds: float | None, photo: np.ndarray) -> None:
    with pytest.raises(lic.UsageError, match="effort"):
        lic.encode(photo, effort=effort, effort_seconds=seconds, model="tiny")


@pytest.mark.slow
def test_targets_with_effort(photo: np.ndarray) -> None:
    tiny = lic.Codec("tiny")
    for effort in (0, 4):
        result = tiny.encode_result(photo, target=lic.Target("size", 1500), effort=effort)
        assert 0.985 * 1500 <= len(result.data) <= 1500
        assert 32 <= tiny.encode_result(photo, target=lic.Target("psnr", 32), effort=effort).psnr <= 32.02
    with pytest.raises(lic.LicError, match="at least"):
        tiny.encode(photo, target=lic.Target("size", 20), effort=2)


def test_on_the_command_line(lic: Run, tmp_path: Path, photo: np.ndarray) -> None:
    Image.fromarray(photo).save(tmp_path / "a.png")
    Image.fromarray(photo[::-1].copy()).save(tmp_path / "b.png")
    command = ("encode", "--model", "tiny", "--effort", "3", "--effort-seconds", "30", "--report", "r.jsonl")
    run = lic(*command, "a.png", "b.png", "--output-dir", "out")
    assert run.returncode == 0, run.stderr
    facts = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [f["effort"] for f in facts] == [3, 3]
    info = json.loads(lic("info", "--json", "out/a.lic").stdout)
    assert info["effort"] == 3 and info["lambda"] == pytest.approx(lambda_of(code_of(40)))
    assert lic("decode", "out/a.lic", "a2.png").returncode == 0
    for wrong in ("--effort 10", "--effort x", "--effort-seconds -1"):
        run = lic("encode", "a.png", "c.lic", *wrong.split())
        assert run.returncode == 2 and not (tmp_path / "c.lic").exists()


def test_levels_rise() -> None:
    passes = [effort.passes for effort in EFFORTS]
    assert len(EFFORTS) == 10 and passes == sorted(passes) and passes[0] == 0
    assert [effort.with_context for effort in EFFORTS] == [False] * 4 + [True] * 6


@pytest.mark.parametrize("size", [(1, 1, 3), (5, 300, 1), (64, 64, 3), (97, 130, 3), (200, 333, 3)])
def test_ms_ssim_is_that_of_the_benchmark(size: tuple[int, int, int]) -> None:
    random = np.random.default_rng(size[0])
    a = random.integers(0, 256, size, dtype=np.uint8)
    b = (a * 0.9 + random.normal(0, 9, size)).clip(0, 255).astype(np.uint8)
    shown, seen = (torch.from_numpy(array.astype(np.float32)) for array in (b, a))
    alone = ms_ssim(shown, seen)
    assert float(alone) == pytest.approx(metrics.ms_ssim(b, a), abs=2e-4)
    assert ms_ssim(torch.stack([seen, shown]), torch.stack([seen, seen])).tolist() == pytest.approx([1, float(alone)])


def test_weight_for_ms_ssim_is_the_second_derivative(photo: np.ndarray) -> None:
    """Of 1 - MS-SSIM at the picture itself, by differences, for latents that the bounds do not lift."""
    shortcut = model_of().net.shortcut
    pixels = torch.from_numpy(photo[:96, :128].astype(np.float32))
    with torch.no_grad():
        weight = MsSsim().weight(shortcut, pixels.unsqueeze(0))
        y = shortcut.analysis(pixels.unsqueeze(0) / 255)
        whole = 255 * shortcut.synthesis(y)[0]
        ratios = []
        for channel in (0, 1, 5):
            changed = y.clone()
            changed[0, 3, 4, channel] += 4 / 255
            error = MsSsim().error(255 * shortcut.synthesis(changed)[0], whole)
            ratios.append(float(weight[0, 3, 4, channel]) / 3 * 16 / float(error))
    assert min(ratios) > 0.5 and max(ratios) < 4


def test_the_pull_of_ms_ssim_lowers_it(photo: np.ndarray) -> None:
    """Of each picture by itself, and under autocast as without."""
    seen = torch.from_numpy(photo[:96, :128].astype(np.float32))
    seen = torch.stack([seen, seen.flip(1)])
    noise = torch.randn(seen.shape, generator=torch.Generator().manual_seed(1))
    shown, distortion = seen + noise * torch.tensor([4.0, 12.0])[:, None, None, None], MsSsim()
    pull = distortion.corrections.pull
    assert pull is not None
    wanted = pull(shown, seen)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pull(shown, seen), wanted)
    for i in range(2):
        torch.testing.assert_close(pull(shown[i : i + 1], seen[i : i + 1])[0], wanted[i])
        before, after = (float(distortion.error(p, seen[i])) for p in (shown[i], shown[i] + 0.01 * wanted[i]))
        # For three channels the error's derivative is -2/3 of the pull where pixels are within their range.
        inside = (shown[i] >= 0) & (shown[i] <= 255)
        assert after - before == pytest.approx(-2 / 3 * 0.01 * float((wanted[i] * inside).square().sum()), rel=0.1)


def test_correcting_for_ms_ssim_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights tuned for it: bits + λ·error with its pull, and with what squared error misses alone."""
    tuned, photo = (
        store.load("base-ms-ssim"),
        np.asarray(Image.open(DATA / "demo.png").convert("RGB"))[100:484, 200:584],
    )

    def spent(encoded: codec.Encoded) -> float:
        error = windows.error_between(tuned.net, encoded.reconstruction, photo, MsSsim())
        return 8 * len(container.pack(encoded.container)) + lambda_of(encoded.container.header.quality) * error

    pulled = spent(encode_rgb(tuned, photo, code_of(60), tune="ms-ssim"))
    distortion = DISTORTIONS["ms-ssim"]
    monkeypatch.setattr(distortion, "corrections", distortion.corrections._replace(pull=None))
    assert pulled < spent(encode_rgb(tuned, photo, code_of(60), tune="ms-ssim"))


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-nlaic", marks=pytest.mark.slow)])
def test_tuned_for_ms_ssim(name: str, photo: np.ndarray) -> None:
    """Fewer bits at more similarity, or about so, than tuned for squared error; and a file like any other."""
    model = model_of(name)
    tuned = [encode_rgb(model, photo, code_of(q), effort=6, tune="ms-ssim") for q in (40, 55, 70)]
    for encoded in tuned:
        decoded = decode_rgb(model, container.parse(container.pack(encoded.container)))
        assert np.array_equal(decoded.rgb, encoded.reconstruction)
    if name == "tiny":  # the other has random weights
        plain = [encode_rgb(model, photo, code_of(q), effort=6) for q in (30, 50, 70)]
        assert bd_rate(curve(plain, photo), curve(tuned, photo), "ms_ssim") < -3
        assert bd_rate(curve(plain, photo), curve(tuned, photo), "psnr") > 0


def test_rounding_is_tuned_without_effort() -> None:
    """With the same weights: fewer bits at equal MS-SSIM than at equal PSNR; and pictures together as alone."""
    model, codes = model_of(), [code_of(q) for q in (10, 30, 50)]
    rgb = np.asarray(Image.open(DATA / "demo.png").convert("RGB").crop((250, 150, 634, 406)))
    plain, tuned = (curve([encode_rgb(model, rgb, code, tune=tune) for code in codes], rgb) for tune in TUNES)
    saved = bd_rate(plain, tuned, "ms_ssim")
    assert saved < -1 and saved < bd_rate(plain, tuned, "psnr") - 1
    together = encode_rgbs(model, [rgb] * 3, codes, tune="ms-ssim")
    assert curve(together, rgb).bpp == pytest.approx(tuned.bpp, rel=0.01)


def curve(encoded: list[codec.Encoded], rgb: np.ndarray) -> Curve:
    pixels = rgb.shape[0] * rgb.shape[1]
    return Curve(
        "",
        tuple(8 * len(container.pack(e.container)) / pixels for e in encoded),
        tuple(metrics.psnr(e.reconstruction, rgb) for e in encoded),
        tuple(metrics.ms_ssim(e.reconstruction, rgb) for e in encoded),
    )


@pytest.mark.parametrize("rgb", [np.full((1, 1, 3), 9, np.uint8), np.zeros((70, 20, 1), np.uint16)], ids=["1", "black"])
def test_tuned_for_ms_ssim_whatever_the_picture(rgb: np.ndarray) -> None:
    bits = 16 if rgb.dtype == np.uint16 else 8
    for quality in (0, 60, 100):
        encoded = encode_rgb(model_of(), rgb, code_of(quality), effort=2, tune="ms-ssim")
        assert np.array_equal(decode_rgb(model_of(), encoded.container, bits=bits).rgb, encoded.reconstruction)


def test_tune_on_the_command_line(lic: Run, tmp_path: Path, photo: np.ndarray) -> None:
    Image.fromarray(photo).save(tmp_path / "a.png")
    run = lic("encode", "--model", "tiny", "--tune", "ms-ssim", "--json", "a.png", "a.lic")
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stderr)
    assert (facts["tune"], facts["effort"]) == ("ms-ssim", 0)
    run = lic("encode", "--model", "tiny", "--tune", "ssim", "a.png", "b.lic")
    assert run.returncode == 2 and not (tmp_path / "b.lic").exists()


@pytest.mark.parametrize("quality", [25, 75])
def test_correcting_latents_pays(quality: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the shipped weights, whose training knew of it: bits + λ·error of the same picture with and without.

    At the lowest qualities that is so on most pictures, and not on this one.
    """
    base, photo = store.load("base"), np.asarray(Image.open(DATA / "demo.png").convert("RGB"))[100:484, 200:584]
    corrected = cost(encode_rgb(base, photo, code_of(quality)), photo)
    monkeypatch.setattr(type(base.net), "corrected", lambda self, x, y, *more: y)
    assert corrected < cost(encode_rgb(base, photo, code_of(quality)), photo)
