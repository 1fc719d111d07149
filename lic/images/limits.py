"""Pillow's limit of pixels, a setting of the whole process, out of the way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from PIL import Image

_lock = threading.RLock()


@contextlib.contextmanager
def without_pillows_limit() -> Iterator[None]:
    """Lift Pillow's limit while a picture is read whose size the caller checks before any pixel is decoded.

    Otherwise ``--max-pixels`` could not go beyond it.
    """
    with _lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
