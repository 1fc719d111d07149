"""Multi-scale progressive probability model (Zhang et al. 2022, arXiv 2210.04112): coarse to fine, in constant steps.

Scale 0 is the lattice of the positions whose row and column are multiples of 2**levels: one step, from psi alone. Every
further scale halves the spacing. Its *cells* are 2x2 positions of the new lattice; the top left one is known from the
coarser scales, the other three follow, the diagonal one first, each in channel slices. A step is one slice of one
phase of one scale. Its CNN works on the cells: psi at the position to predict, plus, through a 3x3 depthwise kernel for
each phase of the cell, whatever is known of the latents there.

The matrices are shared by all steps: coarse scales have too few positions to train their own. What differs from step
to step, distances above all, is in the depthwise kernels and in one vector for each step. What is known at a position
is the sum of the embeddings of its known slices, and zero where nothing is: their biases are what a mask channel would
contribute, and tell a known zero from what is outside the picture.

From the publication come the idea, coarse to fine in a number of steps that does not depend on the size, and profiles
that trade work for rate (msp-light, msp-fast, msp and msp-full of `lic.model.config`). The lattices, their order and
the networks are this codec's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic.exact import Depthwise, Fixed, Grid, Linear, QualityTable
from lic.model.config import Config
from lic.model.context.base import Context, Geometry, Options, Prediction, Unit, check_channels
from lic.model.context.hyperprior_only import PsiHead
from lic.model.layers import NARROW, WIDE, FeedForward, near_zero

PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))  # row and column inside a cell; the first one is known, the others in order
MAX_LEVELS = 2  # latent grids are multiples of 4


@dataclass(frozen=True)
class MSPOptions(Options):
    """Sizes of the model."""

    levels: int  # scales after the coarsest
    slices: Sequence[int]  # latent channels of each slice, in order of energy
    width: int
    depth: int  # blocks

    def check(self, config: Config) -> None:
        check_channels(self.slices, config)
        if self.levels > MAX_LEVELS:
            raise ValueError(f"{self.levels} levels: at most {MAX_LEVELS}")


class Lattice(NamedTuple):
    """The positions of a step, as rows and columns, and the channel slices that are coded there."""

    rows: slice
    columns: slice
    slices: range


class LatticeSchedule:
    """The coarsest lattice, then scales x 3 phases x channel slices; one stream a step.

    ``level`` counts the scales after the coarsest from 0, ``place`` the steps of one scale.
    """

    def __init__(self, levels: int, slices: Sequence[int]) -> None:
        edges = [sum(slices[:i]) for i in range(len(slices) + 1)]
        self.channels = [slice(a, b) for a, b in pairwise(edges)]
        self.levels = levels
        self.places = (len(PHASES) - 1) * len(slices)
        coarsest = slice(0, None, 2**levels)
        self.order = [Lattice(coarsest, coarsest, range(len(slices)))]
        for level in range(levels):
            for phase in range(1, len(PHASES)):
                self.order += [Lattice(*self.lattice(level, phase), range(s, s + 1)) for s in range(len(slices))]

    def lattice(self, level: int, phase: int) -> tuple[slice, slice]:
        """Rows and columns of one phase of the cells of a scale."""
        spacing = 2 ** (self.levels - 1 - level)
        i, j = PHASES[phase]
        return slice(i * spacing, None, 2 * spacing), slice(j * spacing, None, 2 * spacing)

    def steps(self, geometry: Geometry) -> int:
        return len(self.order)

    def stream_of(self, step: int) -> int:
        return step

    def first_grid(self, geometry: Geometry) -> tuple[int, int]:
        return geometry.height >> self.levels, geometry.width >> self.levels

    def channels_of(self, step: int) -> slice:
        slices = self.order[step].slices
        return slice(self.channels[slices[0]].start, self.channels[slices[-1]].stop)

    def take(self, y: Tensor, step: int) -> Tensor:
        return self._part(y, step).flatten(1, 2)

    def put(self, y: Tensor, step: int, values: Tensor) -> None:
        target = self._part(y, step)
        target.copy_(values.reshape(target.shape))

    def _part(self, y: Tensor, step: int) -> Tensor:
        rows, columns, _ = self.order[step]
        return y[:, rows, columns, self.channels_of(step)]


@dataclass
class MSPState:
    """psi (B, h, w, psi), code (B,), unit (B, M) as given; known (B, h, w, d): sum of the embedded known slices."""

    psi: Fixed
    code: Tensor
    unit: Unit
    known: Tensor


class Block(nn.Module):
    """As PlainResidual, with a depthwise kernel for each step."""

    def __init__(self, width: int, kernels: int) -> None:
        super().__init__()
        self.narrow, self.hidden, self.mixed = (Grid(NARROW) for _ in range(3))
        self.inner = Linear(width, width)
        self.spatial = Depthwise(width, kernels)
        nn.init.normal_(self.spatial.weight, std=0.1)
        self.spatial.weight.data[:, 1, 1] += 1
        self.outer = near_zero(Linear(width, width))
        self.feed = FeedForward(width)

    def forward(self, v: Fixed, wide: Grid, kernels: slice) -> Fixed:
        """v (B, H, W, n, d) of n steps on the grid ``wide`` of the residual sum, and so the result."""
        x = self.inner(self.narrow(v), self.hidden, leaky=True)
        v = wide.add(v, self.outer(self.spatial(x, self.mixed, kernels), wide))
        return self.feed(v, wide)


class MSP(Context):
    """See the module's description. d is the width; n steps of one scale are computed together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        options = MSPOptions.of(config)
        self.schedule: LatticeSchedule = LatticeSchedule(options.levels, options.slices)
        levels, places, width = options.levels, self.schedule.places, options.width
        self.wide, self.narrow = Grid(WIDE), Grid(NARROW)
        self.wide_known, self.known = Grid(WIDE), Grid(NARROW)
        self.coarsest = PsiHead(config, width)
        self.embed = nn.ModuleList(Linear(2 * c, width) for c in options.slices)
        self.psi = nn.ModuleList(Linear(config.psi, width) for _ in options.slices)
        self.step = nn.Parameter(torch.randn(levels * places, width) * 0.1)
        self.quality = QualityTable(config.knots, width)
        # The first place of a scale that knows something of each phase: of the three new ones, the place that follows
        # their first slice. With one slice the last phase is known to no other step.
        first = (0, *range(1, places + 1, len(options.slices)))
        self.known_from = [place for place in first if place < places]
        around = [Depthwise(width, levels * (places - place)) for place in self.known_from]
        for layer in around:
            nn.init.normal_(layer.weight, std=0.1)
        self.around = nn.ModuleList(around)
        self.blocks = nn.ModuleList(Block(width, levels * places) for _ in range(options.depth))
        # A fresh model predicts each channel's own standard deviation.
        self.head = nn.ModuleList(near_zero(Linear(width, 2 * c)) for c in options.slices)

    def start(self, psi: Fixed, geometry: Geometry, code: Tensor, unit: Unit) -> MSPState:
        return MSPState(psi, code, unit, psi.x.new_zeros(*psi.x.shape[:3], self.step.shape[1]))

    def predict(self, state: MSPState, step: int) -> Prediction:
        if step == 0:
            return self._coarsest(state.psi, state.code, state.unit)
        level, place = divmod(step - 1, self.schedule.places)
        known = []
        for phase, first in enumerate(self.known_from):
            if first <= place:
                rows, columns = self.schedule.lattice(level, phase)
                known.append(self.known(self.wide_known.wrap(state.known[:, rows, columns, None])))
        x = self._mix(state.psi, state.code, known, level, range(place, place + 1))
        return self._head(x, 0, step, state.unit)

    def observe(self, state: MSPState, step: int, y_hat: Tensor) -> MSPState:
        rows, columns, slices = self.schedule.order[step]
        target = state.known[:, rows, columns]
        offset = self.schedule.channels_of(step).start
        for s in slices:
            channels = self.schedule.channels[s]
            part = y_hat[..., channels.start - offset : channels.stop - offset]
            target.copy_(self._with_slice(self.wide_known.wrap(target), part, s, state.unit).x)
        return state

    def teacher(self, psi: Fixed, y_hat: Tensor, code: Tensor, unit: Unit) -> Prediction:
        schedule = self.schedule
        whole = Prediction(torch.empty_like(y_hat), torch.empty_like(y_hat))

        def put(step: int, prediction: Prediction) -> None:
            for all_of_it, part in zip(whole, prediction, strict=True):
                schedule.put(all_of_it, step, part)

        put(0, self._coarsest(psi, code, unit))
        total = self.wide_known.wrap(psi.x.new_zeros(*psi.x.shape[:3], self.step.shape[1]))
        sums = []  # of the first slice, of the first two, ...: of all
        for s, channels in enumerate(schedule.channels):
            total = self._with_slice(total, y_hat[..., channels].flatten(1, 2), s, unit)
            sums.append(self.known(total))
        last = len(sums) - 1
        for level in range(schedule.levels):
            known = []
            for phase, first in enumerate(self.known_from):
                rows, columns = schedule.lattice(level, phase)
                # The first place knows one slice of this phase, the next one two, until all are known.
                counts = [min(i, last) if phase else last for i in range(schedule.places - first)]
                parts = [sums[i].x[:, rows, columns] for i in counts]
                known.append(sums[0]._replace(x=torch.stack(parts, dim=3)))
            x = self._mix(psi, code, known, level, range(schedule.places))
            for place in range(schedule.places):
                step = 1 + level * schedule.places + place
                put(step, self._head(x, place, step, unit))
        return whole

    def _with_slice(self, known: Fixed, y_hat: Tensor, s: int, unit: Unit) -> Fixed:
        """known (B, H, W, d) plus the embedded latents y_hat (B, H·W, C) of slice s, on the grid ``wide_known``."""
        y = self.embed[s](unit.of(self.schedule.channels[s]).features(y_hat), self.wide_known)
        return self.wide_known.add(known, y._replace(x=y.x.reshape(known.x.shape)))

    def _coarsest(self, psi: Fixed, code: Tensor, unit: Unit) -> Prediction:
        rows, columns, _ = self.schedule.order[0]
        answer = self.coarsest(psi._replace(x=psi.x[:, rows, columns]), code, self.answer)
        return unit.of(self.schedule.channels_of(0)).prediction(answer)

    def _mix(self, psi: Fixed, code: Tensor, known: list[Fixed], level: int, places: range) -> Fixed:
        """Of the places of a scale (B, H, W, n, d), H x W cells, on the grid ``narrow``.

        ``known`` holds, for each phase of the cells that is known, (B, H, W, m, d) for the last m of the places.
        """
        first, end = (1 + level * self.schedule.places + place for place in (places.start, places.stop))
        tokens = []
        for step in range(first, end):
            rows, columns, slices = self.schedule.order[step]
            tokens.append(self.psi[slices[0]](psi._replace(x=psi.x[:, rows, columns]), self.wide).x)
        own = self.wide.constant(self.step[first - 1 : end - 1])
        quality = self.quality.fixed(code, self.wide)
        own = self.wide.add(own, quality._replace(x=quality.x[:, None]))  # (B, n, d)
        x = self.wide.add(self.wide.wrap(torch.stack(tokens, dim=3)), own._replace(x=own.x[:, None, None]))
        for around, part, known_from in zip(self.around, known, self.known_from, strict=False):
            before = max(known_from - places.start, 0)
            offset = level * (self.schedule.places - known_from) - known_from
            kernels = slice(offset + places.start + before, offset + places.stop)
            y = around(part, self.wide, kernels)
            x = self.wide.add(x, y._replace(x=F.pad(y.x, (0, 0, before, 0))))
        for block in self.blocks:
            x = block(x, self.wide, slice(first - 1, end - 1))
        return self.narrow(x)

    def _head(self, x: Fixed, position: int, step: int, unit: Unit) -> Prediction:
        """Predictions of a step from what was computed for n steps, of which it is the one at ``position``."""
        s = self.schedule.order[step].slices[0]
        answer = self.head[s](x._replace(x=x.x[:, :, :, position].flatten(1, 2)), self.answer)
        return unit.of(self.schedule.channels[s]).prediction(answer)
