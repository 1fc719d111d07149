"""Pillow's limits, settings of the whole process, out of the way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from PIL import Image, PngImagePlugin

from lic.container import METADATA_LIMIT

_lock = threading.Lock()
_readers = 0
_before: tuple[int | None, int] = (0, 0)


@contextlib.contextmanager
def without_pillows_limits() -> Iterator[None]:
    """Lift Pillow's limits while a picture is read whose size the caller checks before any pixel is decoded.

    Otherwise ``--max-pixels`` could not go beyond its limit of pixels, and a PNG with a profile of more than a
    megabyte would be refused. The first of several threads lifts them, the last one sets them back.
    """
    global _readers, _before
    with _lock:
        if _readers == 0:
            _before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, METADATA_LIMIT
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = _before
