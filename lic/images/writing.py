"""Writing a picture as a file of a usual format."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from lic.errors import LicError
from lic.images import exif
from lic.images.picture import Picture, picture_of_array
from lic.images.writing16 import png16, ppm16, tiff16


@dataclass(frozen=True)
class _Format:
    name: str  # of Pillow
    options: dict[str, object] = field(default_factory=dict)
    alpha: bool = False
    metadata: tuple[str, ...] = ()  # what it holds of lic.container.Metadata
    write16: Callable[[Picture], bytes] | None = None


_ALL = ("icc", "exif", "xmp")
# By --format. JPEG at a quality that adds little to the codec's own loss.
_FORMATS = {
    "png": _Format("PNG", {}, True, _ALL, png16),
    "ppm": _Format("PPM", write16=ppm16),
    "webp": _Format("WEBP", {"lossless": True, "exact": True}, True, _ALL),
    "tiff": _Format("TIFF", {"compression": "tiff_adobe_deflate"}, True, _ALL, tiff16),
    "jpeg": _Format("JPEG", {"quality": 95, "subsampling": 0}, False, _ALL),
    "bmp": _Format("BMP"),
}
FORMATS = tuple(_FORMATS)
FORMATS_16 = tuple(name for name, format in _FORMATS.items() if format.write16)

_SUFFIXES = {".tif": "tiff", ".jpg": "jpeg", ".pnm": "ppm", ".pgm": "ppm", **{f".{name}": name for name in FORMATS}}
_NAMES = {"icc": "colour profile", "exif": "EXIF", "xmp": "XMP"}
_JPEG_SEGMENT = 65_000  # bytes: EXIF and XMP must fit into one


def format_of_suffix(path: str) -> str | None:
    """The format that the suffix of ``path`` names, or None."""
    return _SUFFIXES.get(PurePath(path).suffix.lower())


def picture_bytes(picture: Picture | np.ndarray, format: str) -> bytes:
    """``picture`` as a file of one of FORMATS, with 16 bits per sample if it has them (FORMATS_16 only).

    PNG, PPM, TIFF, BMP and WebP are lossless; JPEG is written at quality 95 without chroma subsampling. What
    the format cannot hold besides is left out: :func:`left_out`. Raises LicError when it cannot hold the
    picture (WebP ends at 16383 pixels a side).
    """
    if isinstance(picture, np.ndarray):
        picture = picture_of_array(picture)
    kept = _kept(picture, format)
    known = _FORMATS[format]
    try:
        if picture.bits == 16:
            if known.write16 is None:
                raise LicError(f"{format} holds 8 bits per sample, not 16")
            return known.write16(kept)
        return _with_pillow(kept, known)
    except (OSError, ValueError) as error:
        raise LicError(f"cannot write {picture.width}x{picture.height} pixels as {format}: {error}") from error


def left_out(picture: Picture, format: str) -> list[str]:
    """What ``format`` cannot hold of ``picture``, in words: "transparency", "colour profile", "EXIF", "XMP"."""
    kept = _kept(picture, format)
    names = ["transparency"] if picture.alpha is not None and kept.alpha is None else []
    there = kept.metadata.as_dict()
    return names + [_NAMES[kind] for kind in picture.metadata.as_dict() if kind not in there]


def _kept(picture: Picture, format: str) -> Picture:
    """What the format holds of the picture."""
    known = _FORMATS[format]
    metadata = picture.metadata.as_dict()
    for kind, value in list(metadata.items()):
        too_long = format == "jpeg" and kind != "icc" and len(value) > _JPEG_SEGMENT
        # WebP has no gray: a profile for gray would not fit what becomes of the samples.
        misfit = format == "webp" and kind == "icc" and value[16:20] == b"GRAY"
        if kind not in known.metadata or too_long or misfit:
            del metadata[kind]
    alpha = picture.alpha if known.alpha else None
    return Picture(picture.colour, alpha, type(picture.metadata)(**metadata))


def _with_pillow(picture: Picture, format: _Format) -> bytes:
    image = picture.to_image()
    image.info = {}
    options: dict[str, Any] = dict(format.options)
    metadata = picture.metadata
    if metadata.icc:
        options["icc_profile"] = metadata.icc
    if format.name == "TIFF" and (metadata.exif or metadata.xmp):
        options["exif"] = tags = Image.Exif()  # the one way by which Pillow takes both
        tags.load(exif.PREFIX + (metadata.exif or b""))
        if metadata.xmp:
            tags[700] = metadata.xmp
    elif metadata.exif:
        options["exif"] = exif.PREFIX + metadata.exif
    if metadata.xmp and format.name == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", metadata.xmp)
    elif metadata.xmp and format.name != "TIFF":
        options["xmp"] = metadata.xmp
    out = io.BytesIO()
    image.save(out, format.name, **options)
    return out.getvalue()
