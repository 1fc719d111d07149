"""Reading a picture file, or a picture of Pillow's, of whatever mode, saying what is reduced (docs/pictures.md)."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from lic.container import METADATA_LIMIT, Metadata, Reduced, over_limit
from lic.errors import LicError
from lic.images import deep, exif
from lic.images.limits import without_pillows_limits
from lic.images.picture import Picture, picture_of_array

# Pillow knows many more formats; these are the ones that photographs come in and that the tests cover.
READABLE = ("PNG", "PPM", "WEBP", "TIFF", "JPEG", "BMP", "AVIF", "GIF")
PICTURE_SUFFIXES = frozenset(
    (".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".tif", ".tiff", ".jpg", ".jpeg", ".jfif", ".bmp")
) | {".avif", ".gif"}

_SRGB_GAMMA = 0.45455  # of a PNG; others say that the samples mean something else
_SAME_GAMMA = 0.01

# Of H.273, as PNG and AVIF name a colour space: sRGB, near it, or unspecified.
_PLAIN_PRIMARIES, _PLAIN_TRANSFERS = (1, 2), (1, 2, 6, 13)

_KEY_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads gray of 2 and 4 bits over 8, but not the transparent one

# By EXIF orientation: how an array becomes upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


def picture_of(source: bytes | Image.Image | np.ndarray | Picture, *, max_pixels: int, strip: bool = False) -> Picture:
    """The picture of a file's bytes, upright, in 8 or 16 bits per sample; or of Pillow's or NumPy's picture.

    ``strip`` leaves all metadata out. Raises LicError (one line) when ``source`` is no picture, damaged, is over
    ``max_pixels`` (as a reader of its file counts them) or has none, or is of a kind that cannot be coded.
    """
    if isinstance(source, bytes):
        picture = _of_file(source, max_pixels)
    elif isinstance(source, Image.Image):
        picture = _of_image(source, {})
    else:
        picture = source if isinstance(source, Picture) else picture_of_array(source)
    _check_size(picture.width, picture.height, max_pixels)
    return _stripped(picture) if strip else picture


def rgb_of(source: Image.Image | np.ndarray | Picture) -> np.ndarray:
    """The pixels of a picture without transparency as uint8 (H, W, 3), for measurements.

    Raises LicError if it has transparency, or as :func:`picture_of`.
    """
    picture = picture_of(source, max_pixels=2**64).at_bits(8)
    if picture.alpha is not None:
        raise LicError("the picture has transparency, which cannot be measured: flatten it first")
    return np.ascontiguousarray(np.broadcast_to(picture.colour, (picture.height, picture.width, 3)))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if problem := over_limit(width, height, max_pixels):
        raise LicError(problem)


# ----------------------------------------------------------------------------------------------------
# files


def _of_file(data: bytes, max_pixels: int) -> Picture:
    try:
        with without_pillows_limits():
            image = Image.open(io.BytesIO(data), formats=READABLE)
            _check_size(image.width, image.height, max_pixels)
            tiles = list(image.tile)
            reasons = _reasons(image, data)
            is_deep = deep.is_deep(image, tiles)
            image.load()
            samples = deep.deep_samples(data, image, tiles) if is_deep else None
            if samples is None and image.mode[0] != "I" and is_deep:
                reasons["16 bits per sample became 8"] = Reduced.PRECISION
            return _of_image(image, reasons, samples, _KEY_SPREAD.get(deep.raw_mode(tiles[0]), 1) if tiles else 1)
    except (LicError, MemoryError):
        raise
    except UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise LicError("a damaged TIFF, or one of a kind that is not supported: convert it") from None
        what = "the file is empty" if not data else "not a picture of a known format"
        raise LicError(f"{what} (known: PNG, PPM, WebP, TIFF, JPEG, BMP, AVIF, GIF)") from None
    except Exception as error:
        # Pillow's readers raise SyntaxError, struct.error, IndexError and more on damaged files.
        raise LicError(f"cannot read the picture: {error}") from error


def _reasons(image: Image.Image, data: bytes) -> dict[str, Reduced]:
    """What the file has and its first frame in Pillow's 8 bits has not: notes and their kinds."""
    reasons = {}
    frames = getattr(image, "n_frames", 1)
    # A JPEG of a phone may carry a second view or a gain map behind the picture (MPO): nobody misses those.
    if frames > 1 and image.format != "MPO":
        reasons[f"the first of {frames} frames was taken"] = Reduced.FRAMES
    bits = _avif_bits(data) if image.format == "AVIF" else 8
    if bits > 8:
        reasons[f"{bits} bits per sample became 8"] = Reduced.PRECISION
    primaries, transfer = _code_points(data, image.format)
    if not image.info.get("icc_profile") and not (primaries in _PLAIN_PRIMARIES and transfer in _PLAIN_TRANSFERS):
        named = f"H.273: primaries {primaries}, transfer {transfer}"
        reasons[f"the colour space ({named}) was left out: colours may look different"] = Reduced.COLOUR_SPACE
    return reasons


