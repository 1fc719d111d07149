"""EXIF that fits the upright picture, and metadata as files spell it."""

from __future__ import annotations

import re
import struct

from PIL import Image

PREFIX = b"Exif\0\0"
ORIENTATION = 0x0112
_SHORT = 3  # type of a tag
_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH = 0x0201, 0x0202
# A TIFF file's directory describes its pixels; only these of its tags, and these sub-directories, describe the picture.
_OF_A_TIFF = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_IFDS_OF_A_TIFF = (0x8769, 0x8825)


def exif_of_tiff(image: Image.Image) -> bytes:
    """What a TIFF file says in its own tags, as EXIF; empty if nothing."""
    source, exif = image.getexif(), Image.Exif()
    exif.update({tag: source[tag] for tag in _OF_A_TIFF if tag in source})
    exif.update({tag: dict(ifd) for tag in _IFDS_OF_A_TIFF if (ifd := source.get_ifd(tag))})
    return exif.tobytes() if exif else b""


def upright_exif(exif: bytes) -> bytes | None:
    """``exif`` with the orientation 1 and without its thumbnail, which nobody has turned; None if that is all.

    Patched in place, because a camera's own notes hold offsets that moving would break. Raises ValueError when
    it is damaged.
    """
    data = bytearray(exif.removeprefix(PREFIX))
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[bytes(data[:4])]
        (first,) = struct.unpack_from(order + "I", data, 4)
        tags, link = _directory(data, order, first)
        if ORIENTATION in tags:
            struct.pack_into(order + "HIHH", data, tags[ORIENTATION] + 2, _SHORT, 1, 1, 0)
        second = struct.unpack_from(order + "I", data, link)[0] if link + 4 <= len(data) else 0
        if second:
            struct.pack_into(order + "I", data, link, 0)
            _blank_thumbnail(data, order, second)
    except (KeyError, struct.error) as error:
        raise ValueError("damaged EXIF") from error
    return bytes(data) if set(tags) - {ORIENTATION} else None


def of_raw_profile(text: str) -> bytes:
    """EXIF as ImageMagick put it into a text of a PNG before PNG had a chunk for it. ValueError if damaged."""
    return bytes.fromhex("".join(text.strip("\n").split("\n")[2:]))  # below its name and its length


def upright_xmp(xmp: bytes) -> bytes:
    """``xmp`` with the orientation 1, if it holds one."""
    return re.sub(rb"""(tiff:Orientation(?:\s*=\s*["']|>))[2-8]""", rb"\g<1>1", xmp)


def _directory(data: bytes | bytearray, order: str, offset: int) -> tuple[dict[int, int], int]:
    """Where each tag's entry is, and where the link to the next directory is."""
    (count,) = struct.unpack_from(order + "H", data, offset)
    entries = range(offset + 2, offset + 2 + 12 * count, 12)
    tags = {struct.unpack_from(order + "H", data, entry)[0]: entry for entry in entries}
    return tags, offset + 2 + 12 * count


def _blank_thumbnail(data: bytearray, order: str, offset: int) -> None:
    """Zeros, which compress to nothing, where the second directory and its thumbnail are. Lengths stay."""
    tags, end = _directory(data, order, offset)
    ranges = [(offset, end + 4)]
    if _THUMBNAIL_OFFSET in tags and _THUMBNAIL_LENGTH in tags:
        start, size = (
            struct.unpack_from(order + "I", data, tags[tag] + 8)[0] for tag in (_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH)
        )
        ranges.append((start, start + size))
    for start, stop in ranges:
        stop = min(stop, len(data))
        data[start:stop] = bytes(max(0, stop - start))
