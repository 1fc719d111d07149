"""What every context model offers: a schedule (who is coded when) and predictions (mean and scale).

The latents are divided by a per-channel unit (quantiser steps per standard deviation of the channel), so that a
context model sees the same signal at every quality, and its predictions are turned back into quantiser steps here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from lic.coder import SCALES
from lic.exact import Fixed, Grid, power_of_two
from lic.exact.tables import EXP2, EXP2_BITS, EXP2_INDEX_BITS, LOG, LOG_BITS, RATIO_BITS, RATIO_LIMIT
from lic.model.config import Config
from lic.model.layers import NARROW, lower_bound

FRACTIONS = 8  # positions of the mean inside a quantiser step
LOG_SCALE_0 = math.log(SCALES[0])
LOG_SCALE_STEP = math.log(SCALES[1] / SCALES[0])
MEAN_LIMIT = FRACTIONS << 17  # of predicted means, in eighths
HEAD_BITS, HEAD_LIMIT = 10, 32767  # grid of what a context model answers: 1/1024, up to 32
INDEX_BITS = 24  # fraction bits of scale indices before they are rounded
INDEX_FACTOR = round(2 ** (INDEX_BITS - HEAD_BITS) / LOG_SCALE_STEP)  # scale indices in an answer of 1/1024


@dataclass(frozen=True)
class Options:
    """``context`` of a configuration; every system has a subclass with its fields.

    Fields are of type int, str or Sequence[int]; numbers are sizes, and so positive.
    """

    @classmethod
    def of(cls, config: Config) -> Self:
        """Raises ValueError for options that do not exist or do not fit."""
        try:
            options = cls(**config.context)
            for field in fields(options):
                value = getattr(options, field.name)
                sizes = [] if field.type == "str" else [value] if field.type == "int" else value
                if not all(type(n) is int and n > 0 for n in sizes):
                    raise ValueError(f"options of {config.system}: {field.name} must be positive, not {value!r}")
            options.check(config)
        except TypeError as error:
            raise ValueError(f"options of {config.system}: {error}") from None
        return options

    def check(self, config: Config) -> None:
        """Raises ValueError for options that do not fit each other or the rest of the configuration."""


def check_channels(parts: Sequence[int], config: Config) -> None:
    """Raises ValueError unless these numbers of channels are all latent channels together."""
    if sum(parts) != config.latent:
        raise ValueError(f"parts of {sum(parts)} channels for latents of {config.latent}")


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

    def first_grid(self, geometry: Geometry) -> tuple[int, int] | None:
        """Rows and columns of the positions of step 0, where these are a grid in the order (row, column)."""

    def take(self, y: Tensor, step: int) -> Tensor:
        """The latents of a step, (B, P, C)."""

    def put(self, y: Tensor, step: int, values: Tensor) -> None:
        """Write values (B, P, C) of a step into y, in place."""


class Prediction(NamedTuple):
    """What a latent is coded with: its mean in eighths of a quantiser step and the index of its scale in SCALES.

    Integers where arithmetic is exact, otherwise real numbers that may lie outside the tables.
    """

    eighths: Tensor
    scale_index: Tensor

    @property
    def mean(self) -> Tensor:
        """In quantiser steps."""
        return self.eighths / FRACTIONS

    @property
    def scale(self) -> Tensor:
        """In quantiser steps, within the tables; below them the gradient still passes that would raise it."""
        index = lower_bound(self.scale_index, 0.0).clamp(max=len(SCALES) - 1)
        return torch.exp(LOG_SCALE_0 + LOG_SCALE_STEP * index)


class Unit(NamedTuple):
    """Quantiser steps per standard deviation of each channel, (B, M) or broadcastable to latents.

    ``steps`` and ``inverse``: the unit and its inverse; ``scale_index``: its place on the scale of Prediction's times
    2**24. Where arithmetic is ``exact``: float64, integers times powers of two (bitstream_spec.md 5.5).
    """

    steps: Tensor
    inverse: Tensor
    scale_index: Tensor
    exact: bool

    @classmethod
    def real(cls, steps: Tensor) -> Unit:
        """From quantiser steps per standard deviation."""
        index = (torch.log(steps) - LOG_SCALE_0) * (2**INDEX_BITS / LOG_SCALE_STEP)
        return cls(steps, 1 / steps, index, False)

    @classmethod
    def integer(cls, log2: Tensor, index: Tensor) -> Unit:
        """From integers: 4096·log2(steps), and scale_index."""
        return cls(_power(log2), _power(-log2), index.double(), True)

    def of(self, channels: slice) -> Unit:
        """For latents (B, P, C) of these channels, from (B, M)."""
        steps, inverse, scale_index = (t[:, None, channels] for t in self[:3])
        return Unit(steps, inverse, scale_index, self.exact)

    def features(self, y: Tensor) -> Fixed:
        """Integer latents (..., C) over their unit as inputs (..., 2·C): linear up to ±8, and logarithmic."""
        if not self.exact:
            return Fixed(self._real_features(y))
        ratio = torch.round(y.double() * self.inverse * 2**RATIO_BITS).clamp_(-RATIO_LIMIT, RATIO_LIMIT)
        table = torch.as_tensor(LOG, device=y.device, dtype=y.dtype)
        log = table.index_select(0, ratio.detach().abs().int().flatten()).view(ratio.shape)
        linear = torch.round(ratio / 2 ** (RATIO_BITS - LOG_BITS)).clamp_(-NARROW, NARROW).to(y.dtype)
        integers = torch.cat([linear, log.copysign_(linear)], dim=-1)
        if y.requires_grad:
            real = (self._real_features(y) * 2**LOG_BITS).to(y.dtype)
            integers = real + (integers - real).detach()
        return Fixed(integers, LOG_BITS, NARROW)

    def _real_features(self, y: Tensor) -> Tensor:
        u = y / self.steps
        log = torch.sign(u) * torch.log1p(8 * u.abs().clamp(max=RATIO_LIMIT / 2**RATIO_BITS))
        limit = NARROW / 2**LOG_BITS
        return torch.cat([u.clamp(-limit, limit), log], dim=-1)

    def prediction(self, answer: Fixed) -> Prediction:
        """Network output (..., 2·C), means then log-scales relative to the unit, -> Prediction (..., C)."""
        mean, log_scale = answer.x.chunk(2, dim=-1)
        if not self.exact:
            index = log_scale.float() / LOG_SCALE_STEP + self.scale_index / 2**INDEX_BITS
            return Prediction(mean.float() * self.steps * FRACTIONS, index)
        eighths = mean.double() * self.steps * (FRACTIONS / 2**HEAD_BITS)
        index = (log_scale.double() * INDEX_FACTOR + self.scale_index) / 2**INDEX_BITS
        index = lower_bound(index, 0.0).clamp(max=len(SCALES) - 1)
        return Prediction(_rounded(eighths.clamp(-MEAN_LIMIT, MEAN_LIMIT)), _rounded(index))


def _power(log2: Tensor) -> Tensor:
    """Integers 4096·log2(x) -> x in float64: a mantissa from the table, a power of two."""
    mantissa = torch.as_tensor(EXP2, device=log2.device)[log2.long() & ((1 << EXP2_INDEX_BITS) - 1)]
    return mantissa.double() * power_of_two((log2.long() >> EXP2_INDEX_BITS) - EXP2_BITS)


def _rounded(x: Tensor) -> Tensor:
    """float64 -> float32 integers, with the gradient of the identity."""
    return (x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)).float()


State = Any  # the system's own dataclass; shapes are listed there


class Context(nn.Module, ABC):
    """A context model. ``predict`` after ``observe`` of all earlier steps gives what ``teacher`` gives at once."""

    schedule: Schedule

    def __init__(self) -> None:
        super().__init__()
        self.answer = Grid(HEAD_LIMIT, bits=HEAD_BITS)

    @abstractmethod
    def start(self, psi: Fixed, geometry: Geometry, code: Tensor, unit: Unit) -> State:
        """State before step 0. psi (B, h, w, psi), code (B,) quality code, unit (B, M)."""

    @abstractmethod
    def predict(self, state: State, step: int) -> Prediction:
        """Predictions (B, P, C) for the latents of ``step``."""

    @abstractmethod
    def observe(self, state: State, step: int, y_hat: Tensor) -> State:
        """The state after the latents y_hat (B, P, C) of ``step`` are known."""

    @abstractmethod
    def teacher(self, psi: Fixed, y_hat: Tensor, code: Tensor, unit: Unit) -> Prediction:
        """Predictions (B, h, w, M) of all latents y_hat (B, h, w, M) in one masked pass."""
