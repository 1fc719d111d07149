"""GroupedMixer (Li et al. 2024, arXiv 2405.01170): grouped transformer context model with attention caching.

The latents are cut into channel slices x 2 x 2 spatial phases, coded group by group, slices first. The input token
of group g at a cell (2x2 latent positions) embeds the latents of group g-1 and psi at group g's own position.
Inner-group mixers attend inside a group over windows of cells, shifted every other time; cross-group mixers attend,
at the same cell, to the tokens of groups up to g. Weights are shared over the groups, except for small depthwise
kernels that give each group its own neighbourhood.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic.model.config import Config
from lic.model.context.base import Context, Geometry, features, to_steps
from lic.model.layers import FeedForward, QualityTable, attend, depthwise

PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))  # row and column inside a cell, in coding order


class GroupSchedule:
    """Channel slices x 4 spatial phases, slice-major; one stream a step."""

    def __init__(self, slices: tuple[int, ...]) -> None:
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

    tokens (B, h/2, w/2, G, d): input tokens, complete up to the next group; cache: for every cross-group mixer
    (B, h/2, w/2, G, 2·d), keys and values of the groups predicted so far; unit (B, M).
    """

    tokens: Tensor
    cache: list[Tensor]
    unit: Tensor


class InnerMixer(nn.Module):
    """Depthwise 3x3 of each group's own, windowed self-attention with relative positions, feed-forward."""

    index: Tensor  # (window², window²): entry of the table of relative positions for query and key

    def __init__(self, config: Config, groups: int, shifted: bool) -> None:
        super().__init__()
        width = config.context_width
        self.heads, self.window = config.context_heads, config.window
        self.shift = config.window // 2 if shifted else 0
        self.spatial = nn.Parameter(torch.randn(groups, 3, 3, width) * 0.05)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.normal_(self.out.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.out.bias)
        side = 2 * self.window - 1
        self.bias = nn.Parameter(torch.zeros(side * side, self.heads))
        position = torch.arange(self.window**2)
        row, column = position // self.window, position % self.window
        index = (row[:, None] - row + self.window - 1) * side + column[:, None] - column + self.window - 1
        self.register_buffer("index", index, persistent=False)
        self.feed = FeedForward(width)

    def forward(self, x: Tensor, first: int) -> Tensor:
        """x (B, H, W, n, d): tokens of groups first..first+n-1."""
        b, h, w, n, d = x.shape
        kernel = self.spatial[first : first + n].permute(1, 2, 0, 3).reshape(3, 3, n * d)
        x = x + depthwise(x.reshape(b, h, w, n * d), kernel).reshape(x.shape)
        x = x + self.out(self._attention(x))
        return x + self.feed(x)

    def _attention(self, x: Tensor) -> Tensor:
        b, h, w, n, d = x.shape
        s, k = self.shift, self.window
        below, right = -(h + s) % k, -(w + s) % k
        qkv = F.pad(self.qkv(x), (0, 0, 0, 0, s, right, s, below))
        nh, nw = (h + s + below) // k, (w + s + right) // k
        mask = None
        if s or below or right:
            inside = F.pad(x.new_ones(h, w, dtype=torch.bool), (s, right, s, below))
            mask = inside.reshape(nh, k, nw, k).transpose(1, 2).reshape(nh, nw, 1, 1, 1, k * k)
        qkv = qkv.reshape(b, nh, k, nw, k, n, 3, self.heads, d // self.heads)
        qkv = qkv.permute(6, 0, 1, 3, 5, 7, 2, 4, 8).flatten(-3, -2)  # (3, B, nh, nw, n, heads, k·k, d/heads)
        q, key, v = qkv.unbind(0)
        y = attend(q, key, v, self.bias[self.index].permute(2, 0, 1), mask)
        y = y.unflatten(-2, (k, k)).permute(0, 1, 5, 2, 6, 3, 4, 7)  # (B, nh, k, nw, k, n, heads, d/heads)
        return y.reshape(b, nh * k, nw * k, n, d)[:, s : s + h, s : s + w]


class CrossMixer(nn.Module):
    """Attention at the same cell to the groups up to the token's own, feed-forward."""

    def __init__(self, config: Config, groups: int) -> None:
        super().__init__()
        width = config.context_width
        self.heads = config.context_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.normal_(self.out.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.out.bias)
        self.bias = nn.Parameter(torch.zeros(self.heads, groups, groups))
        self.feed = FeedForward(width)

    def forward(self, x: Tensor, first: int, cache: Tensor | None) -> Tensor:
        """x (B, H, W, n, d): tokens of groups first..; cache (B, H, W, G, 2·d) receives their keys and values."""
        n = x.shape[3]
        last = first + n
        q, kv = self.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], dim=-1)
        if cache is not None:
            cache[:, :, :, first:last] = kv
            kv = cache[:, :, :, :last]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(3, 4) for t in (q, *kv.chunk(2, dim=-1)))
        causal = torch.ones(n, last, dtype=torch.bool, device=x.device).tril(first) if n > 1 else None
        y = attend(q, k, v, self.bias[:, first:last, :last], causal)
        x = x + self.out(y.transpose(3, 4).flatten(-2))
        return x + self.feed(x)


