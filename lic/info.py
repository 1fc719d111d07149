"""What a ``.lic`` file says of itself, without torch and without its model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lic import container
from lic.quality import lambda_of, quality_of


@dataclass(frozen=True)
class Info:
    """Header and layout of a file. Sizes in bytes and pixels, identities in hexadecimal.

    ``tile`` is the side of the tiles, 0 when the picture is one tile. ``streams`` is per tile. ``sections``
    are (name, size) in file order; together they are the whole file.
    """

    format_version: int
    width: int
    height: int
    bytes: int
    bpp: float
    quality: float
    lagrangian: float
    model: str
    entropy_id: str
    synthesis_id: str
    coder: int
    colour: int
    effort: int
    tile: int
    streams: int
    symbols_crc: str
    sections: tuple[tuple[str, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = dataclasses.asdict(self)
        facts["lambda"] = facts.pop("lagrangian")
        facts["sections"] = [{"name": name, "bytes": size} for name, size in self.sections]
        return facts

    def as_text(self) -> str:
        """For people: a fact a line, then a section a line."""
        tiles = f"{self.tile}x{self.tile} pixels" if self.tile else "one"
        facts = {
            "size": f"{self.width}x{self.height} pixels",
            "file": f"{self.bytes} bytes, {self.bpp:.4f} bpp",
            "quality": f"{self.quality:g} (λ = {self.lagrangian:.5g})",
            "model": f"{self.model} (entropy {self.entropy_id}, synthesis {self.synthesis_id})",
            "format": f"version {self.format_version}, coder {self.coder}, colour {self.colour}",
            "effort": str(self.effort),
            "tiles": f"{tiles}, {self.streams} streams each",
            "symbols": f"CRC-32 {self.symbols_crc}",
        }
        lines = [f"{name + ':':<10}{value}" for name, value in facts.items()]
        width = max(len(name) for name, _ in self.sections)
        lines += [f"  {name:<{width}} {size:>10}" for name, size in self.sections]
        return "\n".join(lines)


def info_of(data: bytes) -> Info:
    """Read and check a whole file's framing. Raises CorruptError and UnsupportedError as decoding would."""
    header = container.parse(data, max_pixels=None).header
    return Info(
        format_version=container.FORMAT_VERSION,
        width=header.width,
        height=header.height,
        bytes=len(data),
        bpp=8 * len(data) / (header.width * header.height),
        quality=quality_of(header.quality),
        lagrangian=lambda_of(header.quality),
        model=header.model,
        entropy_id=header.entropy_id.hex(),
        synthesis_id=header.synthesis_id.hex(),
        coder=header.coder,
        colour=header.colour,
        effort=header.effort,
        tile=header.tile,
        streams=header.streams,
        symbols_crc=f"{header.symbols_crc:08x}",
        sections=tuple((part.name, part.size) for part in container.layout(data)),
    )
