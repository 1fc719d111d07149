"""GroupedMixer (Li et al. 2024, arXiv 2405.01170): grouped transformer context model with attention caching.

The latents are cut into channel slices x 2 x 2 spatial phases, coded group by group, slices first. The input token
of group g at a cell (2x2 latent positions) embeds the latents of group g-1 and psi at group g's own position.
Inner-group mixers attend inside a group over windows of cells, shifted every other time; cross-group mixers attend,
at the same cell, to the tokens of groups up to g. Weights are shared over the groups, except for small depthwise
kernels that give each group its own neighbourhood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lic.exact import Depthwise, Fixed, Grid, Linear, QualityTable, attend
from lic.model.config import Config
from lic.model.context.attention import Attention, Windows
from lic.model.context.base import Context, Geometry, Options, Prediction, Unit, check_channels
from lic.model.layers import NARROW, WIDE, FeedForward, near_zero

PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))  # row and column inside a cell, in coding order


@dataclass(frozen=True)
class GroupedMixerOptions(Options):
    """Sizes of the model."""

    slices: Sequence[int]  # latent channels of each slice, in order of energy
    width: int
    heads: int
    mixers: int  # pairs of inner-group and cross-group mixers
    window: int  # side of the inner-group attention windows, in cells of 32x32 pixels

    def check(self, config: Config) -> None:
        check_channels(self.slices, config)


class GroupSchedule:
    """Channel slices x 4 spatial phases, slice-major; one stream a step."""

    def __init__(self, slices: Sequence[int]) -> None:
        edges = [sum(slices[:i]) for i in range(len(slices) + 1)]
        self.channels = [slice(a, b) for a, b in pairwise(edges)]

    def steps(self, geometry: Geometry) -> int:
        return self.groups

    @property
    def groups(self) -> int:
        return len(self.channels) * len(PHASES)

    def stream_of(self, step: int) -> int:
        return step

    def slice_of(self, step: int) -> int:
        return step // len(PHASES)

    def first_grid(self, geometry: Geometry) -> tuple[int, int]:
        return geometry.height // 2, geometry.width // 2

    def take(self, y: Tensor, step: int) -> Tensor:
        i, j = PHASES[step % len(PHASES)]
        return y[:, i::2, j::2, self.channels[self.slice_of(step)]].flatten(1, 2)

    def put(self, y: Tensor, step: int, values: Tensor) -> None:
        i, j = PHASES[step % len(PHASES)]
        target = y[:, i::2, j::2, self.channels[self.slice_of(step)]]
        target.copy_(values.reshape(target.shape))


@dataclass
class GroupedMixerState:
    """cells = (h/2, w/2), G groups, d the context width.

    tokens (B, h/2, w/2, G, d): input tokens, complete up to the next group; keys and values: for every cross-group
    mixer (B, h/2, w/2, G, d), of the groups predicted so far; unit: (B, M).
    """

    tokens: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    unit: Unit


class InnerMixer(nn.Module):
    """Depthwise 3x3 of each group's own, windowed self-attention with relative positions, feed-forward."""

    index: Tensor  # (window², window²): entry of the table of relative positions for query and key

    def __init__(self, options: GroupedMixerOptions, groups: int, shifted: bool) -> None:
        super().__init__()
        width = options.width
        window = options.window
        shift = window // 2 if shifted else 0
        self.windows = Windows(window, window, shift, shift)
        self.narrow = Grid(NARROW)
        self.spatial = Depthwise(width, groups)
        nn.init.normal_(self.spatial.weight, std=0.05)
        self.attention = Attention(options.width, options.heads)
        side = 2 * window - 1
        self.bias = nn.Parameter(torch.zeros(side * side, options.heads))
        position = torch.arange(window**2)
        row, column = position // window, position % window
        index = (row[:, None] - row + window - 1) * side + column[:, None] - column + window - 1
        self.register_buffer("index", index, persistent=False)
        self.feed = FeedForward(width)

    def forward(self, x: Fixed, first: int, wide: Grid) -> Fixed:
        """x (B, H, W, n, d): tokens of groups first..first+n-1."""
        groups = slice(first, first + x.x.shape[3])
        x = wide.add(x, self.spatial(self.narrow(x), wide, groups))
        q, k, v = (self.windows.cut(part, self.attention.heads) for part in self.attention.project(x))
        inside = self.windows.inside(x.x)
        mask = None if inside is None else inside[:, :, None, None, None]
        y = attend(q, k, v, self.bias[self.index].permute(2, 0, 1), mask, wide.exact)
        x = wide.add(x, self.attention.out(self.windows.join(y, x.x.shape), wide))
        return self.feed(x, wide)


