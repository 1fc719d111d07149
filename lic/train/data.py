"""Training pictures: tar shards or folders, decoded once to uint8 and kept on the device; crops are cut there."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lic.errors import LicError

SUFFIXES = {".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_pictures(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 (H, W, 3)) of the pictures in a tar file, a folder or a file; unreadable ones are skipped."""
    if source.suffix == ".tar":
        with tarfile.open(source) as tar:
            for member in tar:
                file = tar.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
                if file is not None:
                    yield from _decoded(member.name, file.read())
    else:
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        for path in files:
            if path.suffix.lower() in SUFFIXES:
                yield from _decoded(str(path), path.read_bytes())


def _decoded(name: str, data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    yield name, np.asarray(picture)


class Pool:
    """Pictures in one flat uint8 tensor (pixels, 3), cropped by index arithmetic so that nothing leaves the device."""

    def __init__(self, device: torch.device, crop_limit: int) -> None:
        self.device, self.crop_limit = device, crop_limit
        self.flat = torch.empty(0, 3, dtype=torch.uint8, device=device)
        self.sizes = torch.empty(0, 3, dtype=torch.int64, device=device)  # start, height, width

    def add(self, pictures: list[np.ndarray]) -> None:
        """Append pictures (H, W, 3); those smaller than the largest crop are left out."""
        kept = [p for p in pictures if min(p.shape[:2]) >= self.crop_limit]
        if not kept:
            return
        pixels = [torch.from_numpy(p.copy()).reshape(-1, 3).to(self.device) for p in kept]
        counts = torch.tensor([0] + [len(p) for p in pixels[:-1]]).cumsum(0) + len(self.flat)
        shape = torch.tensor([p.shape[:2] for p in kept])
        sizes = torch.cat([counts[:, None], shape], dim=1).to(self.device)
        self.flat, self.sizes = torch.cat([self.flat, *pixels]), torch.cat([self.sizes, sizes])

    def crops(self, batch: int, side: int, generator: torch.Generator) -> Tensor:
        """Random crops with flips and transpositions, uint8 (batch, side, side, 3)."""
        area = (self.sizes[:, 1] * self.sizes[:, 2]).float()
        start, height, width = self.sizes[torch.multinomial(area, batch, True, generator=generator)].unbind(1)
        u = torch.rand(5, batch, generator=generator, device=self.device)
        top = (u[0] * (height - side + 1)).long()
        left = (u[1] * (width - side + 1)).long()
        a = torch.arange(side, device=self.device)
        rows = torch.where(u[2, :, None] < 0.5, a, side - 1 - a) + top[:, None]
        columns = torch.where(u[3, :, None] < 0.5, a, side - 1 - a) + left[:, None]
        index = start[:, None, None] + rows[:, :, None] * width[:, None, None] + columns[:, None, :]
        index = torch.where(u[4, :, None, None] < 0.5, index, index.transpose(1, 2))
        return self.flat[index]


class Pictures:
    """Two pools, the pictures as they are and scaled down by 0.4 to 0.8, filled by a background thread.

    The scaled ones are free of compression artefacts and serve the highest qualities. Sources are files or folders;
    tar files that appear later in a folder are read when they are there.
    """

    def __init__(
        self, sources: list[Path], device: torch.device, crop_limit: int, seed: int, watch: bool = True
    ) -> None:
        self.pools = (Pool(device, crop_limit), Pool(device, crop_limit))
        self.count = 0
        self._sources, self._random = sources, np.random.default_rng(seed)
        self._ready: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        self._lock = threading.Lock()
        self._done: set[Path] = set()
        self._watch = watch
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Block until the first pictures are there. Raises LicError if there are none."""
        while not self._ready and (self._thread.is_alive() and not (self._watch and self._idle)):
            time.sleep(0.1)
        self.refresh()
        if any(len(pool.sizes) == 0 for pool in self.pools):
            raise LicError("no pictures large enough for training in " + ", ".join(map(str, self._sources)))

    def refresh(self) -> None:
        """Take over what the thread has read. Called between steps."""
        with self._lock:
            ready, self._ready = self._ready, []
        for plain, scaled in ready:
            self.count += len(plain)
            self.pools[0].add(plain)
            self.pools[1].add(scaled)

    _idle = False

    def _fill(self) -> None:
        while True:
            for path in self._pending():
                self._idle = False
                self._done.add(path)
                self._read(path)
            self._idle = True
            if not self._watch:
                return
            time.sleep(2)

    def _pending(self) -> list[Path]:
        found: list[Path] = []
        for source in self._sources:
            tars = sorted(source.glob("*.tar")) if source.is_dir() else []
            found += tars or [source]
        return [path for path in found if path not in self._done]

    def _read(self, path: Path) -> None:
        plain: list[np.ndarray] = []
        scaled: list[np.ndarray] = []
        for _, picture in read_pictures(path):
            plain.append(picture)
            factor = self._random.uniform(0.4, 0.8)
            size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
            scaled.append(np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)))
        with self._lock:
            self._ready.append((plain, scaled))
