"""Building blocks. Tensors are channels-last, (B, H, W, C), so that a 1x1 convolution is one matrix product.

The entropy path (h_s and the context model) uses only the layers of `lic.exact`. The transforms may use anything.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic import exact
from lic.exact import Fixed, Grid, Linear

NARROW = 1023  # limit of what enters a matrix product: 11 bits
WIDE = 32767  # limit of residual sums: 16 bits
CACHED = 1024  # positions whose hidden features stay in a processor's cache


def space_to_depth(x: Tensor, r: int) -> Tensor:
    """(B, H, W, C) -> (B, H/r, W/r, r·r·C), row-major inside the block."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // r, r, w // r, r, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h // r, w // r, r * r * c)


def depth_to_space(x: Tensor, r: int) -> Tensor:
    """(B, H, W, r·r·C) -> (B, H·r, W·r, C), inverse of :func:`space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, r, r, c // (r * r))
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, c // (r * r))


class Matrix(nn.Linear):
    """A linear layer whose matrix (N, K) may have an *adapter* added: leftᵀ·right of low rank r (LoRA, Hu et al. 2022).

    ``left`` is (r, N), zero at first, and ``right`` (r, K).
    """

    left: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_parameter("left", None)
        self.register_parameter("right", None)

    def adapt(self, rank: int) -> None:
        """Give it an adapter, without effect as yet."""
        like = self.weight.detach()
        self.left = nn.Parameter(like.new_zeros(rank, self.out_features))
        self.right = nn.Parameter(torch.randn_like(like[:1].expand(rank, -1)) * self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.left is not None and self.right is not None:
            weight = weight + self.left.T @ self.right
        return F.linear(x, weight, self.bias)


class Depthwise(nn.Module):
    """3x3 depthwise convolution with zero padding, weight (3, 3, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3, width))
        nn.init.normal_(self.weight, std=0.1)
        self.weight.data[1, 1] += 1

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """3x3 depthwise convolution of x (B, H, W, C) with weight (3, 3, C), zero padding."""
    kernel = weight.permute(2, 0, 1).unsqueeze(1).to(x.dtype)  # (C, 1, 3, 3)
    y = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=1, groups=x.shape[-1])
    return y.permute(0, 2, 3, 1)


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, exact.SLOPE)


class Residual(nn.Module):
    """Transform block: 1x1 - depthwise 3x3 - 1x1, then a gated 1x1 feed-forward; 8·C² MAC per position.

    Both branches start at zero, so that a fresh network is the linear shortcut alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Matrix(width, width)
        self.spatial = Depthwise(width)
        self.outer = Matrix(width, width)
        self.expand = Matrix(width, 4 * width)
        self.reduce = Matrix(2 * width, width)
        for layer in (self.outer, self.reduce):
            nn.init.normal_(layer.weight, std=0.1 * layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, limit: float) -> Tensor:
        """x (B, H, W, C). ``limit``: of gated products, what is out of proportion being squared block after block."""
        x = x + self.outer(self.spatial(leaky(self.inner(x))))
        if torch.is_grad_enabled() or x.is_cuda:
            return x + self._feed(x, limit)
        x = x.contiguous()
        for rows in x.flatten(0, -2).split(CACHED):
            rows += self._feed(rows, limit)
        return x

    def _feed(self, x: Tensor, limit: float) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        gated = value * F.silu(gate)
        # As clamp, with a gradient in one pass instead of four.
        return self.reduce(F.hardtanh(gated, -limit, limit) if limit < math.inf else gated)


class PlainResidual(nn.Module):
    """Block of the entropy path: as :class:`Residual` with a plain feed-forward; 6·C² MAC per position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.hidden, self.mixed = (Grid(NARROW) for _ in range(3))
        self.inner = Linear(width, width)
        self.spatial = exact.Depthwise(width)
        nn.init.normal_(self.spatial.weight, std=0.1)
        self.spatial.weight.data[1, 1] += 1
        self.outer = near_zero(Linear(width, width))
        self.feed = FeedForward(width)

    def forward(self, v: Fixed, wide: Grid) -> Fixed:
        """v (B, H, W, C) on the grid ``wide`` of the residual sum, and so the result."""
        x = self.inner(self.narrow(v), self.hidden, leaky=True)
        v = wide.add(v, self.outer(self.spatial(x, self.mixed), wide))
        return self.feed(v, wide)


class FeedForward(nn.Module):
    """v + (C -> 2C -> C with LeakyReLU(1/8)), starting near zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.hidden = Grid(NARROW), Grid(NARROW)
        self.expand = Linear(width, 2 * width)
        self.reduce = near_zero(Linear(2 * width, width))

    def forward(self, v: Fixed, wide: Grid) -> Fixed:
        """v (..., C) on the grid ``wide`` of the residual sum, and so the result."""
        return wide.add(v, self.reduce(self.expand(self.narrow(v), self.hidden, leaky=True), wide))


def near_zero(layer: Linear) -> Linear:
    """A layer that ends a residual branch: a fresh branch adds little."""
    nn.init.normal_(layer.weight, std=0.1 * layer.in_features**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound) whose gradient still passes where it would raise x (Ballé et al. 2018)."""
    return _LowerBound.apply(x, bound)


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bound):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.bound) | (grad < 0), grad, torch.zeros_like(grad)), None
