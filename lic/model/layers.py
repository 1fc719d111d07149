"""Building blocks. Tensors are channels-last, (B, H, W, C), so that a 1x1 convolution is one matrix product.

The entropy path (h_s and the context model) uses only layers with an exact integer twin: Linear, Depthwise,
sums, LeakyReLU(1/8), tables, and the attention of :func:`attend`. The transforms may use anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic.quality import MAX_CODE


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
    """LeakyReLU(1/8): an integer shift in the exact path."""
    return F.leaky_relu(x, 0.125)


class QualityTable(nn.Module):
    """A vector per quality: linear interpolation between knots that are equally spaced in the quality code."""

    def __init__(self, knots: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(knots, width))

    def forward(self, code: Tensor) -> Tensor:
        """code (B,) float, 0..MAX_CODE -> (B, width) float32."""
        knots = self.table.shape[0]
        position = code.float() * ((knots - 1) / MAX_CODE)
        left = position.floor().clamp(0, knots - 2).long()
        t = (position - left).unsqueeze(-1)
        table = self.table.float()
        return torch.lerp(table[left], table[left + 1], t)


class Residual(nn.Module):
    """Transform block: 1x1 - depthwise 3x3 - 1x1, then a gated 1x1 feed-forward; 8·C² MAC per position.

    Both branches start at zero, so that a fresh network is the linear shortcut alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.spatial = Depthwise(width)
        self.outer = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(2 * width, width)
        for layer in (self.outer, self.reduce):
            nn.init.normal_(layer.weight, std=0.1 * layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outer(self.spatial(leaky(self.inner(x))))
        value, gate = self.expand(x).chunk(2, dim=-1)
        return x + self.reduce(value * F.silu(gate))


class PlainResidual(nn.Module):
    """Block of the entropy path: as :class:`Residual` with a plain feed-forward; 6·C² MAC per position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.spatial = Depthwise(width)
        self.outer = nn.Linear(width, width)
        self.feed = FeedForward(width)
        nn.init.normal_(self.outer.weight, std=0.1 * width**-0.5)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outer(self.spatial(leaky(self.inner(x))))
        return x + self.feed(x)


class FeedForward(nn.Module):
    """C -> 2C -> C with LeakyReLU(1/8), starting near zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)
        nn.init.normal_(self.reduce.weight, std=0.1 * (2 * width) ** -0.5)
        nn.init.zeros_(self.reduce.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(leaky(self.expand(x)))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Attention in the form that has an integer twin: logits are clamped to 10 below their maximum.

    q (..., Q, D), k and v (..., K, D); bias is added to the logits (..., Q, K); mask is True at keys that take
    part. Returns (..., Q, D).
    """
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    logits = logits - logits.amax(dim=-1, keepdim=True).detach()
    clamped = logits.clamp(min=-10)
    if mask is not None:
        clamped = clamped.masked_fill(~mask, -torch.inf)
    return torch.softmax(clamped, dim=-1).to(v.dtype) @ v


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


def round_ste(x: Tensor) -> Tensor:
    """Rounding with the gradient of the identity."""
    return x + (x.round() - x).detach()
