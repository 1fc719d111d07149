"""Layers with one definition for training, export and inference.

With exact arithmetic off (:class:`~lic.exact.fixed.Grid`) they are ordinary floating-point layers. With it on they
compute on integers: weights have 8 bits and a power of two for each output, activations what their grid allows.
Training rounds straight through; computing inside :func:`freeze` makes the rounded weights the layer's weights.

Certificate, checked whenever weights are prepared for inference: for each output, limit of the input · Σ|weight| +
|bias| < 2**24 in integers. A clamp in the graph enforces the limit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic.exact import arithmetic
from lic.exact.fixed import ACCUMULATOR, Fixed, Grid, round_ste
from lic.exact.tables import EXP, EXP_LIMIT, LOGIT_BITS
from lic.quality import MAX_CODE

WEIGHT_LIMIT = 127
MAX_EXPONENT = 31  # of weights
SLOPE = 0.125  # of LeakyReLU


class Prepared(NamedTuple):
    """Weights for one unit of input and output: integers times ``scale``, one power of two for each output."""

    weight: Tensor
    bias: Tensor
    scale: Tensor


class Linear(nn.Linear):
    """1x1 convolution on channels-last tensors, (..., in) -> (..., out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.exponent: Tensor | None = None  # (out,) int8: frozen weights are integers times 2**-exponent
        self._prepared: tuple[tuple[int, int, int], Prepared] | None = None

    def forward(self, v: Fixed, grid: Grid, leaky: bool = False) -> Fixed:  # type: ignore[override]
        """v (..., in) -> (..., out) on ``grid``, on request after LeakyReLU(1/8).

        Raises ValueError if frozen weights break the certificate.
        """
        v = v._replace(x=v.x.contiguous())  # for strided rows F.linear makes a copy of the weights for each of them
        if not grid.exact:
            y = F.linear(v.x, self.weight, self.bias)
            return grid(Fixed(F.leaky_relu(y, SLOPE) if leaky else y))
        if freezing() and self.exponent is None:
            self._freeze(v)
        weight, bias, scale = self._prepare(v, grid)
        y = arithmetic.linear(v.x, weight, bias, scale)
        return grid.settle(F.leaky_relu(y, SLOPE, inplace=not y.requires_grad) if leaky else y)

    def _prepare(self, v: Fixed, grid: Grid) -> Prepared:
        """Weights from v's unit to the grid's."""
        key = (v.bits, v.limit, grid.bits)
        if self.exponent is None:
            exponent = self._choose_exponent(v)
        elif self._prepared is not None and self._prepared[0] == key and self._prepared[1].weight.device == v.x.device:
            return self._prepared[1]
        else:
            exponent = self.exponent.to(v.x.device, torch.int32)
            if not self._is_certified(exponent, v):
                raise ValueError("weights of the exact path break their certificate")
        weight = round_ste(self.weight * power_of_two(exponent)[:, None]).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
        bias = round_ste(self.bias * power_of_two(exponent + v.bits))
        scale = power_of_two(grid.bits - v.bits - exponent)
        prepared = Prepared(weight * scale[:, None], bias * scale, scale)
        if self.exponent is not None and not self.weight.requires_grad:
            self._prepared = (key, prepared)
        return prepared

    @torch.no_grad()
    def _choose_exponent(self, v: Fixed) -> Tensor:
        """The largest exponent for each output at which weights have 8 bits and the certificate holds."""
        size = self.weight.abs()
        total = v.limit * size.sum(dim=1) + self.bias.abs() * 2.0**v.bits
        rounding = v.limit * self.in_features / 2 + 1  # that the integers can add
        certified = torch.floor(torch.log2((ACCUMULATOR - rounding) / total.clamp(min=2.0**-40))).int()
        return torch.minimum(exponent_of(size.amax(dim=1)), certified).clamp(min=0)

    def _is_certified(self, exponent: Tensor, v: Fixed) -> bool:
        return bool(self._holds(exponent, v).all())

    def _holds(self, exponent: Tensor, v: Fixed) -> Tensor:
        """The certificate, (out,)."""
        weight = (self.weight.double() * power_of_two(exponent)[:, None]).round().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
        bias = (self.bias.double() * power_of_two(exponent + v.bits)).round()
        return v.limit * weight.abs().sum(dim=1) + bias.abs() < ACCUMULATOR

    @torch.no_grad()
    def _freeze(self, v: Fixed) -> None:
        exponent = self._choose_exponent(v)
        scale = power_of_two(exponent)[:, None]
        self.weight.copy_((self.weight * scale).round().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT) / scale)
        self.exponent = exponent.to(torch.int8)


