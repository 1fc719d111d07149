"""What a ``.lic`` file says of itself, without torch and without its model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lic import container
from lic.quality import lambda_of, quality_of

_REDUCED = {
    container.Reduced.PRECISION: "precision",
    container.Reduced.COLOUR_MODEL: "colour model",
    container.Reduced.FRAMES: "further frames",
    container.Reduced.COLOUR_SPACE: "colour space",
}


@dataclass(frozen=True)
class Info:
    """Header and layout of a file. Sizes in bytes and pixels, identities in hexadecimal.

    ``mode`` is Pillow's: L, LA, RGB or RGBA; ``depth`` the bits per sample that decoding gives; ``metadata``
    the kinds that are kept: icc, exif, xmp; ``reduced`` what the source had and the file has not. ``tile`` is
    the side of the tiles, 0 when the picture is one tile. ``streams`` is per tile. ``sections`` are
    (name, size) in file order; together they are the whole file.
    """

    format_version: int
    width: int
    height: int
    mode: str
    depth: int
    alpha: bool
    metadata: tuple[str, ...]
    reduced: tuple[str, ...]
    bytes: int
    bpp: float
    quality: float
    lagrangian: float
    model: str
    entropy_id: str
    synthesis_id: str
    coder: int
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
            "mode": f"{self.mode}, {self.depth} bits per sample",
            "metadata": ", ".join(self.metadata) or "none",
            "reduced": ", ".join(self.reduced) or "nothing",
            "file": f"{self.bytes} bytes, {self.bpp:.4f} bpp",
            "quality": f"{self.quality:g} (λ = {self.lagrangian:.5g})",
            "model": f"{self.model} (entropy {self.entropy_id}, synthesis {self.synthesis_id})",
            "format": f"version {self.format_version}, coder {self.coder}",
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
    parsed = container.parse(data, max_pixels=None)
    header, kinds = parsed.header, [section.kind for section in parsed.sections]
    alpha = container.ALPHA in kinds
    return Info(
        format_version=header.version,
        width=header.width,
        height=header.height,
        mode=("L" if header.gray else "RGB") + "A" * alpha,
        depth=16 if header.deep else 8,
        alpha=alpha,
        metadata=container.metadata_kinds(kinds),
        reduced=tuple(text for flag, text in _REDUCED.items() if header.reduced & flag),
        bytes=len(data),
        bpp=8 * len(data) / (header.width * header.height),
        quality=quality_of(header.quality),
        lagrangian=lambda_of(header.quality),
        model=header.model,
        entropy_id=header.entropy_id.hex(),
        synthesis_id=header.synthesis_id.hex(),
        coder=header.coder,
        effort=header.effort,
        tile=header.tile,
        streams=header.streams,
        symbols_crc=f"{header.symbols_crc:08x}",
        sections=tuple((part.name, part.size) for part in container.layout(data)),
    )
