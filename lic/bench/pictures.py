"""The pictures of a benchmark: found, named, loaded as 8-bit RGB."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lic.bench.metrics import Pixels
from lic.errors import LicError, UsageError

SUFFIXES = frozenset((".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg", ".avif"))


@dataclass(frozen=True)
class Picture:
    """One picture on disk; ``sha256`` is that of the file."""

    path: Path
    sha256: str

    @property
    def name(self) -> str:
        return self.path.stem

    def load(self) -> Pixels:
        """uint8 (H, W, 3), upright, without alpha. Raises LicError if it is not an 8-bit picture."""
        try:
            with Image.open(self.path) as image:
                if image.mode[0] in "IF":
                    raise LicError(f"{self.path}: more than 8 bits per sample; only 8-bit RGB is measured")
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise LicError(f"{self.path}: cannot read this picture ({error})") from error


def find(paths: Sequence[Path]) -> list[Picture]:
    """Files as given and the pictures directly inside folders, in order, each once.

    Raises UsageError if a path does not exist or nothing was found.
    """
    found: dict[Path, Picture] = {}
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files = [path]
        else:
            raise UsageError(f"{path}: no such file or folder")
        for file in files:
            found.setdefault(file.resolve(), Picture(file, hashlib.sha256(file.read_bytes()).hexdigest()))
    if not found:
        raise UsageError("no pictures found in " + ", ".join(map(str, paths)))
    return list(found.values())