class GroupedMixer(Context):
    """See the module's description. Groups G = slices x 4."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.schedule: GroupSchedule = GroupSchedule(config.slices)
        groups, width = self.schedule.groups, config.context_width
        self.embed = nn.ModuleList(nn.Linear(2 * c, width) for c in config.slices)
        self.psi = nn.ModuleList(nn.Linear(config.psi, width) for _ in config.slices)
        self.group = nn.Parameter(torch.randn(groups, width) * 0.1)
        self.quality = QualityTable(config.knots, width)
        pairs = range(config.context_mixers)
        self.inner = nn.ModuleList(InnerMixer(config, groups, shifted=i % 2 == 1) for i in pairs)
        self.cross = nn.ModuleList(CrossMixer(config, groups) for _ in pairs)
        heads = [nn.Linear(width, 2 * c) for c in config.slices]
        for head in heads:  # step 0 predicts each channel's own standard deviation
            nn.init.normal_(head.weight, std=0.1 * width**-0.5)
            nn.init.zeros_(head.bias)
        self.head = nn.ModuleList(heads)

    def start(self, psi: Tensor, geometry: Geometry, code: Tensor, unit: Tensor) -> GroupedMixerState:
        tokens = []
        for step in range(self.schedule.groups):
            i, j = PHASES[step % len(PHASES)]
            tokens.append(self.psi[self.schedule.slice_of(step)](psi[:, i::2, j::2]) + self.group[step])
        stacked = torch.stack(tokens, dim=3) + self.quality(code)[:, None, None, None].to(psi.dtype)
        cache = [stacked.new_zeros(*stacked.shape[:-1], 2 * stacked.shape[-1]) for _ in self.cross]
        return GroupedMixerState(stacked, cache, unit)

    def predict(self, state: GroupedMixerState, step: int) -> tuple[Tensor, Tensor]:
        x = self._mix(state.tokens[:, :, :, step : step + 1], step, state.cache)
        return self._head(x.squeeze(3), step, state.unit)

    def observe(self, state: GroupedMixerState, step: int, y_hat: Tensor) -> GroupedMixerState:
        if step + 1 < self.schedule.groups:
            token = state.tokens[:, :, :, step + 1]
            token += self._embed(y_hat, step, state.unit).reshape(token.shape)
        return state

    def teacher(self, psi: Tensor, y_hat: Tensor, code: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        b, h, w, _ = y_hat.shape
        state = self.start(psi, Geometry(b, h, w), code, unit)
        known = [torch.zeros_like(state.tokens[:, :, :, 0])]
        for step in range(self.schedule.groups - 1):
            known.append(self._embed(self.schedule.take(y_hat, step), step, unit).reshape(known[0].shape))
        x = self._mix(state.tokens + torch.stack(known, dim=3), 0, None)
        mean, log_scale = torch.empty_like(y_hat), torch.empty_like(y_hat)
        for step in range(self.schedule.groups):
            m, s = self._head(x[:, :, :, step], step, unit)
            self.schedule.put(mean, step, m)
            self.schedule.put(log_scale, step, s)
        return mean, log_scale

    def _embed(self, y_hat: Tensor, step: int, unit: Tensor) -> Tensor:
        s = self.schedule.slice_of(step)
        return self.embed[s](features(y_hat, unit[:, None, self.schedule.channels[s]]))

    def _mix(self, x: Tensor, first: int, cache: list[Tensor] | None) -> Tensor:
        for i, (inner, cross) in enumerate(zip(self.inner, self.cross, strict=True)):
            x = cross(inner(x, first), first, None if cache is None else cache[i])
        return x

    def _head(self, x: Tensor, step: int, unit: Tensor) -> tuple[Tensor, Tensor]:
        s = self.schedule.slice_of(step)
        prediction = self.head[s](x.flatten(1, 2))  # (B, P, 2·C)
        return to_steps(prediction, unit[:, None, self.schedule.channels[s]])
