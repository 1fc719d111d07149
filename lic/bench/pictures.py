"""The pictures of a benchmark: found, named, loaded as 8-bit RGB."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lic.bench.metrics import Pixels
from lic.errors import LicError, UsageError
from lic.images import PICTURE_SUFFIXES, picture_of, rgb_of

MAX_PIXELS = 1 << 30


@dataclass(frozen=True)
class Picture:
    """One picture on disk; ``sha256`` is that of the file."""

    path: Path
    sha256: str

    @property
    def name(self) -> str:
        return self.path.stem

    def load(self) -> Pixels:
        """uint8 (H, W, 3), upright. Raises LicError if it is not a picture that ``lic encode`` takes."""
        try:
            return rgb_of(picture_of(self.path.read_bytes(), max_pixels=MAX_PIXELS))
        except OSError as error:
            raise LicError(f"{self.path}: {error.strerror or error}") from error
        except LicError as error:
            raise LicError(f"{self.path}: {error}") from error


def find(paths: Sequence[Path]) -> list[Picture]:
    """Files as given and the pictures directly inside folders, in order, each once.

    Raises UsageError if a path does not exist or nothing was found.
    """
    found: dict[Path, Picture] = {}
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
        elif path.is_file():
            files = [path]
        else:
            raise UsageError(f"{path}: no such file or folder")
        for file in files:
            found.setdefault(file.resolve(), Picture(file, hashlib.sha256(file.read_bytes()).hexdigest()))
    if not found:
        raise UsageError("no pictures found in " + ", ".join(map(str, paths)))
    return list(found.values())
