"""Files with 16 bits per sample. Pillow writes them for gray alone."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from lic.images.picture import Picture

_ROWS = 64  # filtered at a time: memory of a large picture


def ppm16(picture: Picture) -> bytes:
    """PPM, or PGM for gray."""
    kind = b"P5" if picture.mode == "L" else b"P6"
    return b"%b\n%d %d\n65535\n" % (kind, picture.width, picture.height) + picture.colour.astype(">u2").tobytes()


def png16(picture: Picture) -> bytes:
    """PNG, each row with the one filter of five whose output has the smallest sum of magnitudes."""
    colour_type = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}[picture.mode]
    compressor = zlib.compressobj(6)
    pixels = b"".join(map(compressor.compress, _filtered(picture))) + compressor.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", picture.width, picture.height, 16, colour_type, 0, 0, 0))]
    metadata = picture.metadata
    if metadata.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata.icc, 9)))
    if metadata.xmp:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp))
    if metadata.exif:
        chunks.append((b"eXIf", metadata.exif))
    chunks += [(b"IDAT", pixels[at : at + 2**30]) for at in range(0, len(pixels), 2**30)]
    chunks.append((b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _filtered(picture: Picture) -> Iterator[bytes]:
    """Rows of a PNG, some at a time: the number of the filter, then the filtered bytes."""
    samples = picture.to_array()
    pixel = 2 * (samples.shape[2] if samples.ndim == 3 else 1)  # bytes
    above = np.zeros((1, picture.width * pixel), np.uint8)
    for top in range(0, picture.height, _ROWS):
        x = samples[top : top + _ROWS].astype(">u2").view(np.uint8).reshape(-1, picture.width * pixel)
        b = np.concatenate([above, x[:-1]]).astype(np.int16)
        a, c = (np.pad(rows, ((0, 0), (pixel, 0)))[:, :-pixel] for rows in (x.astype(np.int16), b))
        p = a + b - c
        to_a, to_b, to_c = abs(p - a), abs(p - b), abs(p - c)
        paeth = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
        choices = np.stack([x - prediction.astype(np.uint8) for prediction in (0 * a, a, b, (a + b) // 2, paeth)])
        cost = np.minimum(choices, 256 - choices.astype(np.int16)).sum(axis=2)
        best = cost.argmin(axis=0)
        rows = np.concatenate([best[:, None].astype(np.uint8), choices[best, np.arange(len(x))]], axis=1)
        above = x[-1:]
        yield rows.tobytes()


def tiff16(picture: Picture) -> bytes:
    """TIFF: one strip, Deflate with horizontal differences."""
    samples = picture.to_array().reshape(picture.height, picture.width, -1)
    differences = samples.copy()
    differences[:, 1:] -= samples[:, :-1]
    strip = zlib.compress(differences.astype("<u2").tobytes(), 6)
    channels = samples.shape[2]
    tags: dict[int, Any] = {
        256: picture.width,
        257: picture.height,
        258: (16,) * channels,
        259: 8,  # Deflate
        262: 1 if picture.colour.shape[2] == 1 else 2,  # black is zero, or RGB
        277: channels,
        278: picture.height,  # rows of a strip
        279: len(strip),
        317: 2,  # horizontal differences
    }
    if picture.alpha is not None:
        tags[338] = 2  # straight alpha
    metadata = picture.metadata
    if metadata.icc:
        tags[34675] = metadata.icc
    if metadata.xmp:
        tags[700] = metadata.xmp
    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    if metadata.exif:
        exif = Image.Exif()
        exif.load(metadata.exif)
        directory.update({tag: value for tag, value in exif.items() if tag not in _OF_THE_PIXELS})
        directory.update({tag: dict(ifd) for tag in (0x8769, 0x8825) if (ifd := exif.get_ifd(tag))})
    directory.update(tags)
    directory[273] = 0  # where the strip is: Pillow adds the length of what it writes
    out = io.BytesIO()
    directory.save(out)
    return out.getvalue() + strip


_OF_THE_PIXELS = (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 338)