def _code_points(data: bytes, format: str | None) -> tuple[int, int]:
    """Primaries and transfer function that the file names by number, which Pillow passes over."""
    if format == "PNG" and 0 < (at := data.find(b"cICP", 0, data.find(b"IDAT"))) < len(data) - 5:
        return data[at + 4], data[at + 5]
    if format == "AVIF" and 0 < (at := data.find(b"colrnclx")) < len(data) - 12:
        return data[at + 9], data[at + 11]
    return 2, 2


def _avif_bits(data: bytes) -> int:
    """Bits per sample that the first AV1 configuration in the file names."""
    at = data.find(b"av1C")
    flags = data[at + 6] if 0 <= at < len(data) - 6 else 0
    return (12 if flags & 0x20 else 10) if flags & 0x40 else 8


# ----------------------------------------------------------------------------------------------------
# modes


def _of_image(
    image: Image.Image, reasons: dict[str, Reduced], samples: np.ndarray | None = None, key_spread: int = 1
) -> Picture:
    """``samples`` are those of the loaded ``image`` in more than 8 bits, uint16 (H, W, 2..4), if it has them.

    ``key_spread`` brings the transparent colour to the range of the samples.
    """
    if 0 in image.size:
        raise LicError("the picture has no pixels")
    image.load()
    reasons = dict(reasons)
    profile: bytes | None = image.info.get("icc_profile")
    if samples is None:
        samples = _samples(image, reasons)
        if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
            profile = None  # it was for the samples before
    picture = picture_of_array(samples)
    if picture.alpha is None and (hidden := _colour_key(image, picture, key_spread)) is not None:
        picture = replace(picture, alpha=hidden)
    metadata = _metadata(image, profile, picture.colour.shape[2] == 1, reasons)
    picture = replace(picture, metadata=metadata, reduced=sum(set(reasons.values())), notes=tuple(reasons))
    return _upright(picture, image)


def _samples(image: Image.Image, reasons: dict[str, Reduced]) -> np.ndarray:
    """uint8 or uint16, (H, W) or (H, W, 2..4). Puts into ``reasons`` what that loses."""
    mode = image.mode
    if mode.startswith("I"):
        return _integers(image)
    if mode == "CMYK":
        return np.asarray(_rgb_of_cmyk(image, reasons))
    if mode == "LAB":
        reasons["Lab became RGB"] = Reduced.COLOUR_MODEL
        return np.asarray(ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), _srgb(), outputMode="RGB"))
    if mode in ("YCbCr", "HSV"):
        reasons[f"{mode} became RGB"] = Reduced.COLOUR_MODEL
        return np.asarray(image.convert("RGB"))
    if mode == "P":
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    same = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "PA": "RGBA", "RGB": "RGB", "RGBX": "RGB"}
    target = {**same, "RGBA": "RGBA", "RGBa": "RGBA"}.get(mode)
    if target is None:
        what = "floating-point" if mode == "F" else mode
        raise LicError(f"{what} pictures are not supported: convert it to 8 or 16 bits per sample")
    return np.asarray(image if mode == target else image.convert(target))


