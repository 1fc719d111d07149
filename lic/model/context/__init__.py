"""Context models. A system is one module of this package with a schedule and a context model."""

from __future__ import annotations

from collections.abc import Callable

from lic.model.config import Config
from lic.model.context.base import Context, Geometry, Prediction, Schedule, State, Unit
from lic.model.context.econtextformer import EContextformer
from lic.model.context.groupedmixer import GroupedMixer
from lic.model.context.hyperprior_only import HyperpriorOnly
from lic.model.context.msp import MSP
from lic.model.context.nlaic import Nlaic

SYSTEMS: dict[str, Callable[[Config], Context]] = {
    "econtextformer": EContextformer,
    "groupedmixer": GroupedMixer,
    "hyperprior": HyperpriorOnly,
    "msp": MSP,
    "nlaic": Nlaic,
}


def make_context(config: Config) -> Context:
    """The context model that ``config.system`` names. Raises ValueError for an unknown one."""
    if config.system not in SYSTEMS:
        raise ValueError(f"unknown context model {config.system!r}")
    return SYSTEMS[config.system](config)


__all__ = ["SYSTEMS", "Context", "Geometry", "Prediction", "Schedule", "State", "Unit", "make_context"]