class CrossMixer(nn.Module):
    """Attention at the same cell to the groups up to the token's own, feed-forward."""

    def __init__(self, options: GroupedMixerOptions, groups: int) -> None:
        super().__init__()
        self.attention = Attention(options.width, options.heads)
        self.bias = nn.Parameter(torch.zeros(options.heads, groups, groups))
        self.feed = FeedForward(options.width)

    def forward(self, x: Fixed, first: int, wide: Grid, cache: tuple[Tensor, Tensor] | None) -> Fixed:
        """x (B, H, W, n, d): tokens of groups first..; cache: keys and values of all groups, which receive theirs."""
        n = x.x.shape[3]
        last = first + n
        q, k, v = self.attention.project(x)
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, :, first:last] = new.x
            k, v = (t._replace(x=kept[:, :, :, :last]) for t, kept in zip((k, v), cache, strict=True))
        q, k, v = (t._replace(x=t.x.unflatten(-1, (self.attention.heads, -1)).transpose(3, 4)) for t in (q, k, v))
        causal = torch.ones(n, last, dtype=torch.bool, device=x.x.device).tril(first) if n > 1 else None
        y = attend(q, k, v, self.bias[:, first:last, :last], causal, wide.exact)
        x = wide.add(x, self.attention.out(y._replace(x=y.x.transpose(3, 4).flatten(-2)), wide))
        return self.feed(x, wide)


class GroupedMixer(Context):
    """See the module's description. Groups G = slices x 4."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        options = GroupedMixerOptions.of(config)
        self.schedule: GroupSchedule = GroupSchedule(options.slices)
        groups, width = self.schedule.groups, options.width
        self.wide, self.narrow = Grid(WIDE), Grid(NARROW)
        self.embed = nn.ModuleList(Linear(2 * c, width) for c in options.slices)
        self.psi = nn.ModuleList(Linear(config.psi, width) for _ in options.slices)
        self.group = nn.Parameter(torch.randn(groups, width) * 0.1)
        self.quality = QualityTable(config.knots, width)
        pairs = range(options.mixers)
        self.inner = nn.ModuleList(InnerMixer(options, groups, shifted=i % 2 == 1) for i in pairs)
        self.cross = nn.ModuleList(CrossMixer(options, groups) for _ in pairs)
        # Step 0 predicts each channel's own standard deviation.
        self.head = nn.ModuleList(near_zero(Linear(width, 2 * c)) for c in options.slices)

    def start(self, psi: Fixed, geometry: Geometry, code: Tensor, unit: Unit) -> GroupedMixerState:
        tokens = []
        quality = self.quality.fixed(code, self.wide)
        for step in range(self.schedule.groups):
            i, j = PHASES[step % len(PHASES)]
            part = psi._replace(x=psi.x[:, i::2, j::2])
            own = self.wide.add(self.wide.constant(self.group[step]), quality)  # (B, d)
            token = self.psi[self.schedule.slice_of(step)](part, self.wide)
            tokens.append(self.wide.add(token, own._replace(x=own.x[:, None, None])).x)
        stacked = torch.stack(tokens, dim=3)
        keys, values = ([torch.zeros_like(stacked) for _ in self.cross] for _ in range(2))
        return GroupedMixerState(stacked, keys, values, unit)

    def predict(self, state: GroupedMixerState, step: int) -> Prediction:
        token = self.wide.wrap(state.tokens[:, :, :, step : step + 1])
        x = self._mix(token, step, list(zip(state.keys, state.values, strict=True)))
        return self._head(x, 0, step, state.unit)

    def observe(self, state: GroupedMixerState, step: int, y_hat: Tensor) -> GroupedMixerState:
        if step + 1 < self.schedule.groups:
            token = state.tokens[:, :, :, step + 1]
            known = self._embed(y_hat, step, state.unit)
            known = known._replace(x=known.x.reshape(token.shape))
            token.copy_(self.wide.add(self.wide.wrap(token), known).x)
        return state

    def teacher(self, psi: Fixed, y_hat: Tensor, code: Tensor, unit: Unit) -> Prediction:
        b, h, w, _ = y_hat.shape
        tokens = self.start(psi, Geometry(b, h, w), code, unit).tokens
        known = [torch.zeros_like(tokens[:, :, :, 0])]
        for step in range(self.schedule.groups - 1):
            known.append(self._embed(self.schedule.take(y_hat, step), step, unit).x.reshape(known[0].shape))
        x = self.wide.add(self.wide.wrap(tokens), self.wide.wrap(torch.stack(known, dim=3)))
        x = self._mix(x, 0, None)
        whole = Prediction(torch.empty_like(y_hat), torch.empty_like(y_hat))
        for step in range(self.schedule.groups):
            for all_of_it, part in zip(whole, self._head(x, step, step, unit), strict=True):
                self.schedule.put(all_of_it, step, part)
        return whole

    def _embed(self, y_hat: Tensor, step: int, unit: Unit) -> Fixed:
        s = self.schedule.slice_of(step)
        return self.embed[s](unit.of(self.schedule.channels[s]).features(y_hat), self.wide)

    def _mix(self, x: Fixed, first: int, caches: list[tuple[Tensor, Tensor]] | None) -> Fixed:
        for i, (inner, cross) in enumerate(zip(self.inner, self.cross, strict=True)):
            x = cross(inner(x, first, self.wide), first, self.wide, None if caches is None else caches[i])
        return self.narrow(x)

    def _head(self, x: Fixed, position: int, step: int, unit: Unit) -> Prediction:
        """Predictions of a step from the tokens (B, h/2, w/2, n, d), of which its own is at ``position``."""
        s = self.schedule.slice_of(step)
        answer = self.head[s](x._replace(x=x.x[:, :, :, position].flatten(1, 2)), self.answer)
        return unit.of(self.schedule.channels[s]).prediction(answer)
