"""Reading a picture file into 8-bit RGB, refusing what would lose something without a word."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lic.errors import LicError

# Pillow knows many more formats; these are the ones that photographs come in and that the tests cover.
READABLE = ("PNG", "PPM", "WEBP", "TIFF", "JPEG", "BMP", "AVIF")
PICTURE_SUFFIXES = frozenset(
    (".png", ".ppm", ".pnm", ".webp", ".tif", ".tiff", ".jpg", ".jpeg", ".jfif", ".bmp", ".avif")
)

_MODE_NAMES = {
    "1": "black-and-white",
    "L": "gray",
    "LA": "gray with alpha",
    "La": "gray with alpha",
    "PA": "palette with alpha",
    "P": "palette",
    "RGBA": "RGB with alpha",
    "RGBa": "RGB with alpha",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
    "LAB": "Lab",
    "I": "32-bit gray",
    "F": "floating-point gray",
}


def picture_of(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a picture file: 8-bit RGB, EXIF orientation applied, pixels loaded.

    Raises LicError (one line) when ``data`` is no picture, damaged, has more than ``max_pixels`` pixels, or
    is of a kind that this version does not code: other modes than RGB, more than 8 bits, several frames.
    """
    try:
        return _read(data, max_pixels)
    except (LicError, MemoryError):
        raise
    except UnidentifiedImageError:
        what = "the file is empty" if not data else "not a picture of a known format"
        raise LicError(f"{what} (known: PNG, PPM, WebP, TIFF, JPEG, BMP, AVIF)") from None
    except Exception as error:
        # Pillow's readers raise SyntaxError, struct.error, IndexError and more on damaged files.
        raise LicError(f"cannot read the picture: {error}") from error


def _read(data: bytes, max_pixels: int) -> Image.Image:
    with _without_pillows_limit():
        image = Image.open(io.BytesIO(data), formats=READABLE)
        if image.width * image.height > max_pixels:
            raise LicError(
                f"{image.width}x{image.height} pixels are more than the limit of {max_pixels} (--max-pixels)"
            )
        _refuse_unsupported(image)
        image.load()
        # A later tag in the data may have said that an RGB picture has a transparent colour.
        _refuse_unsupported(image)
        return _oriented(image)


def metadata_of(image: Image.Image) -> list[str]:
    """What a picture carries besides pixels, by name: "colour profile", "EXIF", "XMP". Damaged EXIF counts too.

    The orientation that :func:`picture_of` has applied is no longer there, and a TIFF's own tags are no EXIF.
    """
    present = {
        "colour profile": image.info.get("icc_profile"),
        "EXIF": image.info.get("exif") and _has_tags(image.info["exif"]),
        "XMP": image.info.get("xmp") or image.info.get("XML:com.adobe.xmp"),
    }
    return [name for name, there in present.items() if there]


def rgb_of(image: Image.Image | np.ndarray) -> np.ndarray:
    """The pixels of a picture as uint8 (H, W, 3), contiguous. Orientation is taken as it is.

    Raises LicError when the picture is not 8-bit RGB or has no pixels.
    """
    if isinstance(image, Image.Image):
        _refuse_unsupported(image)
        image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        shape = "x".join(str(n) for n in image.shape)
        raise LicError(f"an array must be uint8 of shape (H, W, 3), not {image.dtype} of shape {shape}")
    if image.size == 0:
        raise LicError("the picture has no pixels")
    return np.ascontiguousarray(image)


def _refuse_unsupported(image: Image.Image) -> None:
    kind = None
    if image.mode.startswith("I;16"):
        kind = "16-bit gray"
    elif image.mode != "RGB":
        kind = _MODE_NAMES.get(image.mode, image.mode)
    elif "transparency" in image.info:
        kind = "RGB with a transparent colour"
    elif _has_more_than_8_bits(image):
        kind = "16-bit RGB"
    # A JPEG of a phone may carry a second view or a gain map behind the picture (MPO): the first one counts.
    elif image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        kind = "animated or many-page"
    if kind:
        raise LicError(f"{kind} pictures are not supported by this version, only 8-bit RGB: convert it first")


def _has_more_than_8_bits(image: Image.Image) -> bool:
    """Whether the file holds more than Pillow's mode RGB: it reduces 16-bit samples without a word."""
    for tile in getattr(image, "tile", None) or ():
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if args and isinstance(args[0], str) and ";16" in args[0]:
            return True
        if tile[0] in ("ppm", "ppm_plain") and args[-1] > 255:
            return True
    return False


_pillows_limit = threading.Lock()


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Lift Pillow's limit of pixels, a setting of the whole process, while a picture is read.

    The caller checks the size before any pixel is decoded; otherwise ``--max-pixels`` could not go beyond it.
    """
    with _pillows_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _has_tags(data: bytes) -> bool:
    exif = Image.Exif()
    try:
        exif.load(data)
        return bool(exif)
    except Exception:  # Pillow raises SyntaxError, struct.error and more on damaged EXIF
        return True


def _oriented(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF must not cost the picture; without a readable tag it is upright
        return image
