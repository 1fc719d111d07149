"""Analysis g_a and synthesis g_s: a lapped linear shortcut plus networks that start at zero.

y = P·patch + network(x) and x̂ = Pᵀ·y + network(y), where the rows of P are a Karhunen-Loève basis of the
coefficients of a lapped orthogonal transform (Malvar & Staelin 1989), 32x32 pixels every 16. Step 0 of training is
therefore a working transform codec. The synthesis network also sees the linear reconstruction, so that it can act
as an in-loop filter from the start.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic.exact import Fixed, Grid, QualityTable
from lic.model.config import DOWNSAMPLING, Config
from lic.model.layers import WIDE, Matrix, Residual, depth_to_space, space_to_depth
from lic.model.non_local import NonLocal

OVERLAP = DOWNSAMPLING // 2  # pixels by which a block reaches over each of its sides
ANALYSIS_LIMIT, SYNTHESIS_LIMIT = 3.0, 8.0  # of gated products; those of photographs reach 1.4 and 4.4


class LappedShortcut(nn.Module):
    """Linear lapped transform with weight (M, 2·2·16·16·3); analysis and synthesis are each other's transpose.

    Always in float32, also under autocast: the largest coefficients span hundreds of quantiser steps.
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(latent, 4 * DOWNSAMPLING**2 * 3))

    def analysis(self, x: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, H/16, W/16, M). The image is continued by mirroring."""
        with torch.autocast(x.device.type, enabled=False):
            return _lapped(x, DOWNSAMPLING) @ self.weight.T

    def synthesis(self, y: Tensor) -> Tensor:
        """(B, h, w, M) -> (B, 16·h, 16·w, 3): overlap-add; what reaches over the border is folded back."""
        b, h, w, _ = y.shape
        with torch.autocast(y.device.type, enabled=False):
            parts = (y @ self.weight).chunk(4, dim=-1)
        blocks = y.new_zeros(b, h + 1, w + 1, parts[0].shape[-1])
        for part, (i, j) in zip(parts, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
            blocks[:, i : i + h, j : j + w] += part
        return _fold(_fold(depth_to_space(blocks, DOWNSAMPLING), 1), 2)

    def energy(self, worth: Tensor, block: int) -> Tensor:
        """Sum of worth·b² for each basis function b, averaged over ``block`` by ``block`` pixels: (B, h, w, M).

        worth: of the samples of each block, (B, 16·h/block, 16·w/block, 3); ``block`` is 1, 2, 4, 8 or 16.
        """
        n, size = DOWNSAMPLING, 2 * DOWNSAMPLING
        basis = self.weight.view(-1, 2, 2, n, n, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, size, size)
        grain = min(block, OVERLAP)  # the finest that both blocks and functions, which begin between blocks, consist of
        times, n = block // grain, DOWNSAMPLING // grain
        squares = grain**2 * F.avg_pool2d(basis, block).square()
        squares = squares.repeat_interleave(times, 2).repeat_interleave(times, 3)
        squares = squares.view(-1, 3, 2, n, 2, n).permute(0, 2, 4, 3, 5, 1).flatten(1)
        return _lapped(worth.repeat_interleave(times, 1).repeat_interleave(times, 2), n) @ squares.T

    @torch.no_grad()
    def set_basis(self, covariance: np.ndarray) -> np.ndarray:
        """Choose the KLT of lapped coefficients with this covariance (768, 768); returns the variances (M,)."""
        values, vectors = np.linalg.eigh(covariance)
        order = np.argsort(-values)[: self.weight.shape[0]]
        lapped = lapped_basis(DOWNSAMPLING)
        kernel = np.einsum("kp,lq,cd->klcpqd", lapped, lapped, np.eye(3)).reshape(768, 32, 32, 3)
        kernel = np.tensordot(vectors[:, order].T, kernel, axes=1)  # (M, 32, 32, 3)
        kernel = kernel.reshape(-1, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3072)
        self.weight.copy_(torch.from_numpy(kernel))
        return values[order]


def _lapped(x: Tensor, size: int) -> Tensor:
    """Blocks of 2·size by 2·size, one every ``size``: (B, H, W, C) -> (B, H/size, W/size, 4·size²·C)."""
    x = _mirror(_mirror(x, 1, size // 2), 2, size // 2)
    blocks = space_to_depth(x, size)  # (B, H/size + 1, W/size + 1, size²·C)
    four = [blocks[:, :-1, :-1], blocks[:, :-1, 1:], blocks[:, 1:, :-1], blocks[:, 1:, 1:]]
    return torch.cat(four, dim=-1)


def lapped_basis(size: int) -> np.ndarray:
    """The fast lapped orthogonal transform for an AR(1) source of correlation 0.95, rows of shape (size, 2·size)."""
    n = np.arange(size)
    dct = np.cos(np.pi * (2 * n + 1)[None] * n[:, None] / (2 * size)) * np.sqrt(2 / size)
    dct[0] /= np.sqrt(2)
    difference = dct[0::2] - dct[1::2]
    half = 0.5 * np.block([[difference, difference[:, ::-1]], [difference, -difference[:, ::-1]]])
    lag = np.abs(np.subtract.outer(np.arange(2 * size), np.arange(2 * size)))
    covariance = half @ 0.95**lag @ half.T
    rows = []
    for part in (slice(0, size // 2), slice(size // 2, size)):
        _, vectors = np.linalg.eigh(covariance[part, part])
        rows.append(vectors[:, ::-1].T @ half[part])
    return np.concatenate(rows)


def _mirror(x: Tensor, dim: int, by: int) -> Tensor:
    first = x.narrow(dim, 0, by).flip(dim)
    last = x.narrow(dim, x.shape[dim] - by, by).flip(dim)
    return torch.cat([first, x, last], dim=dim)


def _fold(x: Tensor, dim: int) -> Tensor:
    n = x.shape[dim] - 2 * OVERLAP
    middle = x.narrow(dim, OVERLAP, n)
    first = middle.narrow(dim, 0, OVERLAP) + x.narrow(dim, 0, OVERLAP).flip(dim)
    last = middle.narrow(dim, n - OVERLAP, OVERLAP) + x.narrow(dim, n + OVERLAP, OVERLAP).flip(dim)
    return torch.cat([first, middle.narrow(dim, OVERLAP, n - 2 * OVERLAP), last], dim=dim)


class Stage(nn.Module):
    """Blocks of one resolution behind a per-quality scale and offset of their input."""

    def __init__(self, width: int, depth: int, knots: int) -> None:
        super().__init__()
        self.quality = QualityTable(knots, 2 * width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))

    def forward(self, x: Tensor, code: Tensor, limit: float) -> Tensor:
        scale, offset = self.quality(code)[:, None, None, :].to(x.dtype).chunk(2, dim=-1)
        x = x * (1 + scale) + offset
        for block in self.blocks:
            x = block(x, limit)
        return x


class Analysis(nn.Module):
    """g_a: (B, H, W, 3) in [-0.5, 0.5], code (B,) -> what the network adds to the shortcut's latents."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        w4, w8, w16 = config.widths
        self.down4 = Matrix(48, w4)
        self.down8 = Matrix(4 * w4, w8)
        self.down16 = Matrix(4 * w8, w16)
        stages = zip(config.widths, config.depths, strict=True)
        self.stage4, self.stage8, self.stage16 = (Stage(w, d, config.knots) for w, d in stages)
        self.non_local = NonLocal(w16, config.non_local_heads) if config.non_local_heads else None
        self.floating = Grid(WIDE)  # transforms are never exact
        self.last = _zero(Matrix(w16, config.latent))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        x = self.stage4(self.down4(space_to_depth(x, 4)), code, ANALYSIS_LIMIT)  # (B, H/4, W/4, w4)
        x = self.stage8(self.down8(space_to_depth(x, 2)), code, ANALYSIS_LIMIT)
        x = self.stage16(self.down16(space_to_depth(x, 2)), code, ANALYSIS_LIMIT)
        if self.non_local is not None:
            x = self.non_local(Fixed(x), self.floating).x
        return self.last(x)


