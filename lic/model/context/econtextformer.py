"""Efficient Contextformer (Koyuncu et al. 2024, arXiv 2306.14287): spatio-channel attention in shifted windows.

A token is a latent position and a channel segment. The tokens are coded in groups, one half of the checkerboard of
positions and one segment each. Every layer attends, within windows over all segments, to the tokens of earlier
groups; the windows of every other layer are shifted by half a window.

What follows the paper: the grouping by patches, checkerboard and channels; shifted-window spatio-channel attention
that is causal by groups in every layer; only groups coded so far enter, so that the attention span grows from step to
step; keys and values are kept; the first group is predicted from the hyperprior alone. What is our own: a token's
state x holds psi and what its group may know, and predicts the token's latents. Once they are known, their embedding e
joins, and keys and values of every layer are made of x + e. So x is computed once, nothing that predicts a latent has
seen it, and what others attend to deepens from layer to layer as x does. Attention is causal because it computes no
more than the span, not by a mask. Positions are relative, in rows, columns and segments. The first group passes
through the feed-forward parts only. Layers are made for integers (no normalisation), and sizes are not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from lic.exact import Fixed, Grid, Linear, QualityTable, attend
from lic.model.config import Config
from lic.model.context.attention import Attention, Windows
from lic.model.context.base import Context, Geometry, Options, Prediction, Unit, check_channels
from lic.model.layers import NARROW, WIDE, FeedForward, near_zero

BLOCK = 64  # keys whose weighted values float32 sums exactly
ORDERS = ("channel", "spatial")


@dataclass(frozen=True)
class EContextformerOptions(Options):
    """Sizes of the model."""

    segments: Sequence[int]  # latent channels of each segment, in order of energy
    order: str  # "channel": all segments of one half, then of the other; "spatial": both halves of each segment
    width: int
    heads: int
    layers: int
    window: int  # side of the attention windows in latent positions, a multiple of 4

    def check(self, config: Config) -> None:
        check_channels(self.segments, config)
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {self.order!r}")
        if self.window % 4:
            raise ValueError(f"windows of {self.window} positions: must be a multiple of 4")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads in a width of {self.width}")


class CheckerboardSchedule:
    """Channel segments x halves of the checkerboard; one stream a step.

    Half 0 holds the positions whose row and column add up to an even number. ``groups``: segment and half of each.
    """

    def __init__(self, segments: Sequence[int], order: str) -> None:
        edges = [sum(segments[:i]) for i in range(len(segments) + 1)]
        self.channels = [slice(a, b) for a, b in pairwise(edges)]
        self.groups = [(s, half) for s in range(len(segments)) for half in range(2)]
        if order == "channel":
            self.groups.sort(key=lambda group: group[1])

    def steps(self, geometry: Geometry) -> int:
        return len(self.groups)

    def stream_of(self, step: int) -> int:
        return step

    def first_grid(self, geometry: Geometry) -> None:
        return None

    def take(self, y: Tensor, step: int) -> Tensor:
        segment, half = self.groups[step]
        return positions_of(y[..., self.channels[segment]], half).flatten(1, 2)

    def put(self, y: Tensor, step: int, values: Tensor) -> None:
        segment, half = self.groups[step]
        pairs = y[..., self.channels[segment]].unflatten(2, (-1, 2))
        rows = values.reshape(y.shape[0], -1, 2, pairs.shape[2], values.shape[-1])
        for parity in range(2):
            pairs[:, parity::2, :, (half + parity) % 2] = rows[:, :, parity]


def positions_of(x: Tensor, half: int) -> Tensor:
    """(B, h, w, C) -> (B, h, w/2, C): the positions of one half of the checkerboard."""
    pairs = x.unflatten(2, (-1, 2))
    rows = [pairs[:, parity::2, :, (half + parity) % 2] for parity in range(2)]
    return torch.stack(rows, dim=2).flatten(1, 2)


def relative_positions(groups: Sequence[tuple[int, int]], window: int) -> Tensor:
    """Entry of the table of relative positions for every query and key of a window, (G·window²/2, G·window²/2).

    Tokens are in the order (group, row, column). Entries count segments, then rows, then columns of difference.
    """
    row, pair = torch.meshgrid(torch.arange(window), torch.arange(window // 2), indexing="ij")
    segment, rows, columns = (
        torch.stack(t).flatten()
        for t in (
            [torch.full_like(row, s) for s, _ in groups],
            [row for _ in groups],
            [2 * pair + (row + half) % 2 for _, half in groups],
        )
    )
    index = torch.zeros(len(segment), len(segment), dtype=torch.long)
    for part, size in ((segment, int(segment.max()) + 1), (rows, window), (columns, window)):
        index = index * (2 * size - 1) + part[:, None] - part + size - 1
    return index


@dataclass
class EContextformerState:
    """G groups, d the context width, P = window²/2 positions of a group in a window, D = d / heads.

    tokens (B, h, w/2, G, d): input tokens; inputs: what entered each layer for the group predicted last, each
    (B, h, w/2, 1, d); keys and values: of each layer in its own windows, (B, rows, columns, heads, (G - 1)·P, D), of
    the groups observed so far, zeros elsewhere; unit (B, M).
    """

    tokens: Tensor
    inputs: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    unit: Unit


class Layer(nn.Module):
    """Attention to the tokens of earlier groups in the same window, feed-forward."""

    index: Tensor  # entry of the table of relative positions for query and key

    def __init__(self, options: EContextformerOptions, index: Tensor, shifted: bool) -> None:
        super().__init__()
        side, segments = options.window, len(options.segments)
        shift = side // 2 if shifted else 0
        self.windows = Windows(side, side // 2, shift, shift // 2)  # of every second column
        self.positions = side * side // 2
        self.attention = Attention(options.width, options.heads)
        self.bias = nn.Parameter(torch.zeros((2 * segments - 1) * (2 * side - 1) ** 2, options.heads))
        self.register_buffer("index", index, persistent=False)
        self.feed = FeedForward(options.width)

    def cut(self, v: Fixed) -> Fixed:
        """(B, h, w/2, n, d) -> (B, rows of windows, columns of windows, heads, n·P, D)."""
        v = self.windows.cut(v, self.attention.heads)
        return v._replace(x=v.x.transpose(3, 4).flatten(4, 5))

    def keys_and_values(self, x: Fixed) -> tuple[Fixed, Fixed]:
        """In windows, of tokens x (B, h, w/2, n, d) that know their own latents."""
        x = self.attention.narrow(x)
        k, v = self.attention.k(x, self.attention.k_grid), self.attention.v(x, self.attention.v_grid)
        return self.cut(k), self.cut(v)

    def forward(self, x: Fixed, first: int, k: Fixed, v: Fixed, wide: Grid) -> Fixed:
        """x (B, h, w/2, n, d): tokens of groups first..first+n-1; k and v in windows, of the groups before the last."""
        start = max(first, 1)  # group 0 has nothing to attend to
        later = x._replace(x=x.x[:, :, :, start - first :])
        if later.x.shape[3]:
            later = wide.add(later, self.attention.out(self.attended(later, start, k, v, wide.exact), wide))
            x = later if first else x._replace(x=torch.cat([x.x[:, :, :, :1], later.x], dim=3))
        return self.feed(x, wide)

    def attended(self, x: Fixed, first: int, k: Fixed, v: Fixed, exact: bool) -> Fixed:
        """Results of attention (B, h, w/2, n, d), before they are projected; first > 0."""
        q = self.cut(self.attention.q(self.attention.narrow(x), self.attention.q_grid))
        inside, size, results = self.windows.inside(x.x), self.positions, []
        for i in range(x.x.shape[3]):
            group = first + i
            own, past = slice(i * size, (i + 1) * size), slice(0, group * size)
            mask = None if inside is None else inside.repeat(1, 1, group)[:, :, None, None]
            bias = self.bias[self.index[group * size : (group + 1) * size, past]].permute(2, 0, 1)
            query, keys, values = (t._replace(x=t.x[..., part, :]) for t, part in ((q, own), (k, past), (v, past)))
            results.append(attend(query, keys, values, bias, mask, exact, BLOCK))
        joined = torch.stack([y.x for y in results], dim=3)
        return self.windows.join(results[0]._replace(x=joined), x.x.shape)


class EContextformer(Context):
    """See the module's description. Groups G = 2 · segments."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        options = EContextformerOptions.of(config)
        self.schedule: CheckerboardSchedule = CheckerboardSchedule(options.segments, options.order)
        groups, width = self.schedule.groups, options.width
        self.wide, self.narrow = Grid(WIDE), Grid(NARROW)
        self.psi = nn.ModuleList(Linear(config.psi, width) for _ in options.segments)
        self.group = nn.Parameter(torch.randn(len(groups), width) * 0.1)
        self.quality = QualityTable(config.knots, width)
        self.embed = nn.ModuleList(Linear(2 * c, width) for c in options.segments)
        index = relative_positions(groups, options.window)
        layers = nn.ModuleList(Layer(options, index, shifted=i % 2 == 1) for i in range(options.layers))
        self.layers = cast(Sequence[Layer], layers)
        # Step 0 predicts each channel's own standard deviation.
        self.head = nn.ModuleList(near_zero(Linear(width, 2 * c)) for c in options.segments)

    def start(self, psi: Fixed, geometry: Geometry, code: Tensor, unit: Unit) -> EContextformerState:
        tokens = self.input_tokens(psi, code)
        keys, values = (
            [torch.zeros_like(layer.cut(tokens._replace(x=tokens.x[:, :, :, 1:])).x) for layer in self.layers]
            for _ in range(2)
        )
        return EContextformerState(tokens.x, [], keys, values, unit)

    def predict(self, state: EContextformerState, step: int) -> Prediction:
        x = self.wide.wrap(state.tokens[:, :, :, step : step + 1])
        state.inputs = []
        for layer, keys, values in zip(self.layers, state.keys, state.values, strict=True):
            state.inputs.append(x.x)
            k, v = layer.attention.k_grid.wrap(keys), layer.attention.v_grid.wrap(values)
            x = layer(x, step, k, v, self.wide)
        return self.prediction(x, 0, step, state.unit)

    def observe(self, state: EContextformerState, step: int, y_hat: Tensor) -> EContextformerState:
        if step + 1 < len(self.schedule.groups):
            known = self.embedding(y_hat, step, state.unit)
            for layer, x, keys, values in zip(self.layers, state.inputs, state.keys, state.values, strict=True):
                token = self.wide.add(self.wide.wrap(x), known._replace(x=known.x.reshape(x.shape)))
                own = slice(step * layer.positions, (step + 1) * layer.positions)
                for kept, new in zip((keys, values), layer.keys_and_values(token), strict=True):
                    kept[..., own, :] = new.x
        return state

    def teacher(self, psi: Fixed, y_hat: Tensor, code: Tensor, unit: Unit) -> Prediction:
        x = self.input_tokens(psi, code)
        known = []
        for step in range(len(self.schedule.groups) - 1):
            embedded = self.embedding(self.schedule.take(y_hat, step), step, unit).x
            known.append(embedded.reshape(x.x[:, :, :, 0].shape))
        embeddings = self.wide.wrap(torch.stack(known, dim=3))
        for layer in self.layers:
            earlier = self.wide.add(x._replace(x=x.x[:, :, :, :-1]), embeddings)
            x = layer(x, 0, *layer.keys_and_values(earlier), self.wide)
        whole = Prediction(torch.empty_like(y_hat), torch.empty_like(y_hat))
        for step in range(len(self.schedule.groups)):
            for all_of_it, part in zip(whole, self.prediction(x, step, step, unit), strict=True):
                self.schedule.put(all_of_it, step, part)
        return whole

    def input_tokens(self, psi: Fixed, code: Tensor) -> Fixed:
        """What every token knows from the start: psi, its group and the quality. (B, h, w/2, G, d)."""
        quality = self.quality.fixed(code, self.wide)
        tokens = []
        for step, (segment, half) in enumerate(self.schedule.groups):
            own = self.wide.add(self.wide.constant(self.group[step]), quality)  # (B, d)
            token = self.psi[segment](psi._replace(x=positions_of(psi.x, half)), self.wide)
            tokens.append(self.wide.add(token, own._replace(x=own.x[:, None, None])).x)
        return self.wide.wrap(torch.stack(tokens, dim=3))

    def embedding(self, y_hat: Tensor, step: int, unit: Unit) -> Fixed:
        """Latents (B, P, C) of a step -> (B, P, d)."""
        segment, _ = self.schedule.groups[step]
        return self.embed[segment](unit.of(self.schedule.channels[segment]).features(y_hat), self.wide)

    def prediction(self, x: Fixed, position: int, step: int, unit: Unit) -> Prediction:
        """Predictions of a step from the tokens (B, h, w/2, n, d), of which its own is at ``position``."""
        segment, _ = self.schedule.groups[step]
        token = self.narrow(x._replace(x=x.x[:, :, :, position].flatten(1, 2)))
        return unit.of(self.schedule.channels[segment]).prediction(self.head[segment](token, self.answer))
