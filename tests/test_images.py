"""Reading and writing picture files: limits, damage, formats. What becomes of each mode: test_modes.py."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lic import images
from lic.errors import LicError

LIMIT = 10_000_000


def file_bytes(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def read(data: bytes) -> np.ndarray:
    return images.rgb_of(images.picture_of(data, max_pixels=LIMIT))


@pytest.mark.parametrize("format", [f for f in images.FORMATS if f != "jpeg"])
def test_lossless_formats_come_back_exactly(picture: np.ndarray, format: str) -> None:
    assert np.array_equal(read(images.picture_bytes(picture, format)), picture)


def test_jpeg_is_written_at_high_quality(picture: np.ndarray) -> None:
    back = read(images.picture_bytes(picture, "jpeg"))
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture).mean() < 2


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.png", "png"),
        ("a.JPG", "jpeg"),
        ("a.b.tif", "tiff"),
        ("x/a.pnm", "ppm"),
        ("a.pgm", "ppm"),
        ("a.lic", None),
        ("-", None),
    ],
)
def test_format_of_suffix(name: str, format: str | None) -> None:
    assert images.format_of_suffix(name) == format


def test_exif_orientation_is_applied(picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    data = file_bytes(Image.fromarray(picture), "PNG", exif=exif)
    assert np.array_equal(read(data), np.rot90(picture, -1))


def test_damaged_exif_does_not_cost_the_picture(picture: np.ndarray) -> None:
    data = file_bytes(Image.fromarray(picture), "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff")
    assert np.array_equal(read(data), picture)


def test_first_picture_of_an_mpo_is_taken(picture: np.ndarray) -> None:
    first = Image.fromarray(picture)
    data = file_bytes(first, "MPO", save_all=True, append_images=[first.resize((8, 8))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert read(data).shape == picture.shape


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = file_bytes(Image.new("RGB", (100, 100)), "PNG")
    assert images.picture_of(data, max_pixels=128 * 128).width == 100
    with pytest.raises(LicError, match=r"100x100.*16383.*--max-pixels"):
        images.picture_of(data, max_pixels=16383)


@pytest.mark.parametrize("format", ["PNG", "PPM", "JPEG", "BMP", "TIFF", "WEBP", "AVIF"])
def test_the_limit_is_ours_not_pillows(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    data = file_bytes(Image.new("RGB", (100, 100)), format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses more than twice as many
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    assert images.picture_of(data, max_pixels=128 * 128).width == 100
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(LicError, match="--max-pixels"):
        images.picture_of(data, max_pixels=9999)


@pytest.mark.parametrize("data", [b"P1\n3 1\n101\n", b"P4\n3 1\n\xa0"])
def test_bitmaps_as_text_and_as_bits(data: bytes) -> None:
    assert read(data)[0, :, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("format", ["PNG", "PPM", "JPEG", "BMP", "TIFF", "WEBP"])
def test_truncated_pictures_are_one_line(format: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = file_bytes(Image.fromarray(noise), format)
    with pytest.raises(LicError) as caught:
        read(data[: len(data) // 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"x", b"\x8bLI\0", b"PK\3\4" + bytes(20)])
def test_other_data_is_refused(data: bytes) -> None:
    with pytest.raises(LicError, match=r"empty|not a picture"):
        read(data)


@given(
    at=st.integers(0, 10**9),
    value=st.integers(0, 255),
    format=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]),
)
def test_damaged_pictures_give_pixels_or_a_clear_error(at: int, value: int, format: str) -> None:
    data = bytearray(file_bytes(Image.linear_gradient("L").resize((20, 20)).convert("RGB"), format))
    data[at % len(data)] = value
    with contextlib.suppress(LicError):
        assert read(bytes(data)).ndim == 3


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 0), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), bool),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint16),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(LicError, match=r"uint8 or uint16|no pixels"):
        images.picture_of(array, max_pixels=LIMIT)


@given(
    channels=st.sampled_from([None, 1, 2, 3, 4]),
    dtype=st.sampled_from(["u1", "<u2", ">u2"]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_arrays_become_pictures_and_back(channels: int | None, dtype: str, height: int, width: int) -> None:
    rng = np.random.default_rng(height * width)
    shape = (height, width) if channels is None else (height, width, channels)
    array = rng.integers(0, 256 if dtype == "u1" else 65536, shape).astype(dtype)
    picture = images.picture_of(array, max_pixels=LIMIT)
    assert np.array_equal(picture.to_array().reshape(shape), array)
    assert (picture.width, picture.height, picture.bits) == (width, height, 8 if dtype == "u1" else 16)
    assert picture.mode == {None: "L", 1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    assert np.array_equal(picture.at_bits(16).at_bits(8).to_array(), picture.at_bits(8).to_array())


def test_pictures_with_transparency_are_not_measured() -> None:
    with pytest.raises(LicError, match="transparency"):
        images.rgb_of(np.zeros((4, 4, 4), np.uint8))
    assert np.array_equal(images.rgb_of(np.full((4, 4), 700, np.uint16)), np.full((4, 4, 3), 3, np.uint8))


def test_arrays_in_any_memory_order_are_taken(picture: np.ndarray) -> None:
    flipped = picture[::-1, ::-1]
    assert np.array_equal(images.rgb_of(flipped), flipped)
    assert images.rgb_of(flipped).flags.c_contiguous


def test_a_picture_too_large_for_its_format_is_a_clear_error() -> None:
    with pytest.raises(LicError, match="cannot write 17000x1 pixels as webp"):
        images.picture_bytes(np.zeros((1, 17000, 3), np.uint8), "webp")
