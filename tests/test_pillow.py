"""The Pillow plugin."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, UnidentifiedImageError

import lic
import lic.pillow
from lic.model import store

CODING = {"model": "tiny", "device": "cpu"}


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_pictures_come_back_in_their_mode(tmp_path: Path, picture: np.ndarray, mode: str) -> None:
    image = Image.new(mode, (70, 44)) if mode == "I;16" else Image.fromarray(picture).convert(mode)
    image.save(tmp_path / "a.lic", quality=70, **CODING)
    with Image.open(tmp_path / "a.lic") as back:
        assert (back.format, back.mode, back.size) == ("LIC", mode, (70, 44))
        assert back.get_format_mimetype() == "image/x-lic"
        data = (tmp_path / "a.lic").read_bytes()
        assert np.array_equal(np.asarray(back), np.asarray(lic.decode(data, device="cpu")))
    assert data == lic.encode(image, 70, **CODING)


def test_metadata_is_taken_from_the_picture_or_the_call(picture: np.ndarray) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(picture)
    image.info["icc_profile"] = profile
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    out = io.BytesIO()
    image.save(out, "LIC", exif=exif, xmp=b"<x:xmpmeta/>", **CODING)
    back = Image.open(out)
    assert back.info["icc_profile"] == profile and back.info["xmp"] == b"<x:xmpmeta/>"
    assert back.getexif()[0x010F] == "Maker"
    out = io.BytesIO()
    image.save(out, "LIC", strip=True, **CODING)
    assert Image.open(out).info == {}
    assert "exif" not in image.info  # saving changes nothing in the picture


def test_opening_does_not_import_torch(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "a.lic", **CODING)
    script = (
        "import sys, lic.pillow; from PIL import Image; image = Image.open('a.lic'); assert image.size == (70, 44);"
        "assert 'torch' not in sys.modules; image.load(); assert 'torch' in sys.modules; print(image.getpixel((0, 0)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_model_is_loaded_once(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    data, loaded = lic.encode(picture, **CODING), []
    load_file = store.load_file
    monkeypatch.setattr(store, "load_file", lambda *arguments: loaded.append(1) or load_file(*arguments))
    lic.pillow._decoder.cache_clear()
    for _ in range(2):
        Image.open(io.BytesIO(data)).load()
    assert loaded == [1]


def test_damage_is_an_oserror_and_other_files_are_not_ours(tmp_path: Path, picture: np.ndarray) -> None:
    data = lic.encode(picture, **CODING)
    for damaged in (data[:-1], data[:60] + bytes([data[60] ^ 1]) + data[61:]):
        with pytest.raises(OSError):
            Image.open(io.BytesIO(damaged))
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(b"\x8bLX" + bytes(100)))


def test_options_of_saving(tmp_path: Path, picture: np.ndarray) -> None:
    plain = lic.encode(picture, 70, **CODING)
    Image.fromarray(picture).save(tmp_path / "a.lic", quality=70, tune="ms-ssim", effort=2, **CODING)
    assert lic.info((tmp_path / "a.lic").read_bytes()).effort == 2
    Image.fromarray(picture).save(tmp_path / "b.lic", target=lic.Target("size", len(plain)), **CODING)
    assert 0.9 * len(plain) < (tmp_path / "b.lic").stat().st_size <= len(plain)


def test_what_cannot_be_saved_is_an_oserror_and_leaves_no_file(tmp_path: Path, picture: np.ndarray) -> None:
    with pytest.raises(OSError, match="between 0 and 100"):
        Image.fromarray(picture).save(tmp_path / "a.lic", quality=200, **CODING)
    with pytest.raises(OSError, match="floating-point"):
        Image.new("F", (5, 5)).save(tmp_path / "a.lic", **CODING)
    assert not (tmp_path / "a.lic").exists()
