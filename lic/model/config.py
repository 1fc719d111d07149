"""Sizes of a model. The configuration travels inside the weights file as JSON. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

DOWNSAMPLING = 16  # pixels per latent position, one side
HYPER_DOWNSAMPLING = 64  # pixels per hyper-latent position, one side: images are padded to multiples of it


@dataclass(frozen=True)
class Config:
    """Sizes of one model; ``system`` names the context model (a module of ``lic.model.context``)."""

    name: str = "base"
    system: str = "groupedmixer"
    slices: tuple[int, ...] = (80, 240)  # latent channels of each slice, in order of energy
    widths: tuple[int, int, int] = (80, 160, 256)  # transform widths at 1/4, 1/8 and 1/16
    depths: tuple[int, int, int] = (2, 3, 3)  # transform blocks at 1/4, 1/8 and 1/16
    hyper_latent: int = 96  # channels of z
    hyper_width: int = 256
    psi: int = 256  # hyperprior features per latent position
    context_width: int = 256
    context_heads: int = 8
    context_mixers: int = 3  # pairs of inner-group and cross-group mixers
    window: int = 8  # side of the inner-group attention windows, in cells of 32x32 pixels
    knots: int = 17  # entries of every table over quality
    hyper_buckets: int = 8  # quality buckets of the prior of z

    @property
    def latent(self) -> int:
        """Channels of y."""
        return sum(self.slices)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Raises ValueError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            raise ValueError(f"configuration fields differ: {sorted(names ^ set(data))}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


CONFIGS = {
    "base": Config(),
    "tiny": Config(
        name="tiny",
        slices=(16, 32),
        widths=(16, 24, 32),
        depths=(1, 1, 1),
        hyper_latent=16,
        hyper_width=32,
        psi=32,
        context_width=32,
        context_heads=2,
        context_mixers=1,
        window=4,
        knots=5,
        hyper_buckets=2,
    ),
}
