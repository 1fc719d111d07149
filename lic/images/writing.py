"""Writing 8-bit RGB pixels as a picture file."""

from __future__ import annotations

import io
from pathlib import PurePath

import numpy as np
from PIL import Image

from lic.errors import LicError

# --format name: (Pillow's name, options). JPEG at a quality that adds little to the codec's own loss.
_PILLOW: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {}),
    "ppm": ("PPM", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "bmp": ("BMP", {}),
}
FORMATS = tuple(_PILLOW)

_SUFFIXES = {".tif": "tiff", ".jpg": "jpeg", ".pnm": "ppm", **{f".{name}": name for name in FORMATS}}


def format_of_suffix(path: str) -> str | None:
    """The format that the suffix of ``path`` names, or None."""
    return _SUFFIXES.get(PurePath(path).suffix.lower())


def picture_bytes(rgb: np.ndarray, format: str) -> bytes:
    """``rgb`` (uint8, H, W, 3) as a picture file of one of FORMATS.

    PNG, PPM, TIFF, BMP and WebP are lossless; JPEG is written at quality 95 without chroma subsampling.
    Raises LicError when the format cannot hold the picture (WebP ends at 16383 pixels a side).
    """
    name, options = _PILLOW[format]
    out = io.BytesIO()
    try:
        Image.fromarray(rgb).save(out, name, **options)
    except (OSError, ValueError) as error:
        height, width = rgb.shape[:2]
        raise LicError(f"cannot write {width}x{height} pixels as {format}: {error}") from error
    return out.getvalue()
