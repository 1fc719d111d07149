"""A model on real files: sizes from the file system, pixels from the decoded file, times, checks."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lic.bench.codec import Codec
from lic.bench.metrics import Pixels, ms_ssim, psnr
from lic.bench.pictures import Picture
from lic.errors import LicError
from lic.quality import quality_of

# Above the model's own estimate, outside headers: what the range coder and its tables may cost.
CODER_OVERHEAD, BYTES_PER_STREAM = 0.01, 2


@dataclass(frozen=True)
class Row:
    """One picture at one quality. Seconds are wall time with the model loaded.

    ``compute``: from pixels to streams or back. ``total``: from the picture file to the ``.lic`` file, and
    from the ``.lic`` file to pixels. ``peak_memory_mb`` is the highest of the whole process so far (10^6 bytes),
    with encoder, decoder and metrics, None where the system does not tell. ``problems`` says which checks failed.
    """

    image: str
    image_sha256: str
    width: int
    height: int
    quality: float
    quality_code: int
    bytes: int
    bpp: float
    psnr: float
    ms_ssim: float
    estimated_bits: float
    framing_bytes: int
    streams: int
    encode_compute_s: float
    encode_total_s: float
    decode_compute_s: float
    decode_total_s: float
    peak_memory_mb: float | None
    symbols_sha256: str
    model: str
    weights_sha256: str
    device: str
    threads: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A picture that could not be encoded or decoded at all."""

    image: str
    quality: float
    message: str


class RowStore:
    """Rows in a JSON-lines file, so that an interrupted run continues where it stopped."""

    def __init__(self, path: Path) -> None:
        """Reads ``path`` if it is there; lines that are not whole rows are passed over."""
        self.path = path
        self._rows: dict[tuple[object, ...], Row] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # A line that a killed run left half written must not swallow the next one.
        self._separator = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                row = Row(**{**entry, "problems": tuple(entry["problems"])})
            except (ValueError, TypeError, KeyError):
                continue  # the last line of a run that was killed, or of another version
            self._rows[_key(row.image_sha256, row.quality_code, row)] = row

    def get(self, picture: Picture, quality_code: int, codec: Codec) -> Row | None:
        """The row of the same picture, quality, weights, device and thread count, if its checks passed."""
        row = self._rows.get(_key(picture.sha256, quality_code, codec))
        return None if row is None or row.problems else row

    def add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._separator + json.dumps(asdict(row)) + "\n")
        self._separator = ""
        self._rows[_key(row.image_sha256, row.quality_code, row)] = row


def measure(
    codec: Codec,
    pictures: Sequence[Picture],
    quality_codes: Sequence[int],
    folder: Path,
    on_row: Callable[[Row | Failure, bool], None] = lambda row, reused: None,
) -> tuple[list[Row], list[Failure]]:
    """Every picture at every quality through a ``.lic`` file under ``folder``.

    Rows of an earlier run in ``folder`` are taken over (``on_row`` then hears ``reused=True``). What a
    LicError stops becomes a Failure and the run goes on.
    """
    store = RowStore(folder / "measurements.jsonl")
    rows: list[Row] = []
    failures: list[Failure] = []
    warm = False
    for picture in pictures:
        for code in quality_codes:
            row = store.get(picture, code, codec)
            reused = row is not None
            try:
                if row is None:
                    if not warm:
                        _warm_up(codec, picture.load(), code)
                        warm = True
                    row = _measure(codec, picture, code, folder)
                    store.add(row)
            except LicError as error:
                failures.append(Failure(picture.name, quality_of(code), str(error)))
                on_row(failures[-1], False)
                continue
            rows.append(row)
            on_row(row, reused)
    return rows, failures


def peak_memory_mb() -> float | None:
    """The largest resident size of this process so far, in 10^6 bytes; None on Windows."""
    try:
        # What getrusage says on Linux begins with the size of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # Linux counts in KiB


def environment(codec: Codec) -> dict[str, Any]:
    """What the numbers depend on beside the model: date, machine, versions, device, threads."""
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "device": codec.device,
        "threads": codec.threads,
    }
    for package in ("lic", "torch", "numpy", "pillow"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            result[package] = None
    if codec.device.startswith("cuda"):
        import torch

        result["gpu"] = torch.cuda.get_device_name(codec.device)
    return result


def row_fields() -> list[str]:
    """Column names of the CSV, in order."""
    return [field.name for field in fields(Row)]


def _key(image_sha256: str, quality_code: int, codec: Codec | Row) -> tuple[object, ...]:
    return image_sha256, quality_code, codec.weights_sha256, codec.device, codec.threads


def _warm_up(codec: Codec, rgb: Pixels, quality_code: int) -> None:
    """One small round trip: compiling the coder or starting a GPU is not the time of a picture."""
    corner = np.ascontiguousarray(rgb[:128, :128])
    codec.decode(codec.encode(corner, quality_code).container)


def _measure(codec: Codec, picture: Picture, quality_code: int, folder: Path) -> Row:
    quality = quality_of(quality_code)
    # Two folders may hold pictures of one name: part of the hash keeps their files apart.
    path = folder / "files" / f"q{quality:g}" / f"{picture.name}-{picture.sha256[:8]}.lic"
    path.parent.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    rgb = picture.load()
    encode_start = time.perf_counter()
    encoded = codec.encode(rgb, quality_code)
    encode_end = time.perf_counter()
    path.write_bytes(codec.pack(encoded.container))
    encode_total = time.perf_counter() - start

    start = time.perf_counter()
    container = codec.parse(path.read_bytes())
    decode_start = time.perf_counter()
    decoded = codec.decode(container)
    decode_end = time.perf_counter()

    if decoded.rgb.shape != rgb.shape:
        raise LicError(f"{path}: decoded to {decoded.rgb.shape}, expected {rgb.shape}")
    streams = [stream for tile in container.tiles for stream in tile]
    size = os.stat(path).st_size
    framing = size - sum(map(len, streams))
    height, width = rgb.shape[:2]
    return Row(
        image=picture.name,
        image_sha256=picture.sha256,
        width=width,
        height=height,
        quality=quality,
        quality_code=quality_code,
        bytes=size,
        bpp=size * 8 / (width * height),
        psnr=psnr(rgb, decoded.rgb),
        ms_ssim=ms_ssim(rgb, decoded.rgb),
        estimated_bits=float(encoded.estimated_bits),
        framing_bytes=framing,
        streams=len(streams),
        encode_compute_s=encode_end - encode_start,
        encode_total_s=encode_total,
        decode_compute_s=decode_end - decode_start,
        decode_total_s=decode_end - start,
        peak_memory_mb=peak_memory_mb(),
        symbols_sha256=decoded.symbols_sha256,
        model=codec.name,
        weights_sha256=codec.weights_sha256,
        device=codec.device,
        threads=codec.threads,
        problems=tuple(_problems(encoded, decoded, size, framing, len(streams))),
    )


def _problems(encoded: Any, decoded: Any, size: int, framing: int, streams: int) -> list[str]:
    problems = []
    if decoded.symbols_sha256 != encoded.symbols_sha256:
        problems.append("decoded symbols differ from the encoded ones")
    if not np.array_equal(decoded.rgb, encoded.reconstruction):
        problems.append("decoded pixels differ from the encoder's reconstruction")
    allowed = encoded.estimated_bits / 8 * (1 + CODER_OVERHEAD) + framing + BYTES_PER_STREAM * streams
    if size > allowed:
        problems.append(f"{size} bytes, at most {allowed:.0f} expected from the model's estimate")
    return problems


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
