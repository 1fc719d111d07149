"""The Python API."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from PIL import Image

import lic
from lic import images
from lic.device import select_device
from lic.model import store
from lic.pipeline import windows


@pytest.fixture(scope="module")
def codec() -> lic.Codec:
    return lic.Codec(model="tiny", device="cpu")


def test_pictures_and_arrays_are_the_same(codec: lic.Codec, picture: np.ndarray) -> None:
    data = codec.encode(picture, quality=60)
    assert codec.encode(Image.fromarray(picture), quality=60) == data
    image = codec.decode(data)
    assert image.mode == "RGB" and image.size == (70, 44)


def test_functions_do_what_the_codec_does(codec: lic.Codec, picture: np.ndarray) -> None:
    data = lic.encode(picture, 30, model="tiny", device="cpu")
    assert data == codec.encode(picture, 30)
    assert np.array_equal(np.asarray(lic.decode(data, device="cpu")), np.asarray(codec.decode(data)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (64, 64), (3, 200)])
def test_any_size_comes_back(codec: lic.Codec, shape: tuple[int, int]) -> None:
    rgb = np.full((*shape, 3), 90, np.uint8)
    result = codec.encode_result(rgb)
    decoded = codec.decode_result(result.data)
    assert decoded.rgb.shape == rgb.shape
    assert np.array_equal(decoded.rgb, result.reconstruction)
    assert decoded.symbols_sha256 == result.symbols_sha256


def test_the_reconstruction_is_computed_when_asked_for_and_once(
    codec: lic.Codec, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    synthesis = windows.synthesis
    monkeypatch.setattr(windows, "synthesis", lambda *args, **options: calls.append(1) or synthesis(*args, **options))
    mine = picture.copy()
    result = codec.encode_result(mine)
    mine[:] = 0
    assert not calls
    assert result.psnr == images.psnr(picture, result.reconstruction)
    elsewhere = pickle.loads(pickle.dumps(result))
    assert elsewhere.psnr == result.psnr and elsewhere.data == result.data
    assert len(calls) == 1


def test_info(codec: lic.Codec, picture: np.ndarray) -> None:
    data = codec.encode(picture, quality=12.5)
    info = lic.info(data)
    assert (info.width, info.height, info.model, info.quality) == (70, 44, "tiny", 12.5)
    assert sum(size for _, size in info.sections) == len(data)
    assert lic.info(data) == info  # a module of that name would have taken its place by now


@pytest.mark.parametrize("quality", [-1, 100.5, float("nan")])
def test_quality_has_limits(codec: lic.Codec, picture: np.ndarray, quality: float) -> None:
    with pytest.raises(lic.UsageError, match="between 0 and 100"):
        codec.encode(picture, quality)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"target": 2000}, r"lic\.Target"), ({"quality": "high"}, "a number"), ({"effort": None}, "effort")],
)
def test_options_of_other_types(codec: lic.Codec, picture: np.ndarray, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(lic.UsageError, match=reason):
        codec.encode(picture, **options)


def test_targets_are_of_three_kinds() -> None:
    with pytest.raises(ValueError, match="size, bpp, psnr"):
        lic.Target("bits", 3)  # type: ignore[arg-type]


def test_max_pixels(codec: lic.Codec, picture: np.ndarray) -> None:
    data = codec.encode(picture)
    with pytest.raises(lic.LicError, match="3079"):
        codec.decode_result(data, max_pixels=3079)
    assert codec.decode_result(data, max_pixels=128 * 64).rgb.shape == picture.shape
    for decode in (codec.decode, lic.decode):
        with pytest.raises(lic.LicError, match="3079"):
            decode(data, max_pixels=3079)
        assert decode(data, max_pixels=128 * 64).size == (70, 44)


@pytest.mark.parametrize("height", [1, 63, 64, 200])
def test_psnr_of_any_height(height: int) -> None:
    rng = np.random.default_rng(height)
    a, b = rng.integers(0, 256, (2, height, 30, 3), dtype=np.uint8)
    expected = 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
    assert images.psnr(a, b) == pytest.approx(expected, abs=1e-9)
    assert images.psnr(a, a) == math.inf


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cpu:0", "", "cuda:1\n"])
def test_devices_have_known_names(name: str) -> None:
    with pytest.raises(lic.UsageError, match="auto, cpu, cuda or cuda:N"):
        lic.Codec(device=name)
    with pytest.raises(lic.UsageError, match="auto, cpu, cuda or cuda:N"):
        select_device(name)


def test_weights_are_loaded_once_for_both_directions(monkeypatch: pytest.MonkeyPatch, picture: np.ndarray) -> None:
    loaded = []
    load_file = store.load_file

    def counting(info: store.ModelInfo, device: str = "cpu") -> store.LoadedModel:
        loaded.append(info.name)
        return load_file(info, device)

    monkeypatch.setattr(store, "load_file", counting)
    codec = lic.Codec(model="tiny", device="cpu")
    data = codec.encode(picture)
    codec.decode(data)
    codec.decode(codec.encode(picture))
    assert loaded == ["tiny"]


def test_damaged_weights_fail_the_encoder_and_are_unsupported_for_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codec: lic.Codec, picture: np.ndarray
) -> None:
    data = codec.encode(picture)
    damaged = bytearray((DATA / "models" / "tiny.safetensors").read_bytes())
    damaged[-5000] ^= 1
    (tmp_path / "tiny.safetensors").write_bytes(damaged)
    monkeypatch.setenv("LIC_MODELS", str(tmp_path))
    with pytest.raises(lic.LicError, match="damaged") as caught:
        lic.encode(picture, model="tiny", device="cpu")
    assert caught.value.exit_code == 1
    with pytest.raises(lic.UnsupportedError, match="damaged"):
        lic.decode(data, device="cpu")


def test_models_that_may_not_be_read_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(DATA / "models" / "tiny.safetensors", tmp_path)
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.safetensors").mkdir()
    (tmp_path / "c.safetensors").write_bytes(b"")
    (tmp_path / "d.safetensors").write_bytes(b"\xff" * 100)  # a header of 2^64 - 1 bytes
    monkeypatch.setenv("LIC_MODELS", os.pathsep.join([str(tmp_path / "missing"), str(tmp_path)]))
    found = {model.name: model for model in store.available()}
    assert found["tiny"].path.parent == tmp_path
    assert not {"a", "b", "c", "d"} & set(found)
    assert found["tiny"].sha256 == store.read_info(DATA / "models" / "tiny.safetensors").sha256


def test_foreign_data_is_corrupt(codec: lic.Codec) -> None:
    with pytest.raises(lic.CorruptError):
        codec.decode(b"foreign")


def test_the_package_is_imported_without_torch() -> None:
    script = "import sys, lic; lic.info, lic.Codec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_unknown_attributes_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lic.nonsense
