"""Sizes of a model. The configuration travels inside the weights file as JSON. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

DOWNSAMPLING = 16  # pixels per latent position, one side
HYPER_DOWNSAMPLING = 64  # pixels per hyper-latent position, one side: images are padded to multiples of it
REFINEMENT = (24, 3, 2)  # that of one that begins anew, see Config
_OPTIONAL = {"non_local_heads", "refinement"}  # fields that may be left out of the JSON


@dataclass(frozen=True)
class Config:
    """Sizes of one model; ``system`` names the context model, ``context`` holds the options of that system."""

    name: str = "base"
    latent: int = 320  # channels of y
    widths: tuple[int, int, int] = (80, 160, 256)  # transform widths at 1/4, 1/8 and 1/16
    depths: tuple[int, int, int] = (2, 3, 3)  # transform blocks at 1/4, 1/8 and 1/16
    hyper_latent: int = 96  # channels of z
    hyper_width: int = 256
    psi: int = 256  # hyperprior features per latent position
    knots: int = 17  # entries of every table over quality
    hyper_buckets: int = 8  # quality buckets of the prior of z
    system: str = "groupedmixer"
    context: Mapping[str, Any] = field(default_factory=dict)
    non_local_heads: int = 0  # of the non-local attention modules in transforms and hyperprior; 0: no modules
    # Of the refinement behind g_s: width, number of blocks and, if it is given changes by groups, how many kinds of
    # these. Empty: no refinement.
    refinement: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Without the optional fields that have their default: weights from before these were there stay the same."""
        return {k: v for k, v in asdict(self).items() if v or k not in _OPTIONAL}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Raises ValueError on unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        different = (names ^ set(data)) - (_OPTIONAL - set(data))
        if different:
            raise ValueError(f"configuration fields differ: {sorted(different)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


BASE = Config(context={"slices": [80, 240], "width": 256, "heads": 8, "mixers": 3, "window": 8})


def _context(name: str, system: str, *, non_local_heads: int = 0, **options: Any) -> Config:
    """A context model on the transforms and the hyperprior of base."""
    return replace(BASE, name=name, system=system, context=options, non_local_heads=non_local_heads)


TINY = Config(
    name="tiny",
    latent=48,
    widths=(16, 24, 32),
    depths=(1, 1, 1),
    hyper_latent=16,
    hyper_width=32,
    psi=32,
    knots=5,
    hyper_buckets=2,
    context={"slices": [16, 32], "width": 32, "heads": 2, "mixers": 1, "window": 4},
)
_SEGMENTS = [40, 60, 90, 130]  # channels, in order of energy

CONFIGS = {
    config.name: config
    for config in (
        BASE,
        TINY,
        _context("hyperprior", "hyperprior", width=512),
        _context("groupedmixer", "groupedmixer", slices=_SEGMENTS, width=192, heads=6, mixers=3, window=8),
        _context(
            "econtextformer",
            "econtextformer",
            segments=_SEGMENTS,
            order="spatial",
            width=192,
            heads=4,
            layers=6,
            window=8,
        ),
        _context(
            "nlaic",
            "nlaic",
            non_local_heads=4,
            slices=[20, 20, 40, 40] + 4 * [50],
            filters=24,
            features=8,
            widths=[64, 96],
        ),
        _context("msp-light", "msp", levels=1, slices=[320], width=24, depth=1),
        _context("msp-fast", "msp", levels=1, slices=[320], width=80, depth=2),
        _context("msp", "msp", levels=2, slices=[80, 240], width=160, depth=4),
        _context("msp-full", "msp", levels=2, slices=_SEGMENTS, width=216, depth=5),
    )
}
