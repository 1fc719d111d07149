"""The refinement behind the synthesis: what pixels say of each other, at full resolution.

g_s ends at a quarter of the resolution and sees a place through fixed kernels. Behind it, a small residual network at
half of the resolution is given the pixels, what the last stage of g_s knows of them, and what non-local means and
shrunken cosine transforms would change in them (:mod:`lic.denoising`), and says what to add: a sum of these changes
with weights by quality, and corrections of its own. Its units are quantiser steps, so that it sees the same errors at
every quality.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic import denoising
from lic.denoising import CHANGES, COLOURS, MIDDLE, planes_of
from lic.exact import QualityTable
from lic.model.config import Config
from lic.model.layers import leaky

SOFTNESS = 4.0  # steps at which a detail counts half
DETAIL = 5  # side of the mean that a detail differs from
RANGE = 64.0  # of samples 0..255, for the network
PLANES = 3
REACH = denoising.REACH + 2 * 9  # pixels, for up to 4 blocks, at half of the resolution


class Convolution(nn.Module):
    """A convolution with zero padding, side odd: weight (out, in·side²), so that it is stored as matrices are."""

    def __init__(self, inputs: int, outputs: int, side: int = 3, gain: float = 1) -> None:
        super().__init__()
        self.inputs, self.side = inputs, side
        size = inputs * side**2
        self.weight = nn.Parameter(torch.randn(outputs, size) * gain * (1.5 / size) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W)."""
        return F.conv2d(x, self.kernel, self.bias, padding=self.side // 2)

    @property
    def kernel(self) -> Tensor:
        kernel = self.weight.view(-1, self.inputs, self.side, self.side)
        return kernel.contiguous(memory_format=torch.channels_last)


class Halving(Convolution):
    """A convolution of blocks of 2x2 pixels, of which it sees side² each: (B, C, H, W) -> (B, outputs, H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int, side: int = 3, gain: float = 1) -> None:
        super().__init__(4 * inputs, outputs, side, gain)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.view(-1, self.inputs // 4, 2, 2, self.side, self.side)
        kernel = kernel.permute(0, 1, 4, 2, 5, 3).reshape(-1, self.inputs // 4, 2 * self.side, 2 * self.side)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, kernel, self.bias, stride=2, padding=self.side - 1)


class Block(nn.Module):
    """x + 3x3 - leaky - 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = Convolution(width, width), Convolution(width, width, gain=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(leaky(self.inner(x)))


class Refinement(nn.Module):
    """Pixels of g_s, what its last stage knows, codes -> what is to be added to the pixels."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, depth = config.refinement
        self.pixels = Halving(2 * PLANES, width)
        self.changes = Halving(CHANGES * PLANES, width, 1, 2)  # of a part of a step
        self.features = Convolution(config.widths[0], 4 * width, 1, 0.5)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.before, self.after = (QualityTable(config.knots, 2 * width) for _ in range(2))
        self.last = Convolution(width, 4 * PLANES, gain=0)
        self.weights = QualityTable(config.knots, CHANGES * PLANES)  # of the changes

    def forward(self, x: Tensor, features: Tensor, code: Tensor, step: Tensor) -> Tensor:
        """x (B, H, W, 3) in [-0.5, 0.5], features (B, H/4, W/4, w4), code (B,) -> (B, H, W, 3).

        step: the quantiser's, in units of 8-bit samples, (B,). The changes carry no gradient.
        """
        steps = step[:, None, None, None]
        x = 255 * (x + 0.5)
        changes = _changes(x, steps)
        x = x.permute(0, 3, 1, 2).contiguous()
        detail = (x - F.avg_pool2d(x, DETAIL, 1, DETAIL // 2, count_include_pad=False)) / steps
        detail = detail / (1 + detail.abs() / SOFTNESS)
        v = self.pixels(torch.cat([(x - MIDDLE) / RANGE, detail], dim=1)) + self.changes(changes)
        v = v + F.pixel_shuffle(self.features(features.permute(0, 3, 1, 2)), 2)
        v = _scaled(v, self.before(code))
        for block in self.blocks:
            v = block(v)
        own = F.pixel_shuffle(self.last(leaky(_scaled(v, self.after(code)))), 2)
        return ((own + self._weighted(changes, code)) * (steps / 255)).permute(0, 2, 3, 1)

    def _weighted(self, changes: Tensor, code: Tensor) -> Tensor:
        """The sum of changes (B, CHANGES·PLANES, H, W) with weights by quality, in colours (B, 3, H, W)."""
        weights = self.weights(code).view(-1, 1, CHANGES, PLANES)
        colours = weights * weights.new_tensor(COLOURS).T[:, None]  # (B, 3, CHANGES, PLANES)
        return (colours.flatten(2) @ changes.flatten(2)).view(-1, PLANES, *changes.shape[2:])


@torch.no_grad()
def _changes(x: Tensor, steps: Tensor) -> Tensor:
    """Of pixels (B, H, W, 3) in 0..255, continued by those of the border: (B, CHANGES·PLANES, H, W), in steps."""
    with torch.autocast(x.device.type, enabled=False):
        planes = torch.stack(planes_of(x), dim=1) / steps
        planes = F.pad(planes, (denoising.REACH,) * 4, mode="replicate")
        return torch.stack([denoising.changes(its, 1).flatten(0, 1) for its in planes])


def _scaled(v: Tensor, scale_and_offset: Tensor) -> Tensor:
    """v (B, C, H, W) by scales and offsets (B, 2·C)."""
    scale, offset = scale_and_offset[:, :, None, None].chunk(2, dim=1)
    return v * (1 + scale) + offset