class Depthwise(nn.Module):
    """3x3 depthwise convolution with zero padding, weight (..., 3, 3, C): one kernel, or one for each group."""

    def __init__(self, width: int, groups: int | None = None) -> None:
        super().__init__()
        shape = (3, 3, width) if groups is None else (groups, 3, 3, width)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.exponent: Tensor | None = None  # (..., C) int8

    def forward(self, v: Fixed, grid: Grid, groups: slice | None = None) -> Fixed:
        """v (B, H, W, C), or (B, H, W, n, C) with a kernel of its own for each of the n ``groups``, on ``grid``.

        At most 9 · 127 · limit of the input: far below 2**24.
        """
        weight: Tensor = self.weight
        if grid.exact:
            if self.exponent is None:
                with torch.no_grad():
                    exponent = exponent_of(weight.abs().amax(dim=(-3, -2)))
            else:
                exponent = self.exponent.to(v.x.device, torch.int32)
            step = power_of_two(exponent)[..., None, None, :]
            integers = round_ste(weight * step).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
            if freezing() and self.exponent is None:
                self.exponent = exponent.to(torch.int8)
                self.weight.data.copy_(integers / step)
            weight = integers * (power_of_two(grid.bits - v.bits - exponent)[..., None, None, :])
        x = v.x
        if groups is not None:
            weight = weight[groups].permute(1, 2, 0, 3).flatten(2)
            x = x.flatten(3)
        y = depthwise(x, weight).reshape(v.x.shape)
        return grid.settle(y) if grid.exact else grid(Fixed(y))


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """3x3 correlation of each channel of x (B, H, W, C) with weight (3, 3, C), zero padding.

    In inference by nine products, which are exact for integers; a convolution may not be.
    """
    if torch.is_grad_enabled():
        kernel = weight.permute(2, 0, 1).unsqueeze(1).to(x.dtype)  # (C, 1, 3, 3)
        return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    h, w = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    y = padded[:, 1 : 1 + h, 1 : 1 + w] * weight[1, 1]
    for i in range(3):
        for j in range(3):
            if (i, j) != (1, 1):
                y.addcmul_(padded[:, i : i + h, j : j + w], weight[i, j])
    return y


class QualityTable(nn.Module):
    """A vector for each quality: linear interpolation between knots that are equally spaced in the quality code."""

    def __init__(self, knots: int, width: int) -> None:
        super().__init__()
        if MAX_CODE % (knots - 1):
            raise ValueError(f"knots must be a whole number of quality codes apart: {knots}")
        self.spacing = MAX_CODE // (knots - 1)
        self.table = nn.Parameter(torch.zeros(knots, width))

    def forward(self, code: Tensor) -> Tensor:
        """code (B,), 0..MAX_CODE -> (B, width) float32."""
        left, t = self._position(code)
        table = self.table.float()
        return torch.lerp(table[left], table[left + 1], t / self.spacing)

    def fixed(self, code: Tensor, grid: Grid) -> Fixed:
        """code (B,), integers where arithmetic is exact -> (B, width) on ``grid``."""
        if not grid.exact:
            return grid(Fixed(self(code).to(self.table.dtype)))
        table = grid.constant(self.table).x
        return Fixed(interpolate(table, code, self.spacing), grid.bits, grid.limit)

    def _position(self, code: Tensor) -> tuple[Tensor, Tensor]:
        code = code.float()
        left = (code / self.spacing).floor().clamp(0, self.table.shape[0] - 2).long()
        return left, (code - left * self.spacing).unsqueeze(-1)