class Synthesis(nn.Module):
    """g_s: latents y (B, h, w, M), linear reconstruction (B, 16·h, 16·w, 3), code (B,) -> what is added to it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        w4, w8, w16 = config.widths
        self.first = Matrix(config.latent, w16)
        self.non_local = NonLocal(w16, config.non_local_heads) if config.non_local_heads else None
        self.floating = Grid(WIDE)  # transforms are never exact
        self.up8 = Matrix(w16, 4 * w8)
        self.up4 = Matrix(w8, 4 * w4)
        self.linear8 = Matrix(192, w8)
        self.linear4 = Matrix(48, w4)
        stages = zip(config.widths, config.depths, strict=True)
        self.stage4, self.stage8, self.stage16 = (Stage(w, d, config.knots) for w, d in stages)
        self.last = _zero(Matrix(w4, 48))
        self.limit = SYNTHESIS_LIMIT  # infinite in weights from before there was one

    def forward(self, y: Tensor, linear: Tensor, code: Tensor) -> Tensor:
        return self.ended(self.features(y, linear, code))

    def features(self, y: Tensor, linear: Tensor, code: Tensor) -> Tensor:
        """What the last stage makes of them: (B, 4·h, 4·w, w4)."""
        x = self.first(y)
        if self.non_local is not None:
            x = self.non_local(Fixed(x), self.floating).x
        x = self.stage16(x, code, self.limit)
        x = depth_to_space(self.up8(x), 2) + self.linear8(space_to_depth(linear, 8))
        x = self.stage8(x, code, self.limit)
        x = depth_to_space(self.up4(x), 2) + self.linear4(space_to_depth(linear, 4))
        return self.stage4(x, code, self.limit)

    def ended(self, features: Tensor) -> Tensor:
        """Pixels of :meth:`features`: (B, 16·h, 16·w, 3)."""
        return depth_to_space(self.last(features), 4)


def _zero(layer: Matrix) -> Matrix:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
