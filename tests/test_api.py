"""The Python API."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import lic


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


def test_info(codec: lic.Codec, picture: np.ndarray) -> None:
    data = codec.encode(picture, quality=12.5)
    info = lic.info(data)
    assert (info.width, info.height, info.model, info.quality) == (70, 44, "tiny", 12.5)
    assert sum(size for _, size in info.sections) == len(data)


@pytest.mark.parametrize("quality", [-1, 100.5, float("nan")])
def test_quality_has_limits(codec: lic.Codec, picture: np.ndarray, quality: float) -> None:
    with pytest.raises(lic.UsageError, match="between 0 and 100"):
        codec.encode(picture, quality)


def test_max_pixels(codec: lic.Codec, picture: np.ndarray) -> None:
    data = codec.encode(picture)
    with pytest.raises(lic.LicError, match="3079"):
        codec.decode_result(data, max_pixels=3079)
    assert codec.decode_result(data, max_pixels=3080).rgb.shape == picture.shape


def test_foreign_data_is_corrupt(codec: lic.Codec) -> None:
    with pytest.raises(lic.CorruptError):
        codec.decode(b"foreign")


def test_the_package_is_imported_without_torch() -> None:
    script = "import sys, lic; lic.info, lic.Codec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_unknown_attributes_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lic.nonsense
