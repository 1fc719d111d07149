"""16-bit samples of pictures with several channels, which Pillow reduces to 8 bits without a word.

Pillow has no mode for them, but its decoders take a "raw mode" that says which byte of a sample to keep. A file is
decoded twice, once for the high bytes and once, under the name of the other byte order, for the low ones.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from lic.errors import LicError

_BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 258, 284  # tags of TIFF
_PPM = ("ppm", "ppm_plain")
_16_BITS = re.compile(";16[LBN]$")  # without the last letter: 5, 6 and 5 bits
_OTHER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


def is_deep(image: Image.Image, tiles: list[Any]) -> bool:
    """Whether an opened file holds more than 8 bits a sample. ``tiles``: of Pillow, before it loads.

    Raises LicError where Pillow would read wrong samples.
    """
    if _is_planar(image):
        straight = {raw_mode(tile) for tile in tiles} == set(image.mode) and image.mode in ("RGB", "RGBA")
        if not straight and (_codec(tiles[0]) != "libtiff" or "RGBa" in raw_mode(tiles[0])):
            raise LicError("a TIFF of 16 bits of this kind with a plane for each channel is not supported: convert it")
        return True
    return any(_16_BITS.search(raw_mode(tile)) or _is_deep_ppm(tile) for tile in tiles)


def _is_deep_ppm(tile: Any) -> bool:
    """A PBM's last argument is no number but the letter of its raw mode."""
    return _codec(tile) in _PPM and isinstance(tile[3][-1], int) and tile[3][-1] > 255


def deep_samples(data: bytes, image: Image.Image, tiles: list[Any]) -> np.ndarray | None:
    """uint16 (H, W, 2..4) of the file ``data``, or None where only Pillow's 8 bits are to be had.

    ``image`` is the loaded picture, ``tiles`` what it had before.
    """
    raw_modes = {raw_mode(tile) for tile in tiles}
    if _is_planar(image):
        return None if _codec(tiles[0]) == "libtiff" else _planes(data, image)
    if len(tiles) == 1 and _codec(tiles[0]) == "ppm" and image.mode == "RGB":
        return _ppm(data, image.size, offset=tiles[0][2], white=tiles[0][3][-1])
    if raw_modes == {"LA;16B"}:
        both = _again(data, image, "RGBA", lambda _: "RGBA")  # the four bytes of a pixel as they are
        return both[..., 0::2] * np.uint16(256) + both[..., 1::2]
    if raw_modes and raw_modes <= {f"{mode};16{end}" for mode in ("RGB", "RGBA", "RGBX") for end in _OTHER}:
        low = _again(data, image, image.mode, lambda raw: raw[:-1] + _OTHER[raw[-1]])
        return np.asarray(image).astype(np.uint16) * np.uint16(256) + low
    return None


def _is_planar(image: Image.Image) -> bool:
    """Whether it is a TIFF of more than 8 bits with a plane for each channel."""
    tags: Any = getattr(image, "tag_v2", {})
    return tags.get(_PLANAR_CONFIGURATION) == 2 and max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8


def _codec(tile: Any) -> str:
    return str(tile[0])


def raw_mode(tile: Any) -> str:
    """How the samples of one of Pillow's tiles lie in the file, or an empty string."""
    args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    return args[0] if args and isinstance(args[0], str) else ""


def _again(data: bytes, image: Image.Image, mode: str, change: Callable[[str], str]) -> np.ndarray:
    """The samples of the file, uint16, decoded with other raw modes."""
    other: Any = Image.open(io.BytesIO(data), formats=[image.format or ""])
    other._mode = mode
    tiles = []
    for tile in other.tile:
        changed = change(raw_mode(tile))
        args = (changed, *tile[3][1:]) if isinstance(tile[3], tuple) else changed
        tiles.append(tile._replace(args=args))
    other.tile = tiles
    return np.asarray(other).astype(np.uint16)


def _planes(data: bytes, image: Image.Image) -> np.ndarray:
    """The samples of an uncompressed TIFF of 16 bits, read plane by plane as if each were a gray picture."""
    planes = []
    for band in image.mode:
        other: Any = Image.open(io.BytesIO(data), formats=["TIFF"])
        other._mode = "I;16"
        order = "I;16B" if data[:2] == b"MM" else "I;16"
        tiles = [tile for tile in other.tile if raw_mode(tile) == band]
        other.tile = [tile._replace(args=(order, *tile[3][1:])) for tile in tiles]
        planes.append(np.asarray(other))
    return np.stack(planes, axis=2)


def _ppm(data: bytes, size: tuple[int, int], *, offset: int, white: int) -> np.ndarray:
    width, height = size
    if len(data) - offset < 6 * width * height:
        raise LicError("cannot read the picture: it is truncated")
    samples = np.frombuffer(data, ">u2", 3 * width * height, offset).reshape(height, width, 3)
    if white == 65535:
        return samples.astype(np.uint16)
    return np.rint(samples.clip(max=white) * np.float32(65535 / white)).astype(np.uint16)
