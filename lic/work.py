"""What encode and decode do with one file, in three stages, so that a batch reads and writes while it computes.

``load`` makes something to code of a file's bytes, ``code`` runs the networks, ``save`` makes a file's bytes and the
facts of the report. Only ``code`` needs the codec; the other two run in threads of their own. The operations are
small values that go to other processes and machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lic import files, stdio
from lic.batch import STDIO, Job
from lic.part import Preview, Region
from lic.quality import Tune, quality_of
from lic.rate import Target

if TYPE_CHECKING:
    from lic.api import Codec, DecodeResult, EncodeResult
    from lic.images import Picture

Progress: TypeAlias = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Encode:
    """Pictures to ``.lic`` files. The fields are the options of the command."""

    quality: float | None
    target: Target | None
    tune: Tune
    effort: int
    effort_seconds: float | None
    model: str
    strip: bool
    max_pixels: int
    device: str
    threads: int | None
    measure: bool  # whether somebody is told the PSNR, which costs a synthesis

    def codec(self) -> Codec:
        """With its model loaded. Raises LicError when the model or the device is not there."""
        from lic.api import Codec

        codec = Codec(self.model, self.device, threads=self.threads)
        codec.load_encoder(self.tune)
        return codec

    def load(self, name: str, data: bytes) -> Picture:
        from lic import images

        return images.picture_of(data, max_pixels=self.max_pixels, strip=self.strip)

    def code(self, codec: Codec, picture: Picture, progress: Progress = None) -> EncodeResult:
        result = codec.encode_result(
            picture,
            self.quality,
            target=self.target,
            tune=self.tune,
            effort=self.effort,
            effort_seconds=self.effort_seconds,
            progress=progress,
        )
        if self.measure:
            _ = result.reconstruction  # here, where the networks have the cores, and not where files are written
        return result

    def save(self, picture: Picture, result: EncodeResult) -> tuple[bytes, dict[str, Any]]:
        from lic.container import parse_header

        facts = {
            "width": picture.width,
            "height": picture.height,
            "notes": list(result.notes),
            "bpp": round(8 * len(result.data) / (picture.width * picture.height), 4),
            "estimated_bytes": round(result.estimated_bits / 8, 1),
            "quality": round(result.quality, 4),
            "tune": self.tune,
            "effort": result.effort,
            "model": parse_header(result.data).header.model,  # that of --tune, where there is one
            "seconds": round(result.seconds, 3),
            "symbols_sha256": result.symbols_sha256,
        }
        if self.measure:
            facts["psnr"] = round(result.psnr, 2) if math.isfinite(result.psnr) else None  # JSON has no infinity
        return result.data, facts


@dataclass(frozen=True)
class Decode:
    """``.lic`` files to pictures. The fields are the options of the command."""

    format: str
    bits: int | None  # None: 16 if the source had more than 8 and the format holds them
    region: Region | None
    preview: Preview | None
    max_pixels: int
    device: str
    threads: int | None

    def codec(self) -> Codec:
        """For whatever models the files name."""
        from lic.api import Codec

        return Codec(device=self.device, threads=self.threads)

    def load(self, name: str, data: bytes) -> bytes:
        return data

    def code(self, codec: Codec, data: bytes, progress: Progress = None) -> DecodeResult:
        from lic.images import FORMATS_16

        bits = self.bits if self.format in FORMATS_16 else 8
        return codec.decode_result(
            data, bits=bits, region=self.region, preview=self.preview, max_pixels=self.max_pixels, progress=progress
        )

    def save(self, data: bytes, result: DecodeResult) -> tuple[bytes, dict[str, Any]]:
        from lic.container import parse_header
        from lic.images import left_out, picture_bytes

        header, picture = parse_header(data).header, result.picture
        lost = left_out(picture, self.format)
        return picture_bytes(picture, self.format), {
            "width": picture.width,
            "height": picture.height,
            "notes": [*result.notes, *([f"{self.format} cannot hold: {', '.join(lost)}"] if lost else [])],
            "bpp": round(8 * len(data) / (header.width * header.height), 4),
            "quality": round(quality_of(header.quality), 4),
            "model": header.model,
            "seconds": round(result.seconds, 3),
            "symbols_sha256": result.symbols_sha256,
        }


Operation: TypeAlias = Encode | Decode


def load(operation: Operation, job: Job) -> tuple[Any, int]:
    """The first stage of a job: what there is to code, and the size of the file it came from."""
    data = files.read(job.source)
    return operation.load(job.source, data), len(data)


def save(
    operation: Operation, job: Job, loaded: Any, size: int, result: Any, device: str, stdout: int | None = None
) -> dict[str, Any]:
    """The last stage: writes the output, to the descriptor ``stdout`` where that is the target; the facts."""
    data, facts = operation.save(loaded, result)
    if job.target == STDIO:
        assert stdout is not None
        stdio.write_all(stdout, data)
    else:
        files.write(job.target, data)
    return {"bytes_in": size, "bytes_out": len(data), **facts, "device": device}
