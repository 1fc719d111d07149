"""The entropy path in int64, without torch: what `layers` and the context model must compute, written a second time.

For tests, and for who wants to read bitstream_spec.md chapter 5 as code. Nothing in lic uses it. Activations are int64
arrays in units of 2**-bits, channels last; numbers in parentheses are sections of the specification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lic.exact.tables import EXP, EXP2, LOG
from lic.quality import MAX_CODE

Array = npt.NDArray[np.int64]
Reals = npt.NDArray[np.floating[Any]]

INDEX_FACTOR = 133144  # scale indices in an answer of 1/1024, times 2**24
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))


def rounded(a: Array, bits: Array | int) -> Array:
    """round(a / 2**bits), halves to even (5.1), for |a| < 2**38.

    Below -24 bits count as -24: every number but 0 is then beyond the limits that results are clamped to.
    """
    right, left = np.clip(bits, 0, 60), np.clip(-np.asarray(bits), 0, 24)
    down = a >> right
    twice = (a - (down << right)) << 1
    up = (twice > 1 << right) | ((twice == 1 << right) & (down & 1 == 1))
    return (down + up) << left


def clamp(a: Array, limit: int) -> Array:
    """a limited to -limit..limit (5.1)."""
    return np.clip(a, -limit, limit)


def divide(n: Array, d: Array | int) -> Array:
    """⌊(2n + d) / 2d⌋, d > 0 (5.1)."""
    return (2 * n + d) // (2 * np.asarray(d))


def integers(p: Reals, bits: Array | int) -> Array:
    """round(p · 2**bits) of parameters that are float32, halves to even (5.1); float64 holds the products."""
    return np.rint(np.ldexp(p.astype(np.float64), bits)).astype(np.int64)


def rescale(a: Array, bits_in: int, grid_bits: int, limit: int) -> Array:
    """to: clamp(round(a · 2**(grid_bits - bits_in)), limit) (5.1)."""
    return clamp(rounded(a, bits_in - grid_bits), limit)


def add(a: Array, b: Array, limit: int) -> Array:
    """sum: clamp(a + b, limit) (5.1)."""
    return clamp(a + b, limit)


def constant(p: Reals, grid_bits: int, limit: int) -> Array:
    """param: clamp(round(p · 2**grid_bits), limit) (5.1)."""
    return clamp(integers(p, grid_bits), limit)


def linear(
    x: Array,
    weight: Array,
    exponent: Array,
    bias: Reals,
    bits_in: int,
    grid_bits: int,
    limit: int,
    leaky: bool = False,
) -> Array:
    """linear, linear_leaky (5.1): x (..., K), weight (N, K), exponent and bias (N,) -> (..., N).

    acc = Σ weight · x + round(bias · 2**(exponent + bits_in)), divided by 8 where it is negative if ``leaky``;
    clamp(round(acc · 2**(grid_bits - bits_in - exponent)), limit).
    """
    exponent = exponent.astype(np.int64)
    acc = x @ weight.T.astype(np.int64) + integers(bias, exponent + bits_in)
    shift = bits_in + exponent - grid_bits
    return clamp(rounded(acc, np.where(acc < 0, shift + 3, shift) if leaky else shift), limit)


def depthwise(x: Array, weight: Array, exponent: Array, bits_in: int, grid_bits: int, limit: int) -> Array:
    """depthwise (5.1): x (B, H, W, C), weight (3, 3, C), exponent (C,) -> (B, H, W, C).

    acc = Σ weight[i, j] · x[r + i - 1, c + j - 1]; clamp(round(acc · 2**(grid_bits - bits_in - exponent)), limit).
    """
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    acc = np.zeros_like(x)
    for i in range(3):
        for j in range(3):
            acc += padded[:, i : i + height, j : j + width] * weight[i, j]
    return clamp(rounded(acc, bits_in + exponent.astype(np.int64) - grid_bits), limit)


def interpolate(table: Array, code: Array, spacing: int) -> Array:
    """quality (5.1): integers (knots, C), code (B,) -> (B, C).

    k = min(⌊code / d⌋, knots - 2), t = code - k·d; ⌊(2·(T[k]·(d - t) + T[k+1]·t) + d) / 2d⌋.
    """
    k = np.minimum(code // spacing, len(table) - 2)
    t = (code - k * spacing)[:, None]
    return divide(table[k] * (spacing - t) + table[k + 1] * t, spacing)


def attend(
    q: Array, k: Array, v: Array, q_bits: int, k_bits: int, bias: Reals, mask: npt.NDArray[np.bool_] | None = None
) -> Array:
    """attend (5.1): q (..., Q, D), k and v (..., K, D), bias (..., Q, K) -> (..., Q, D).

    mask is True at keys that take part;
    logit = round(q·k · 2**(5 - s - q_bits - k_bits)) + round(32 · bias), s = ⌊⌊log₂ D⌋ / 2⌋;
    weight = EXP[min(255, max - logit)]; ⌊(2 Σ weight·v + Σ weight) / 2 Σ weight⌋.
    """
    s = int(math.log2(q.shape[-1])) // 2
    logit = rounded(q @ np.swapaxes(k, -1, -2), q_bits + k_bits + s - 5) + integers(bias, 5)
    taking_part = np.broadcast_to(np.True_ if mask is None else mask, logit.shape)
    largest = np.where(taking_part, logit, np.iinfo(np.int64).min).max(axis=-1, keepdims=True)
    weight = np.where(taking_part, EXP[np.clip(largest - logit, 0, 255)], 0)
    return divide(weight @ v, weight.sum(axis=-1, keepdims=True))


class Power(NamedTuple):
    """mantissa · 2**exponent, arrays of integers."""

    mantissa: Array
    exponent: Array


def power(log2: Array) -> Power:
    """power(l) = EXP2[l mod 4096] · 2**(⌊l / 4096⌋ - 14) (5.5)."""
    return Power(EXP2[log2 & 4095], (log2 >> 12) - 14)


def features(y: Array, log2: Array) -> Array:
    """features (5.5): latents (..., C) with 4096·log₂ of their units -> (..., 2·C) with 7 bits.

    x = clamp(round(ŷ · power(-l) · 1024), 16384); p = clamp(round(x / 8), 1023), g = sign(x) · LOG[|x|].
    """
    inverse = power(-log2)
    x = clamp(rounded(y * inverse.mantissa, -inverse.exponent - 10), 16384)
    return np.concatenate([clamp(rounded(x, 3), 1023), np.sign(x) * LOG[np.abs(x)]], axis=-1)


def prediction(answer: Array, log2: Array, index: Array) -> tuple[Array, Array]:
    """e and i (5.5): answers (..., 2·C) with 10 bits, units (..., C) -> mean in eighths, index of the scale (..., C).

    e = round(clamp(a · power(l) / 128, 2**20)); i = round of (b · 133144 + u) / 2**24, clamped to 0..63.
    """
    a, b = np.split(answer, 2, axis=-1)
    unit = power(log2)
    eighths = clamp(rounded(a * unit.mantissa, 7 - unit.exponent), 1 << 20)
    return eighths, np.clip(rounded(b * INDEX_FACTOR + index, 24), 0, 63)


def table_values() -> dict[str, list[Decimal]]:
    """The real numbers that the entries of EXP, LOG and EXP2 are rounded from (5.1), to 40 digits."""
    with localcontext() as context:
        context.prec = 40
        two = Decimal(2).ln()
        return {
            "EXP": [512 * (Decimal(-i) / 32).exp() for i in range(256)],
            "LOG": [128 * (1 + Decimal(i) / 128).ln() for i in range(16385)],
            "EXP2": [(two * (14 + Decimal(i) / 4096)).exp() for i in range(4096)],
        }


class Activation(NamedTuple):
    """Integers in units of 2**-bits."""

    x: Array
    bits: int


class Model:
    """h_s and GroupedMixer (5.4 to 5.7) on the arrays of a weights file: the table rows of given latents.

    Layers and grids go by their names in the weights file. Everything is computed at once for all cells, but group by
    group and window by window, without padding, masks or caches.
    """

    def __init__(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        options: Mapping[str, Any],
        grids: Mapping[str, int],
        non_local_heads: int = 0,
    ) -> None:
        """``options`` are ``context`` of the configuration."""
        self.arrays, self.grids = arrays, grids
        self.options, self.non_local_heads = options, non_local_heads

    def predict(self, z: Array, y: Array, code: int) -> tuple[Array, Array]:
        """z (h/4, w/4, hyper_latent), y (h, w, M) -> mean in eighths and index of the scale, (h, w, M)."""
        log2, index = (self._at(code, self.arrays[f"units.{name}"]) for name in ("log2", "index"))
        psi = self._hyper_synthesis(z, code)
        slices = np.split(np.arange(y.shape[-1]), np.cumsum(self.options["slices"])[:-1])
        groups = [(s, channels, i, j) for s, channels in enumerate(slices) for i, j in PHASES]
        wide, tokens = "context.wide", []
        for g, (s, _, i, j) in enumerate(groups):
            own = self._param(wide, self.arrays["context.group"][g])
            own = self._sum(wide, own, self._quality("context.quality", wide, code))
            token = self._linear(f"context.psi.{s}", Activation(psi.x[i::2, j::2], psi.bits), wide)
            token = self._sum(wide, token, own)
            if g:
                t, channels, i, j = groups[g - 1]
                known = Activation(features(y[i::2, j::2, channels], log2[channels]), 7)
                token = self._sum(wide, token, self._linear(f"context.embed.{t}", known, wide))
            tokens.append(token)
        for number in range(self.options["mixers"]):
            tokens = [self._inner(number, g, token) for g, token in enumerate(tokens)]
            tokens = self._cross(f"context.cross.{number}", tokens)
        eighths, scale_index = np.zeros_like(y), np.zeros_like(y)
        for token, (s, channels, i, j) in zip(tokens, groups, strict=True):
            answer = self._linear(f"context.head.{s}", self._to("context.narrow", token), "context.answer")
            own_units = log2[channels], index[channels]
            eighths[i::2, j::2, channels], scale_index[i::2, j::2, channels] = prediction(answer.x, *own_units)
        return eighths, scale_index

    def _hyper_synthesis(self, z: Array, code: int) -> Activation:
        x = self._linear("h_s.first", Activation(z, 0), "h_s.wide64")
        x = self._sum("h_s.wide64", x, self._quality("h_s.quality", "h_s.wide64", code))
        if self.non_local_heads:
            x = self._non_local("h_s.non_local", x, "h_s.wide64")
        x = self._to("h_s.narrow64", self._block("h_s.block64", x, "h_s.wide64"))
        x = _doubled(self._linear("h_s.up32", x, "h_s.wide32"))
        x = self._to("h_s.narrow32", self._block("h_s.block32", x, "h_s.wide32"))
        x = _doubled(self._linear("h_s.up16", x, "h_s.wide16"))
        x = self._to("h_s.narrow16", self._block("h_s.block16", x, "h_s.wide16"))
        return self._linear("h_s.last", x, "h_s.psi")

    def _non_local(self, name: str, x: Activation, wide: str) -> Activation:
        t = self._linear(f"{name}.inner", self._to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        t = self._linear(f"{name}.outer", self._depthwise(f"{name}.spatial", t, f"{name}.mixed", ...), f"{name}.branch")
        q, k, v = self._project(f"{name}.attention", x)
        height, width = x.x.shape[:2]
        y = np.zeros_like(v.x)
        for top in range(0, height, 16):
            for left in range(0, width, 16):
                block = slice(top, top + 16), slice(left, left + 16)
                heads = [self._heads(part.x[block], self.non_local_heads) for part in (q, k, v)]
                count = heads[0].shape[1]
                result = attend(heads[0], heads[1], heads[2], q.bits, k.bits, np.zeros((count, count)))
                y[block] = _whole(result).reshape(y[block].shape)
        seen = self._sum(wide, x, self._linear(f"{name}.attention.out", Activation(y, v.bits), wide))
        mask = self._linear(f"{name}.mask", self._to(f"{name}.joined", seen), f"{name}.gate")
        return self._sum(wide, x, self._to(wide, Activation(t.x * (mask.x + 512), t.bits + 10)))

    def _block(self, name: str, x: Activation, wide: str) -> Activation:
        t = self._linear(f"{name}.inner", self._to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        t = self._depthwise(f"{name}.spatial", t, f"{name}.mixed", ...)
        return self._feed(f"{name}.feed", self._sum(wide, x, self._linear(f"{name}.outer", t, wide)), wide)

    def _feed(self, name: str, x: Activation, wide: str) -> Activation:
        t = self._linear(f"{name}.expand", self._to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        return self._sum(wide, x, self._linear(f"{name}.reduce", t, wide))

    def _inner(self, number: int, g: int, x: Activation) -> Activation:
        """The tokens x (rows, columns, d) of group g."""
        name, wide = f"context.inner.{number}", "context.wide"
        spatial = self._depthwise(f"{name}.spatial", self._to(f"{name}.narrow", x), wide, g)
        x = self._sum(wide, x, spatial)
        q, k, v = self._project(f"{name}.attention", x)
        height, width = x.x.shape[:2]
        side = self.options["window"]
        first = -(side // 2) if number % 2 else 0
        y = np.zeros_like(x.x)
        for top in range(first, height, side):
            for left in range(first, width, side):
                window = slice(max(top, 0), top + side), slice(max(left, 0), left + side)
                row, column = (part[window].ravel() for part in np.indices((height, width)))
                row, column = (part[:, None] - part + side - 1 for part in (row, column))
                bias = self.arrays[f"{name}.bias"][row * (2 * side - 1) + column].transpose(2, 0, 1)
                heads = [self._heads(part.x[window], self.options["heads"]) for part in (q, k, v)]
                result = attend(heads[0], heads[1], heads[2], q.bits, k.bits, bias)
                y[window] = _whole(result).reshape(y[window].shape)
        x = self._sum(wide, x, self._linear(f"{name}.attention.out", Activation(y, v.bits), wide))
        return self._feed(f"{name}.feed", x, wide)

    def _cross(self, name: str, tokens: list[Activation]) -> list[Activation]:
        """The tokens (rows, columns, d) of all groups."""
        wide, results = "context.wide", []
        projected = [self._project(f"{name}.attention", x) for x in tokens]
        for g, x in enumerate(tokens):
            queries, keys, values = (
                np.stack([part.x.reshape(-1, part.x.shape[-1]) for part in parts], axis=1)  # (cells, groups, d)
                for parts in zip(*projected[: g + 1], strict=True)
            )
            heads = [
                np.stack([self._heads(cell, self.options["heads"]) for cell in part])
                for part in (queries[:, g:], keys, values)
            ]
            q, k, v = projected[g]
            bias = self.arrays[f"{name}.bias"][:, g : g + 1, : g + 1]
            y = _whole(attend(heads[0], heads[1], heads[2], q.bits, k.bits, bias)).reshape(x.x.shape)
            x = self._sum(wide, x, self._linear(f"{name}.attention.out", Activation(y, v.bits), wide))
            results.append(self._feed(f"{name}.feed", x, wide))
        return results

    def _project(self, name: str, x: Activation) -> tuple[Activation, Activation, Activation]:
        x = self._to(f"{name}.narrow", x)
        q, k, v = (self._linear(f"{name}.{part}", x, f"{name}.{part}_grid") for part in "qkv")
        return q, k, v

    def _heads(self, x: Array, heads: int) -> Array:
        """(..., d) -> (heads, positions, d/heads)."""
        return x.reshape(-1, heads, x.shape[-1] // heads).swapaxes(0, 1)

    def _to(self, grid: str, a: Activation) -> Activation:
        return Activation(rescale(a.x, a.bits, self.grids[grid], _limit(grid)), self.grids[grid])

    def _sum(self, grid: str, a: Activation, b: Activation) -> Activation:
        return Activation(add(a.x, b.x, _limit(grid)), self.grids[grid])

    def _param(self, grid: str, p: Reals) -> Activation:
        return Activation(constant(p, self.grids[grid], _limit(grid)), self.grids[grid])

    def _quality(self, name: str, grid: str, code: int) -> Activation:
        table = self._param(grid, self.arrays[f"{name}.table"])
        return table._replace(x=self._at(code, table.x))

    def _at(self, code: int, table: npt.NDArray[Any]) -> Array:
        """A table (knots, C) at a quality code, (C,)."""
        return interpolate(table.astype(np.int64), np.array([code]), MAX_CODE // (len(table) - 1))[0]

    def _linear(self, name: str, a: Activation, grid: str, leaky: bool = False) -> Activation:
        weight, exponent, bias = (self.arrays[f"{name}.{part}"] for part in ("weight", "weight.exponent", "bias"))
        x = linear(a.x, weight, exponent, bias, a.bits, self.grids[grid], _limit(grid), leaky)
        return Activation(x, self.grids[grid])

    def _depthwise(self, name: str, a: Activation, grid: str, kernel: Any) -> Activation:
        """With the kernel of a group, or the only one (...)."""
        weight, exponent = (self.arrays[f"{name}.{part}"][kernel] for part in ("weight", "weight.exponent"))
        x = depthwise(a.x[None], weight, exponent, a.bits, self.grids[grid], _limit(grid))[0]
        return Activation(x, self.grids[grid])


def _limit(grid: str) -> int:
    """Of the grid of this name (5.1)."""
    name = grid.rpartition(".")[2]
    if name.startswith("wide") or name == "answer":
        return 32767
    if name == "gate":
        return 512
    return 511 if name in ("q_grid", "k_grid", "v_grid") else 1023


def _doubled(a: Activation) -> Activation:
    """depth_to_space with r = 2 (5.2)."""
    h, w, c = a.x.shape
    x = a.x.reshape(h, w, 2, 2, c // 4).transpose(0, 2, 1, 3, 4)
    return Activation(x.reshape(2 * h, 2 * w, c // 4), a.bits)


def _whole(x: Array) -> Array:
    """Results of all heads (..., heads, positions, D) -> (..., positions, heads · D)."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], -1)
