"""NLAIC (Chen et al. 2021, arXiv 1910.06244): masked 3-D convolution over (channel, row, column) joined with psi.

The parallel form, without left neighbours. The latent of channel c at row r sees, in the 5x5x5 neighbourhood, the two
planes before its own and the two rows before its own: everything that has an earlier time r + 3·c. So all latents of
one time are coded in one step, a wavefront that runs down the rows of a plane and starts the next plane three rows
behind. The filters and the layers after them are shared by all latents; the features that psi gives each channel, with
a bias of its own, tell the channels apart.

Other than in the paper, a neighbour enters with its value and the logarithm of its magnitude, not with its value alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lic.exact import Fixed, Grid, Linear, QualityTable
from lic.exact.tables import LOG_BITS
from lic.model.config import Config
from lic.model.context.base import Context, Geometry, Options, Prediction, Unit, check_channels
from lic.model.layers import NARROW, WIDE, near_zero

LAG = 3  # rows that a plane is behind the one before
SIDE = 5  # of the mask
REACH = SIDE // 2
ROWS = [(c, r) for c in (-2, -1) for r in range(-REACH, REACH + 1)] + [(0, -2), (0, -1)]
"""Channel and row, relative to the latent, of the mask's rows of SIDE neighbours: the order of the filters' inputs."""
AGES = [-LAG * c - r for c, r in ROWS]  # steps since these neighbours were coded
INPUTS = 2  # numbers for each neighbour
BLOCK = 32  # channels whose neighbours are gathered at once
MAX_STREAMS = 254  # of a tile, without the hyper-latents


@dataclass(frozen=True)
class NlaicOptions(Options):
    """Sizes of the model."""

    slices: Sequence[int]  # latent channels of each stream, in order of energy
    filters: int
    features: int  # of psi, for each channel
    widths: Sequence[int]  # of the two hidden layers

    def check(self, config: Config) -> None:
        check_channels(self.slices, config)
        if len(self.slices) > MAX_STREAMS:
            raise ValueError(f"{len(self.slices)} slices: at most {MAX_STREAMS} streams")
        if len(self.widths) != 2:
            raise ValueError(f"nlaic has 2 hidden layers, not {len(self.widths)}")


class Wavefront:
    """Step t holds the latents (c, r) with r + 3·c = t, of all columns; its stream is that of its last channel."""

    def __init__(self, slices: Sequence[int]) -> None:
        self.channels = sum(slices)
        self.streams = [stream for stream, count in enumerate(slices) for _ in range(count)]  # of each channel

    def steps(self, geometry: Geometry) -> int:
        return geometry.height + LAG * (self.channels - 1)

    def stream_of(self, step: int) -> int:
        return self.streams[min(step // LAG, self.channels - 1)]

    def first_grid(self, geometry: Geometry) -> None:
        return None

    def span(self, step: int, height: int) -> tuple[int, int]:
        """The channels of a step: first, and last + 1."""
        return max(0, (step - height) // LAG + 1), min(step // LAG + 1, self.channels)

    def index(self, step: int, like: Tensor) -> tuple[slice, Tensor, slice, Tensor]:
        """Where the latents of a step are in tensors (B, h, w, M, ...); what is found there is (C, B, w, ...)."""
        channels = torch.arange(*self.span(step, like.shape[1]), device=like.device)
        return slice(None), step - LAG * channels, slice(None), channels

    def take(self, y: Tensor, step: int) -> Tensor:
        """(B, w, C)."""
        return y[self.index(step, y)].permute(1, 2, 0)

    def put(self, y: Tensor, step: int, values: Tensor) -> None:
        y[self.index(step, y)] = values.permute(2, 0, 1)


@dataclass
class NlaicState:
    """k features of psi for each channel; a border of two zeros around what neighbours are gathered from.

    own (B, h, w, M, k): the features of psi; recent: inputs of the latents of the last 8 steps, the last one first,
    each (B, M + 2, 2·(w + 4)), zero where a step has no latent; unit: (B, M).
    """

    own: Tensor
    recent: list[Tensor]
    unit: Unit


class Nlaic(Context):
    """See the module's description."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        options = NlaicOptions.of(config)
        self.schedule: Wavefront = Wavefront(options.slices)
        first, second = options.widths
        self.wide, self.joined, self.hidden1, self.hidden2 = Grid(WIDE), *(Grid(NARROW) for _ in range(3))
        self.filters = Linear(SIDE * len(ROWS) * INPUTS, options.filters)
        self.psi = Linear(config.psi, config.latent * options.features)
        self.quality = QualityTable(config.knots, options.features)
        self.first = Linear(options.filters + options.features, first)
        self.second = Linear(first, second)
        self.head = near_zero(Linear(second, 2))  # step 0 predicts each channel's own standard deviation

    def start(self, psi: Fixed, geometry: Geometry, code: Tensor, unit: Unit) -> NlaicState:
        shape = (geometry.batch, REACH + self.schedule.channels, INPUTS * (geometry.width + 2 * REACH))
        return NlaicState(self._own(psi, code), [psi.x.new_zeros(shape)] * max(AGES), unit)

    def predict(self, state: NlaicState, step: int) -> Prediction:
        first, end = self.schedule.span(step, state.own.shape[1])
        rows = [
            state.recent[age - 1][:, first + REACH + c : end + REACH + c]
            for age, (c, _) in zip(AGES, ROWS, strict=True)
        ]
        neighbours = torch.stack(rows, dim=2).unfold(-1, SIDE * INPUTS, INPUTS)  # (B, C, 12, w, 5·2)
        own = state.own[self.schedule.index(step, state.own)].transpose(0, 1)
        answer = self._answer(neighbours.transpose(2, 3).flatten(-2), own)  # (B, C, w, 2)
        answer = answer._replace(x=answer.x.permute(0, 2, 3, 1).flatten(-2))
        return state.unit.of(slice(first, end)).prediction(answer)

    def observe(self, state: NlaicState, step: int, y_hat: Tensor) -> NlaicState:
        first, end = self.schedule.span(step, state.own.shape[1])
        latest = torch.zeros_like(state.recent[0])
        inputs = _inputs(y_hat, state.unit.of(slice(first, end)))
        latest[:, first + REACH : end + REACH, REACH * INPUTS : -REACH * INPUTS] = inputs.transpose(1, 2).flatten(-2)
        return NlaicState(state.own, [latest, *state.recent[:-1]], state.unit)

    def teacher(self, psi: Fixed, y_hat: Tensor, code: Tensor, unit: Unit) -> Prediction:
        _, h, w, channels = y_hat.shape
        own = self._own(psi, code)
        inputs = _inputs(y_hat.flatten(1, 2), unit.of(slice(None))).unflatten(1, (h, w))
        inputs = F.pad(inputs, (0, 0, REACH, 0, REACH, REACH, REACH, REACH))
        parts = []
        for first in range(0, channels, BLOCK):
            end = min(first + BLOCK, channels)
            neighbours = torch.cat(
                [
                    inputs[:, REACH + r : REACH + r + h, x : x + w, first + REACH + c : end + REACH + c]
                    for c, r in ROWS
                    for x in range(SIDE)
                ],
                dim=-1,
            )
            answer = self._answer(neighbours, own[:, :, :, first:end])  # (B, h, w, C, 2)
            answer = answer._replace(x=answer.x.transpose(-2, -1).flatten(-2).flatten(1, 2))
            parts.append(unit.of(slice(first, end)).prediction(answer))
        return Prediction(*(torch.cat(part, dim=-1).unflatten(1, (h, w)) for part in zip(*parts, strict=True)))

    def _own(self, psi: Fixed, code: Tensor) -> Tensor:
        """Features (B, h, w, M, k) of psi (B, h, w, psi) for each channel, on the grid ``joined``."""
        own = self.psi(psi, self.wide)
        own = own._replace(x=own.x.unflatten(-1, (self.schedule.channels, -1)))
        quality = self.quality.fixed(code, self.wide)
        return self.joined(self.wide.add(own, quality._replace(x=quality.x[:, None, None, None]))).x

    def _answer(self, neighbours: Tensor, own: Tensor) -> Fixed:
        """Inputs of neighbours (..., 120) and features of psi (..., k) -> mean and log-scale (..., 2)."""
        inputs = Fixed(neighbours, LOG_BITS, NARROW) if self.answer.exact else Fixed(neighbours)
        known = self.filters(inputs, self.joined)
        x = known._replace(x=torch.cat([known.x, own], dim=-1))
        return self.head(self.second(self.first(x, self.hidden1, leaky=True), self.hidden2, leaky=True), self.answer)


def _inputs(y_hat: Tensor, unit: Unit) -> Tensor:
    """Latents (B, P, C) -> (B, P, C, 2): in their unit up to ±8, and the logarithm of their magnitude."""
    linear, log = unit.features(y_hat).x.chunk(2, dim=-1)
    return torch.stack([linear, log.abs()], dim=-1)
