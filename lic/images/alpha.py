"""Transparency: coded without loss in a section, and the colour that nobody sees under it (bitstream_spec.md, 7.2)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from lic.container import ALPHA, Section
from lic.errors import CorruptError, UnsupportedError
from lic.images.limits import without_pillows_limits

_CONSTANT, _PNG, _WEBP = 0, 1, 2  # methods
_WEBP_SIDE = 16383  # pixels
_BAND = 64  # rows at a time: memory of a large picture


def alpha_section(alpha: np.ndarray) -> Section:
    """``alpha``, uint8 or uint16 (H, W), in the smallest form there is."""
    if alpha.dtype == np.uint16 and not (alpha % 257).any():
        alpha = (alpha // 257).astype(np.uint8)
    if alpha.min() == alpha.max():
        sample = int(alpha.flat[0]).to_bytes(alpha.dtype.itemsize, "big")
        return Section(ALPHA, bytes([_CONSTANT]) + sample)
    forms = [bytes([_PNG]) + _file(Image.fromarray(alpha), "PNG", optimize=True)]
    if alpha.dtype == np.uint8 and max(alpha.shape) <= _WEBP_SIDE:
        gray = Image.fromarray(alpha).convert("RGB")
        forms.append(bytes([_WEBP]) + _file(gray, "WEBP", lossless=True, quality=100, method=6))
    return Section(ALPHA, min(forms, key=len))


def alpha_of(section: Section, width: int, height: int) -> np.ndarray:
    """uint8 or uint16 (H, W) of a section.

    Raises CorruptError if it is damaged or of another size, UnsupportedError if its method is reserved.
    """
    method, data = section.data[:1], section.data[1:]
    if method == bytes([_CONSTANT]) and len(data) in (1, 2):
        dtype = np.uint8 if len(data) == 1 else np.uint16
        return np.full((height, width), int.from_bytes(data, "big"), dtype)
    # Of PNG, what Pillow opens as L or I;16 without scaling; of WebP, what is lossless.
    if method == bytes([_PNG]) and data[24:26] in (b"\x08\0", b"\x10\0"):
        return _decoded(data, "PNG", width, height)
    if method == bytes([_WEBP]) and data[12:16] == b"VP8L":
        return _decoded(data, "WEBP", width, height)
    if section.data and section.data[0] > _WEBP:
        raise UnsupportedError(f"transparency of method {section.data[0]} is unknown: upgrade lic")
    raise CorruptError("damaged: the transparency is not of a known form")


def _decoded(data: bytes, format: str, width: int, height: int) -> np.ndarray:
    try:
        with without_pillows_limits(), Image.open(io.BytesIO(data), formats=[format]) as image:
            if image.size != (width, height):
                raise CorruptError(f"damaged: the transparency is of another size, {image.width}x{image.height}")
            samples = np.asarray(image)
    except (CorruptError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, IndexError and more
        raise CorruptError("damaged: the transparency does not decode") from error
    if samples.ndim == 3:
        samples = samples[..., 1]
    return np.ascontiguousarray(samples)


def _file(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def with_hidden_filled(colour: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """``colour`` (H, W, C) with a smooth continuation of the visible colours wherever ``alpha`` is 0.

    What was hidden there has no influence. The picture is halved until every pixel has visible ones below it,
    then doubled again, and each hidden pixel takes what its surroundings have become ("push-pull").
    """
    if alpha is None or alpha.all():
        return colour
    height, width, channels = colour.shape
    sums = np.zeros((-(-height // 2), -(-width // 2), channels + 1), np.float32)
    for top in range(0, height, _BAND):
        band = slice(top, min(top + _BAND, height))
        visible = (alpha[band] > 0)[..., None].astype(np.float32)
        sums[top // 2 : (band.stop + 1) // 2] = _halved(np.concatenate([colour[band] * visible, visible], axis=2))
    half = _filled(sums)
    filled = colour.copy()
    for top in range(0, height, _BAND):
        rows = np.arange(top, min(top + _BAND, height))
        hidden = alpha[rows] == 0
        if hidden.any():
            filled[rows[0] : rows[-1] + 1][hidden] = np.rint(_doubled(half, rows, np.arange(width)))[hidden]
    return filled


def _filled(sums: np.ndarray) -> np.ndarray:
    """(h, w, C), each the mean of the visible colours if there are any, else from its surroundings.

    ``sums`` (h, w, C + 1): the sums of visible colours and, last, their number.
    """
    colour, count = sums[..., :-1], sums[..., -1:]
    mean = colour / np.maximum(count, 1)
    if count.all() or sums.shape[:2] == (1, 1):
        return mean
    # Beyond the first level only whether a position knows a colour counts, or large areas would drown small ones.
    known = (count > 0).astype(np.float32)
    half = _filled(_halved(np.concatenate([mean * known, known], axis=2)))
    return np.where(count > 0, mean, _doubled(half, np.arange(sums.shape[0]), np.arange(sums.shape[1])))


def _halved(x: np.ndarray) -> np.ndarray:
    """Sums of 2 x 2 positions; (h, w, C) to (⌈h/2⌉, ⌈w/2⌉, C)."""
    x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)))
    x = x[0::2] + x[1::2]
    return x[:, 0::2] + x[:, 1::2]


def _doubled(half: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """These rows and columns of ``half`` (h, w, C) at twice its size, linearly interpolated."""

    def along(x: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
        near = positions // 2
        far = np.clip(near + np.where(positions % 2, 1, -1), 0, x.shape[axis] - 1)
        return 0.75 * np.take(x, near, axis) + 0.25 * np.take(x, far, axis)

    return along(along(half, rows, 0), columns, 1).astype(np.float32)
