"""What every context model offers: a schedule (who is coded when) and predictions (mean and scale).

The latents are divided by a per-channel ``unit`` (quantiser steps per standard deviation of the channel), so that a
context model sees the same signal at every quality, and its predictions are turned back into quantiser steps here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

FEATURE_LIMIT = 16.0  # inputs are clamped to so many standard deviations


@dataclass(frozen=True)
class Geometry:
    """Latent grid of one tile: batch, rows and columns (multiples of 4)."""

    batch: int
    height: int
    width: int


class Schedule(Protocol):
    """Order in which the latents y (B, h, w, M) are coded."""

    def steps(self, geometry: Geometry) -> int:
        """Number of sequential steps."""

    def stream_of(self, step: int) -> int:
        """Index of the stream, 0-based, that holds the symbols of a step."""

    def take(self, y: Tensor, step: int) -> Tensor:
        """The latents of a step, (B, P, C)."""

    def put(self, y: Tensor, step: int, values: Tensor) -> None:
        """Write values (B, P, C) of a step into y, in place."""


State = Any  # the system's own dataclass; shapes are listed there


class Context(nn.Module, ABC):
    """A context model. ``predict`` after ``observe`` of all earlier steps gives what ``teacher`` gives at once."""

    schedule: Schedule

    @abstractmethod
    def start(self, psi: Tensor, geometry: Geometry, code: Tensor, unit: Tensor) -> State:
        """State before step 0. psi (B, h, w, psi), code (B,) quality code, unit (B, M)."""

    @abstractmethod
    def predict(self, state: State, step: int) -> tuple[Tensor, Tensor]:
        """Mean and log of the scale, each (B, P, C) in quantiser steps, for the latents of ``step``."""

    @abstractmethod
    def observe(self, state: State, step: int, y_hat: Tensor) -> State:
        """The state after the latents y_hat (B, P, C) of ``step`` are known."""

    @abstractmethod
    def teacher(self, psi: Tensor, y_hat: Tensor, code: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale (B, h, w, M) of all latents y_hat (B, h, w, M) in one masked pass."""


def features(y: Tensor, unit: Tensor) -> Tensor:
    """Latents (..., C) over their unit (broadcast) as inputs (..., 2·C): linear and logarithmic."""
    u = (y / unit).clamp(-FEATURE_LIMIT, FEATURE_LIMIT)
    return torch.cat([u, torch.sign(u) * torch.log1p(8 * u.abs())], dim=-1)


def to_steps(prediction: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Network output (..., 2·C) -> mean and log-scale (..., C) in quantiser steps."""
    mean, log_scale = prediction.float().chunk(2, dim=-1)
    return mean * unit, log_scale + torch.log(unit)
