"""Training pictures: tar shards or folders, decoded once to uint8 and kept on the device; crops are cut there."""

from __future__ import annotations

import io
import logging
import os
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lic.errors import LicError
from lic.quality import MAX_CODE
from lic.train.chroma import soften_chroma
from lic.train.patterns import draw_patterns

log = logging.getLogger(__name__)

CHROMA_PART, PATTERN_PART = 0.7, 0.05  # shares of crops with soft chroma and with a pattern, if nothing else is said
SUFFIXES = {".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_files(source: Path) -> Iterator[bytes]:
    """The contents of the picture files in a tar file or a folder, or of a single file."""
    if source.suffix == ".tar":
        with tarfile.open(source) as tar:
            for member in tar:
                file = tar.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
                if file is not None:
                    yield file.read()
    else:
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.suffix.lower() in SUFFIXES:
                yield path.read_bytes()


def decode(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3), or None if the data is no whole picture."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def decode_with_smaller(data: bytes, factor: float) -> tuple[np.ndarray, np.ndarray] | None:
    """A picture and the same scaled by ``factor``, or None."""
    picture = decode(data)
    if picture is None:
        return None
    size = (max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
    return picture, np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


class Pool:
    """Pictures in one flat uint8 tensor (pixels, 3), cropped by index arithmetic so that nothing leaves the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat = torch.empty(0, 3, dtype=torch.uint8, device=device)
        self.sizes = torch.empty(0, 3, dtype=torch.int64, device=device)  # start, height, width

    def add(self, pictures: list[np.ndarray]) -> None:
        """Append pictures (H, W, 3)."""
        if not pictures:
            return
        pixels = [torch.from_numpy(p.copy()).reshape(-1, 3).to(self.device) for p in pictures]
        counts = torch.tensor([0] + [len(p) for p in pixels[:-1]]).cumsum(0) + len(self.flat)
        shape = torch.tensor([p.shape[:2] for p in pictures])
        sizes = torch.cat([counts[:, None], shape], dim=1).to(self.device)
        self.flat, self.sizes = torch.cat([self.flat, *pixels]), torch.cat([self.sizes, sizes])

    def crops(self, batch: int, side: int, generator: torch.Generator) -> Tensor:
        """Random crops with flips and transpositions, uint8 (batch, side, side, 3), from pictures large enough."""
        area = (self.sizes[:, 1] * self.sizes[:, 2] * (self.sizes[:, 1:].amin(1) >= side)).float()
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

    def __init__(self, sources: list[Path], device: torch.device, seed: int, watch: bool = True) -> None:
        self.pools = (Pool(device), Pool(device))
        self.count = 0
        self._sources, self._random = sources, np.random.default_rng(seed)
        self._ready: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        self._lock = threading.Lock()
        self._done: set[Path] = set()
        self._watch = watch
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def wait(self, side: int) -> None:
        """Block until the first pictures are there. Raises LicError if none gives a crop of ``side`` pixels."""
        while not self._ready and (self._thread.is_alive() and not (self._watch and self._idle)):
            time.sleep(0.1)
        self.refresh()
        if not all((pool.sizes[:, 1:] >= side).all(1).any() for pool in self.pools):
            where = ", ".join(map(str, self._sources))
            raise LicError(f"no pictures in {where} that are {side} pixels a side, also when scaled by 0.4 to 0.8")

    def wait_for_all(self, side: int) -> None:
        """As :meth:`wait`, until everything is there. Only where nothing is watched."""
        self._thread.join()
        self.wait(side)

    def refresh(self) -> None:
        """Take over what the thread has read. Called between steps."""
        with self._lock:
            ready, self._ready = self._ready, []
        for plain, scaled in ready:
            self.count += len(plain)
            self.pools[0].add(plain)
            self.pools[1].add(scaled)

    def close(self) -> None:
        """Stop reading. A thread that lives on while the interpreter shuts down can abort the process."""
        self._closed.set()
        self._thread.join()

    _idle = False

    def _fill(self) -> None:
        while True:
            for path in self._pending():
                if self._closed.is_set():
                    return
                self._idle = False
                self._done.add(path)
                try:
                    self._read(path)
                except (OSError, tarfile.TarError) as error:
                    log.warning("%s: left out: %s", path, str(error).partition("\n")[0])
            self._idle = True
            if not self._watch or self._closed.wait(2):
                return

    def _pending(self) -> list[Path]:
        found: list[Path] = []
        for source in self._sources:
            tars = sorted(source.glob("*.tar")) if source.is_dir() else []
            found += tars or [source]
        return [path for path in found if path not in self._done]

    def _read(self, path: Path) -> None:
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as decoders:
            pending = [
                decoders.submit(decode_with_smaller, data, self._random.uniform(0.4, 0.8)) for data in read_files(path)
            ]
            pairs = []
            for task in pending:
                if self._closed.is_set():
                    decoders.shutdown(cancel_futures=True)
                    return
                if (pair := task.result()) is not None:
                    pairs.append(pair)
        with self._lock:
            self._ready.append(([plain for plain, _ in pairs], [scaled for _, scaled in pairs]))


def sample(
    pictures: Pictures,
    batch: int,
    crop: int,
    generator: torch.Generator,
    *,
    chroma_part: float = CHROMA_PART,
    pattern_part: float = PATTERN_PART,
) -> tuple[Tensor, Tensor]:
    """A batch (B, crop, crop, 3) in [-0.5, 0.5], half of it from scaled-down pictures, and its quality codes (B,).

    The share ``chroma_part`` of it has its chroma softened (:func:`soften_chroma`), and the share ``pattern_part`` has
    patterns drawn over (:func:`draw_patterns`).
    """
    half = batch // 2
    crops = [pool.crops(n, crop, generator) for pool, n in zip(pictures.pools, (half, batch - half), strict=True)]
    x = torch.cat(crops)
    for part, change in ((chroma_part, soften_chroma), (pattern_part, draw_patterns)):
        chosen = (torch.rand(batch) < part).nonzero()[:, 0]  # not on the device, which need not be waited for so
        if len(chosen) > 0:
            x[chosen] = change(x[chosen], generator)
    u = torch.rand(batch, generator=generator, device=generator.device)
    u[:half] *= 0.75  # lightly compressed originals would teach the highest qualities to drop detail
    return x.float() / 255 - 0.5, torch.round(u * MAX_CODE)
