"""The refinement behind the synthesis: what pixels say of each other (bitstream_spec.md, 6.5).

g_s ends at a quarter of the resolution and sees a place through fixed kernels. Behind it, a small residual network at
half of the resolution is given the pixels, what the last stage of g_s knows of them, and what non-local means, shrunken
cosine transforms and groups of blocks would change in them (:mod:`lic.denoising`), and says what to add: a sum of these
changes with weights by quality, and corrections of its own. Its units are quantiser steps, so that it sees the same
errors at every quality.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lic import denoising
from lic.denoising import CHANGES, COLOURS, MIDDLE, groups, planes_of
from lic.denoising.groups import GROUPED
from lic.exact import QualityTable, exact_arithmetic
from lic.model.config import Config
from lic.model.layers import Depthwise, Matrix, depth_to_space, leaky, space_to_depth

SCALE = 2  # pixels, one side, of a position of the network
DETAIL = 5  # side of the mean that a detail differs from
SOFTNESS = 4.0  # steps at which a detail counts half
RANGE = 64.0  # of samples 0..255, for the network
PLANES = 3
MOST_BLOCKS = 3  # that the halo of lic.pipeline.windows has room for
BAND = 128  # rows at a time, so that what is between stays in the cache


class Mixing(nn.Module):
    """x + 1x1 - depthwise 3x3 - 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.spatial, self.outer = Matrix(width, width), Depthwise(width), Matrix(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.spatial(leaky(self.inner(x))))


