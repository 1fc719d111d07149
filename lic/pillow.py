"""``.lic`` in Pillow: ``import lic.pillow``, then ``Image.open("x.lic")`` and ``im.save("x.lic", quality=50)``.

Opening reads the header and the metadata; torch is imported when the pixels are needed. ``save`` takes ``quality``
(0..100) or ``target``, ``tune``, ``effort``, ``effort_seconds``, ``strip``, ``model`` and ``device`` as
:func:`lic.encode`, and ``icc_profile``, ``exif`` and ``xmp`` in place of what the picture carries. Damaged files raise
OSError, as Pillow's own formats do.
"""

from __future__ import annotations

import functools
import os
import threading
from io import BytesIO
from typing import IO, Any

from PIL import Image, ImageFile

from lic import api, container
from lic.errors import LicError

_SAVE_OPTIONS = ("quality", "target", "tune", "effort", "effort_seconds", "strip", "model", "device")
_lock = threading.Lock()  # pictures may load in several threads, a codec is for one


@functools.cache
def _decoder() -> api.Codec:
    """One for all pictures, so that each model is loaded once."""
    return api.Codec()


class LicImageFile(ImageFile.ImageFile):
    """An opened file, in the mode that :meth:`lic.Codec.decode` gives."""

    format = "LIC"
    format_description = "Learned image codec"

    def _open(self) -> None:
        assert self.fp is not None
        self._data: bytes | None = self.fp.read()
        try:
            parsed = container.parse(self._data, max_pixels=None)
            metadata = container.metadata_of(parsed.sections)
        except LicError as error:
            raise OSError(str(error)) from error
        header = parsed.header
        alpha = any(section.kind == container.ALPHA for section in parsed.sections)
        self._size = (header.width, header.height)
        if header.gray and header.deep and not alpha:
            self._mode = "I;16"
        else:
            self._mode = ("L" if header.gray else "RGB") + "A" * alpha
        names = {"icc": "icc_profile", "exif": "exif", "xmp": "xmp"}
        self.info.update({names[kind]: value for kind, value in metadata.as_dict().items()})
        self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, self.mode)]

    def load(self) -> Any:
        if self._data is not None and self.tile:
            try:
                with _lock:
                    pixels = _decoder().decode(self._data).tobytes()
            except LicError as error:
                raise OSError(str(error)) from error
            self._data = None
            if self.fp is not None and self._exclusive_fp:
                self.fp.close()
            self.fp = BytesIO(pixels)
        return super().load()

    def load_seek(self, pos: int) -> None:
        """Nothing: the pixels are all that ``fp`` holds by then."""


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(container.MAGIC)


def _save(image: Image.Image, fp: IO[bytes], filename: str | bytes | os.PathLike[str]) -> None:
    options: dict[str, Any] = dict(image.encoderinfo)
    shown = image.copy()
    for name in ("icc_profile", "exif", "xmp"):
        if name in options:
            value = options.pop(name)
            shown.info[name] = value.tobytes() if isinstance(value, Image.Exif) else value
    allowed = {name: options[name] for name in _SAVE_OPTIONS if name in options}
    try:
        fp.write(api.encode(shown, **allowed))
    except LicError as error:
        raise OSError(str(error)) from error


Image.register_open(LicImageFile.format, LicImageFile, _accept)
Image.register_save(LicImageFile.format, _save)
Image.register_extension(LicImageFile.format, ".lic")
Image.register_mime(LicImageFile.format, "image/x-lic")
