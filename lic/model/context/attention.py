"""Attention inside windows: what context models share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic.exact import Fixed, Grid, Linear
from lic.model.layers import NARROW, near_zero

ATTENTION = 511  # limit of queries, keys and values: 10 bits


class Attention(nn.Module):
    """Queries, keys and values of a residual sum, and the way back."""

    def __init__(self, width: int, heads: int, inner: int | None = None) -> None:
        """``inner``: width of queries, keys and values, where it is another than ``width``."""
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.narrow = Grid(NARROW)
        self.q, self.k, self.v = (Linear(width, inner) for _ in range(3))
        self.q_grid, self.k_grid, self.v_grid = (Grid(ATTENTION) for _ in range(3))
        self.out = near_zero(Linear(inner, width))

    def project(self, x: Fixed) -> tuple[Fixed, Fixed, Fixed]:
        x = self.narrow(x)
        return self.q(x, self.q_grid), self.k(x, self.k_grid), self.v(x, self.v_grid)


@dataclass(frozen=True)
class Windows:
    """Windows of ``height`` x ``width`` positions, the first one ``above`` and ``left`` of the first position."""

    height: int
    width: int
    above: int = 0
    left: int = 0

    def cut(self, v: Fixed, heads: int) -> Fixed:
        """(B, H, W, n, d) -> (B, rows of windows, columns of windows, n, heads, height·width, d/heads)."""
        below, right = self._margins(*v.x.shape[1:3])
        x = F.pad(v.x, (0, 0, 0, 0, self.left, right, self.above, below))
        x = x.unflatten(4, (heads, -1)).unflatten(2, (-1, self.width)).unflatten(1, (-1, self.height))
        return v._replace(x=x.permute(0, 1, 3, 5, 6, 2, 4, 7).flatten(-3, -2))

    def join(self, v: Fixed, shape: torch.Size) -> Fixed:
        """Inverse of cut, to ``shape`` (B, H, W, n, d)."""
        x = v.x.unflatten(-2, (self.height, self.width)).permute(0, 1, 5, 2, 6, 3, 4, 7)
        x = x.flatten(1, 2).flatten(2, 3).flatten(-2)
        return v._replace(x=x[:, self.above : self.above + shape[1], self.left : self.left + shape[2]])

    def inside(self, x: Tensor) -> Tensor | None:
        """Which positions of x (B, H, W, ...) exist: (rows, columns, height·width) booleans, None if all of them do."""
        h, w = x.shape[1:3]
        below, right = self._margins(h, w)
        if not (self.above or self.left or below or right):
            return None
        inside = F.pad(x.new_ones(h, w, dtype=torch.bool), (self.left, right, self.above, below))
        inside = inside.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))
        return inside.transpose(1, 2).flatten(-2)

    def _margins(self, h: int, w: int) -> tuple[int, int]:
        """Padding below and right of h x w positions to whole windows."""
        return -(h + self.above) % self.height, -(w + self.left) % self.width