class Refinement(nn.Module):
    """Pixels of g_s, what its last stage knows, codes -> what is to be added to the pixels."""

    def __init__(self, config: Config) -> None:
        """Raises ValueError for a refinement that reaches too far, and for other groups than there are."""
        super().__init__()
        if len(config.refinement) not in (2, 3):
            raise ValueError(f"a refinement of {len(config.refinement)} numbers")
        width, depth, self.grouped = (*config.refinement, 0)[:3]
        if not 0 <= depth <= MOST_BLOCKS:
            raise ValueError(f"a refinement of {depth} blocks")
        if self.grouped not in (0, GROUPED):
            raise ValueError(f"a refinement that is given {self.grouped} kinds of changes by groups")
        self.count = CHANGES + self.grouped  # of changes
        self.reach = -(-(DETAIL // 2 + SCALE * depth) // 4) * 4  # rows that another row depends on, whole features
        self.pixels = Matrix(SCALE**2 * 2 * PLANES, width)
        self.changes = Matrix(SCALE**2 * self.count * PLANES, width)
        self.features = Matrix(config.widths[0], (4 // SCALE) ** 2 * width)
        self.before, self.after = (QualityTable(config.knots, 2 * width) for _ in range(2))
        self.blocks = nn.ModuleList(Mixing(width) for _ in range(depth))
        self.last = Matrix(width, SCALE**2 * PLANES)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.weights = QualityTable(config.knots, self.count * PLANES)  # of the changes

    def forward(self, x: Tensor, features: Tensor, code: Tensor, step: Tensor) -> Tensor:
        """x (B, H, W, 3) in [-0.5, 0.5], features (B, H/4, W/4, w4), code (B,) -> (B, H, W, 3).

        step: the quantiser's, in units of 8-bit samples, (B,). The changes carry no gradient.
        """
        steps = step[:, None, None, None]
        x = 255 * (x + 0.5)
        planes = F.pad(torch.stack(planes_of(x), dim=1) / steps, (groups.REACH,) * 4, mode="replicate")
        of_groups = _of_groups(planes) if self.grouped else None  # of the whole: they reach far beyond a band
        inner = slice(groups.REACH - denoising.REACH, denoising.REACH - groups.REACH)
        planes = planes[..., inner, inner]
        height = x.shape[1]
        band = height if torch.is_grad_enabled() or x.is_cuda else BAND
        bands = []
        for top in range(0, height, band):
            first, last = max(0, top - self.reach), min(height, top + band + self.reach)
            changes = _changes(planes[:, :, first : last + 2 * denoising.REACH])
            if of_groups is not None:
                changes = torch.cat([changes, of_groups[:, :, first:last]], dim=1)
            added = self.added(x[:, first:last], features[:, first // 4 : last // 4], changes, code, steps)
            bands.append(added[:, top - first : top - first + band])
        return torch.cat(bands, dim=1) * (steps / 255)

    def added(self, x: Tensor, features: Tensor, changes: Tensor, code: Tensor, steps: Tensor) -> Tensor:
        """x (B, H, W, 3) in 0..255, features, changes (B, count·PLANES, H, W) -> (B, H, W, 3), in steps."""
        detail = (x - _mean_around(x)) / steps
        detail = detail / (1 + detail.abs() / SOFTNESS)
        v = self.pixels(space_to_depth(torch.cat([(x - MIDDLE) / RANGE, detail], dim=-1), SCALE))
        # Changes stay planes, which takes less time than to move them.
        kernel = self.changes.weight.unflatten(1, (SCALE, SCALE, -1)).permute(0, 3, 1, 2)
        v = v + F.conv2d(changes, kernel, self.changes.bias, stride=SCALE).permute(0, 2, 3, 1)
        v = v + depth_to_space(self.features(features), 4 // SCALE)
        v = _scaled(v, self.before(code))
        for block in self.blocks:
            v = block(v)
        own = depth_to_space(self.last(leaky(_scaled(v, self.after(code)))), SCALE)
        weights = self.weights(code).unflatten(1, (self.count, PLANES, 1)) * x.new_tensor(COLOURS)  # in colours
        weighted = weights.flatten(1, 2).transpose(1, 2) @ changes.flatten(2)
        return own + weighted.unflatten(2, changes.shape[2:]).permute(0, 2, 3, 1)


@torch.no_grad()
def _changes(planes: Tensor) -> Tensor:
    """Of planes (B, PLANES, H + 2·REACH, W + 2·REACH) in steps: (B, CHANGES·PLANES, H, W)."""
    return _each(planes, denoising.changes)


@torch.no_grad()
def _of_groups(planes: Tensor) -> Tensor:
    """Of planes with groups.REACH more at each side: (B, GROUPED·PLANES, H, W)."""
    return _each(planes, groups.grouped)


def _each(planes: Tensor, of: Callable[[Tensor, float], Tensor]) -> Tensor:
    with exact_arithmetic():  # a mean of many steps is to be known to a tenth of one
        found = [of(its, 1).flatten(0, 1) for its in planes]
    return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)  # which needs no copy


def leave_graphs() -> None:
    """Keep denoising out of what is compiled from here on.

    A decorator would import torch's compiler, which takes as long as torch itself, wherever a model is loaded.
    """
    global _changes, _of_groups
    _changes, _of_groups = torch.compiler.disable(_changes), torch.compiler.disable(_of_groups)


def _mean_around(x: Tensor) -> Tensor:
    """Of the DETAIL x DETAIL pixels around each, as far as there are any: (B, H, W, C)."""
    around = DETAIL // 2
    for axis in (1, 2):  # one after the other, which is much faster than torch's own
        size = x.shape[axis]
        place = torch.arange(size, device=x.device)
        count = (place + around).clamp(max=size - 1) - (place - around).clamp(min=0) + 1
        padded = F.pad(x, (0, 0, 0, 0, around, around) if axis == 1 else (0, 0, around, around))
        total = reduce(torch.add, (padded.narrow(axis, start, size) for start in range(DETAIL)))
        x = total / count.view(-1, *[1] * (3 - axis))
    return x


def _scaled(v: Tensor, scale_and_offset: Tensor) -> Tensor:
    """v (B, H, W, C) by scales and offsets (B, 2·C)."""
    scale, offset = scale_and_offset[:, None, None].chunk(2, dim=-1)
    return v * (1 + scale) + offset