def interpolate(table: Tensor, code: Tensor, spacing: int) -> Tensor:
    """Integers (knots, C), code (B,) -> integers (B, C): linear interpolation, rounded down after adding a half."""
    left = (code.long() // spacing).clamp(max=table.shape[0] - 2)
    t = (code.long() - left * spacing).double().unsqueeze(-1)
    total = table[left].double() * (spacing - t) + table[left + 1].double() * t
    return divide(total, spacing).to(table.dtype)


def divide(numerator: Tensor, denominator: Tensor | int) -> Tensor:
    """Integers n / d, d > 0, in float64, rounded to the nearest: floor((2n + d) / 2d). Gradients pass straight through.

    The quotient is a whole number or at least 1 / 2d away from one. While it is below 2**53 / 4d, the rounding error of
    the division cannot cross one.
    """
    quotient = (2 * numerator).add_(denominator).div_(2 * denominator).floor_()
    if not numerator.requires_grad:
        return quotient
    value = numerator / denominator
    return value + (quotient - value).detach()


def attend(
    q: Fixed, k: Fixed, v: Fixed, bias: Tensor, mask: Tensor | None, exact: bool, block: int | None = None
) -> Fixed:
    """Attention over keys, with a weight of zero for those that lie 8 or more below the largest logit.

    q (..., Q, D), k and v (..., K, D); bias is added to the logits (..., Q, K); mask is True at keys that take part.
    Returns (..., Q, D) in v's unit. Products are scaled by about D^-1/2, a power of two. In integers: logits in 1/32,
    weights exp(-d/32) from a table, sums of weights and of weighted values below 2**24 (the caller's grids see to
    that), one rounded division at the end. With ``block``, weighted values are summed over so many keys at a time;
    only these sums need to stay below, float64 adds them up.
    """
    scale_bits = int(math.log2(q.x.shape[-1])) // 2
    if not exact:
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)  # which is the same for all pictures: logits are read once less
        logits = ((q.x * 2.0**-scale_bits) @ k.x.transpose(-1, -2)).float() + bias
        return Fixed(torch.softmax(logits, dim=-1).to(v.x.dtype) @ v.x)
    keys = k.x.shape[-2]
    block = min(block or keys, keys)
    if max(q.limit * k.limit * q.x.shape[-1], EXP_LIMIT * v.limit * block, EXP_LIMIT * keys) >= ACCUMULATOR:
        raise ValueError("attention over so many keys or channels breaks the certificate")
    if q.bits + k.bits + scale_bits < LOGIT_BITS:
        raise ValueError("queries and keys are too coarse")
    products = arithmetic.matmul(q.x, k.x.transpose(-1, -2))
    scale = 2.0 ** (LOGIT_BITS - q.bits - k.bits - scale_bits)
    logits = round_ste(products * scale) if products.requires_grad else products.mul_(scale).round_()
    logits += round_ste(bias * 2.0**LOGIT_BITS)
    if mask is not None:
        logits.masked_fill_(~mask, -(2.0**40))
    below = (logits.amax(dim=-1, keepdim=True).detach() - logits).clamp_(max=len(EXP) - 1)
    table = torch.as_tensor(EXP, device=below.device, dtype=below.dtype)
    weight = table.index_select(0, below.detach().int().flatten()).view(below.shape)
    if below.requires_grad:
        smooth = EXP_LIMIT * torch.exp(below / -(2.0**LOGIT_BITS))
        weight = smooth + (weight - smooth).detach()
    blocks = zip(weight.split(block, dim=-1), v.x.split(block, dim=-2), strict=True)
    total = reduce(torch.add, (arithmetic.matmul(*parts).double() for parts in blocks))
    norm = weight.sum(dim=-1, keepdim=True)
    return v._replace(x=divide(total, norm.double()).to(v.x.dtype))


def exponent_of(largest: Tensor) -> Tensor:
    """Exponents (int32) at which numbers up to ``largest`` become integers up to WEIGHT_LIMIT; 0 to MAX_EXPONENT."""
    return torch.floor(torch.log2(WEIGHT_LIMIT / largest.clamp(min=2.0**-40))).int().clamp(0, MAX_EXPONENT)


def power_of_two(exponent: Tensor) -> Tensor:
    """2.0**exponent, (...) integers -> float32 without rounding, which torch.exp2 does not promise."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


_freezing = False


def freezing() -> bool:
    return _freezing


@contextlib.contextmanager
def freeze() -> Iterator[None]:
    """Inside the block, exact layers that compute make their rounded weights final."""
    global _freezing
    _freezing = True
    try:
        yield
    finally:
        _freezing = False