def _integers(image: Image.Image) -> np.ndarray:
    """Gray of 12, 16 or 32 bits as uint16."""
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > 65535:
        raise LicError("gray samples of 32 bits are not supported: convert the picture to 16 bits per sample")
    samples = samples.astype(np.uint16)
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(258) == (12,):  # BitsPerSample: Pillow leaves the values as they are
        samples = samples << 4 | samples >> 8
    if tags.get(262) == 0 and image.mode != "I":  # WhiteIsZero, which Pillow turns round in 8 bits only
        samples = 65535 - samples
    return samples


def _rgb_of_cmyk(image: Image.Image, reasons: dict[str, Reduced]) -> Image.Image:
    profile = image.info.get("icc_profile") or b""
    if profile[16:20] == b"CMYK":
        try:
            converted = ImageCms.profileToProfile(image, io.BytesIO(profile), _srgb(), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            reasons["CMYK became sRGB, by its colour profile"] = Reduced.COLOUR_MODEL
            return converted
    reasons["CMYK became RGB, without a colour profile"] = Reduced.COLOUR_MODEL
    return image.convert("RGB")


def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


def _colour_key(image: Image.Image, picture: Picture, spread: int) -> np.ndarray | None:
    """Opacity where one colour stands for transparent (tRNS of a PNG, GIF), or None."""
    key = image.info.get("transparency")
    channels = picture.colour.shape[2]
    values = key if isinstance(key, tuple) else (key,)
    if image.mode == "P" or len(values) != channels or not all(isinstance(value, int) for value in values):
        return None
    transparent = np.all(picture.colour == np.array(values, np.int64) * spread, axis=2)
    return np.where(transparent, 0, np.iinfo(picture.colour.dtype).max).astype(picture.colour.dtype)


def _upright(picture: Picture, image: Image.Image) -> Picture:
    try:
        turn = _TURNS.get(image.getexif().get(exif.ORIENTATION, 1))
    except Exception:  # damaged EXIF must not cost the picture; without a readable tag it is upright
        turn = None
    if turn is None:
        return picture
    alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return replace(picture, colour=np.ascontiguousarray(turn(picture.colour)), alpha=alpha)


# ----------------------------------------------------------------------------------------------------
# metadata


def _metadata(image: Image.Image, profile: bytes | None, gray: bool, reasons: dict[str, Reduced]) -> Metadata:
    info = image.info
    if profile and profile[16:20] != (b"GRAY" if gray else b"RGB "):
        reasons["the colour profile does not fit the samples and was left out"] = Reduced.COLOUR_SPACE
        profile = None
    gamma = info.get("gamma")
    if gamma and not profile and "srgb" not in info and abs(gamma - _SRGB_GAMMA) > _SAME_GAMMA:
        reasons[f"the gamma of {gamma:g} was left out"] = Reduced.COLOUR_SPACE
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    found = {"icc": profile, "exif": _exif(image, reasons), "xmp": exif.upright_xmp(xmp) if xmp else None}
    for kind, value in found.items():
        if value and len(value) > METADATA_LIMIT:
            reasons[f"{kind.upper()} of more than {METADATA_LIMIT} bytes was left out"] = Reduced(0)
            found[kind] = None
    return Metadata(**found)


def _exif(image: Image.Image, reasons: dict[str, Reduced]) -> bytes | None:
    try:
        data = exif.exif_of_tiff(image) if image.format == "TIFF" else image.info.get("exif")
        if not data and (text := image.info.get("Raw profile type exif")):
            data = exif.of_raw_profile(text)
        return exif.upright_exif(data) if data else None
    except Exception:  # Pillow raises SyntaxError, struct.error and more on damaged EXIF
        reasons["damaged EXIF was left out"] = Reduced(0)
        return None


def _stripped(picture: Picture) -> Picture:
    reduced, notes = picture.reduced, picture.notes
    if (profile := picture.metadata.icc) and "srgb" not in (name := _profile_name(profile)).lower():
        reduced |= Reduced.COLOUR_SPACE
        notes = (*notes, f"without its colour profile ({name}) colours may look different")
    return replace(picture, metadata=Metadata(), reduced=int(reduced), notes=notes)


def _profile_name(profile: bytes) -> str:
    try:
        return " ".join(ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).split())
    except (ImageCms.PyCMSError, OSError, struct.error):
        return "unnamed"
