"""Other codecs on the same pictures, through Pillow."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from PIL import __version__ as pillow_version

from lic.bench.bdrate import Curve
from lic.bench.metrics import Pixels, ms_ssim, psnr
from lic.bench.pictures import Picture
from lic.errors import LicError


@dataclass(frozen=True)
class Peer:
    """A codec of Pillow with its settings and the qualities to measure."""

    name: str
    format: str
    options: Mapping[str, Any]
    qualities: tuple[int, ...]
    feature: str  # Pillow's name for the library
    library: str  # whose version goes into the source of the curve

    def available(self) -> bool:
        return bool(features.check(self.feature))

    def source(self) -> str:
        """What made the numbers: library, version, settings."""
        options = " ".join(f"{key}={value}" for key, value in self.options.items())
        return f"Pillow {pillow_version}, {self.library} {_version(self.feature)}, {options}"

    def encode(self, rgb: Pixels, quality: int) -> bytes:
        """The whole file of an image (H, W, 3). Raises LicError if the codec is missing or refuses it."""
        if not self.available():
            raise LicError(f"{self.name}: this Pillow does not have it")
        buffer = io.BytesIO()
        try:
            Image.fromarray(rgb).save(buffer, format=self.format, quality=quality, **self.options)
        except (OSError, ValueError) as error:
            raise LicError(f"{self.name}: {error}") from error
        return buffer.getvalue()

    def decode(self, data: bytes) -> Pixels:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


PEERS = (
    Peer("JPEG 4:2:0", "JPEG", {"subsampling": "4:2:0", "optimize": True},
         (5, 10, 20, 30, 45, 60, 75, 85, 92, 96), "jpg", "libjpeg"),
    Peer("JPEG 4:4:4", "JPEG", {"subsampling": "4:4:4", "optimize": True},
         (5, 10, 20, 30, 45, 60, 75, 85, 92, 96), "jpg", "libjpeg"),
    Peer("WebP", "WEBP", {"method": 6},
         (0, 5, 20, 40, 60, 75, 85, 92, 97), "webp", "libwebp"),
    Peer("AVIF 4:4:4", "AVIF", {"subsampling": "4:4:4", "speed": 4, "max_threads": 1},
         (10, 20, 30, 40, 50, 60, 70, 80, 90), "avif", "libavif"),
)  # fmt: skip


@dataclass(frozen=True)
class PeerRow:
    """One picture through one peer at one quality."""

    image: str
    image_sha256: str
    peer: str
    quality: int
    source: str
    bytes: int
    bpp: float
    psnr: float  # dB
    ms_ssim: float


class PeerCache:
    """Peer measurements kept in a JSON file, found again by picture, settings and library versions."""

    def __init__(self, path: Path) -> None:
        """Reads ``path`` if it is there; a file that is not such a cache is measured anew."""
        self.path = path
        self._rows: dict[tuple[str, str, int, str], PeerRow] = {}
        try:
            rows = [PeerRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            rows = []
        for row in rows:
            self._rows[row.image_sha256, row.peer, row.quality, row.source] = row

    def measure(self, peer: Peer, picture: Picture) -> list[PeerRow]:
        """Rows of one picture at all qualities of ``peer``. Raises LicError if the codec refuses it."""
        keys = [(picture.sha256, peer.name, quality, peer.source()) for quality in peer.qualities]
        missing = [key for key in keys if key not in self._rows]
        if missing:
            rgb = picture.load()
            for key in missing:
                self._rows[key] = _measure(peer, picture, rgb, key[2])
            self._save()
        return [self._rows[key] for key in keys]

    def _save(self) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in self._rows.values()], indent=0))
        os.replace(temporary, self.path)


def measure_peer(
    peer: Peer,
    pictures: Sequence[Picture],
    cache: PeerCache,
    on_picture: Callable[[], object] = lambda: None,
) -> Curve:
    """Means over ``pictures`` at each quality of ``peer``; ``on_picture`` is called after each picture.

    Raises LicError if a picture cannot be read or the codec refuses it.
    """
    rows = []
    for picture in pictures:
        rows.append(cache.measure(peer, picture))
        on_picture()
    table = np.array([[(row.bpp, row.psnr, row.ms_ssim) for row in image] for image in rows])
    bpp, psnrs, ms_ssims = (tuple(map(float, column)) for column in table.mean(axis=0).T)
    return Curve(peer.name, bpp, psnrs, ms_ssims, peer.source())


def _measure(peer: Peer, picture: Picture, rgb: Pixels, quality: int) -> PeerRow:
    data = peer.encode(rgb, quality)
    decoded = peer.decode(data)
    return PeerRow(
        picture.name, picture.sha256, peer.name, quality, peer.source(),
        len(data), len(data) * 8 / (rgb.shape[0] * rgb.shape[1]), psnr(rgb, decoded), ms_ssim(rgb, decoded),
    )  # fmt: skip


def _version(feature: str) -> str:
    if feature == "jpg" and (turbo := features.version("libjpeg_turbo")):
        return f"turbo {turbo}"
    return str(features.version(feature))
