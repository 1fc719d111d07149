"""Integers with a unit: what flows through the exact path."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_BITS = 16  # of a grid
ACCUMULATOR = 1 << 24  # float32 holds every integer up to it: no partial sum may reach it


class Fixed(NamedTuple):
    """Integers ``x`` in units of 2**-bits with magnitudes up to ``limit``, held as floats.

    Where exact arithmetic is off (training before quantisation), x are real numbers and bits is 0.
    """

    x: Tensor
    bits: int = 0
    limit: int = 0


class Grid(nn.Module):
    """The integers that an activation is rounded and clamped to: unit 2**-bits, magnitude up to ``limit``.

    ``bits`` is given, or chosen by calibration: the largest at which what was seen in floating point fits into
    ``limit``. With ``exact`` off the grid lets everything pass; with ``observing`` it notes the largest magnitude.
    """

    def __init__(self, limit: int, bits: int | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.calibrated = bits is None
        self.bits = bits or 0
        self.exact = False
        self.observing = False
        self.largest = 0.0

    def forward(self, v: Fixed) -> Fixed:
        """v in this grid's unit, rounded to the nearest integer (halves to even) and clamped."""
        if not self.exact:
            if self.observing and v.x.numel():
                self.largest = max(self.largest, float(v.x.detach().abs().amax()))
            return v
        return self.settle(v.x * 2.0 ** (self.bits - v.bits))

    def settle(self, x: Tensor) -> Fixed:
        """Numbers in this grid's unit, rounded and clamped; overwrites x if there is no gradient."""
        if x.requires_grad:
            return Fixed(round_ste(x).clamp(-self.limit, self.limit), self.bits, self.limit)
        return Fixed(x.round_().clamp_(-self.limit, self.limit), self.bits, self.limit)

    def add(self, a: Fixed, b: Fixed) -> Fixed:
        """The sum of two values in this grid's unit, clamped."""
        if not self.exact:
            return self(Fixed(a.x + b.x))
        assert a.bits == b.bits == self.bits
        total = a.x + b.x
        clamp = total.clamp if total.requires_grad else total.clamp_
        return Fixed(clamp(-self.limit, self.limit), self.bits, self.limit)

    def constant(self, value: Tensor) -> Fixed:
        """A parameter on this grid."""
        if not self.exact:
            return self.forward(Fixed(value))
        return self.settle(value * 2.0**self.bits)

    def wrap(self, x: Tensor) -> Fixed:
        """Values that are on this grid already."""
        return Fixed(x, self.bits, self.limit) if self.exact else Fixed(x)

    def fit(self) -> None:
        """Choose the unit for the magnitudes seen, unless it was given."""
        if self.calibrated:
            bits = math.floor(math.log2(self.limit / max(self.largest, 1e-6)))
            self.bits = min(max(bits, 0), MAX_BITS)


def round_ste(x: Tensor) -> Tensor:
    """Rounding to the nearest integer, halves to even, with the gradient of the identity."""
    if not x.requires_grad:
        return torch.round(x)
    return x + (x.round() - x).detach()
