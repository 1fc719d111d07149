"""Matched blocks: by how much the blocks of the surroundings that look most like a pixel's own differ from it.

Non-local means compare a pixel with a fixed lattice of others. Where something repeats, a fence or bricks, what looks
like it lies anywhere; so here each block of 8x8 pixels looks for the ones that are most like it at every place around,
as the grouping of BM3D does (Dabov, Foi, Katkovnik and Egiazarian 2007, "Image denoising by sparse 3-D
transform-domain collaborative filtering", IEEE Trans. Image Process. 16(8); bitstream_spec.md, 6.4), and their weighted
mean stands for it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lic import coder

SIDE, STRIDE = 8, 4  # of blocks, which begin at every fourth row and column
RADIUS = 20  # pixels that a block may be away, in both directions
MATCHES = 16
KERNEL = 4.0  # of distances
CONSTANT = 0.05  # the weight of no difference
REACH = -(-(RADIUS + SIDE - 1) // STRIDE) * STRIDE
_TOGETHER = 64  # offsets at a time


def _offsets() -> np.ndarray:
    """(N, 2): down and right, the nearest first."""
    sides = range(-RADIUS, RADIUS + 1)
    found = [(down, right) for down in sides for right in sides if (down, right) != (0, 0)]
    return np.array(sorted(found, key=lambda at: (at[0] ** 2 + at[1] ** 2, at)), np.int64)


OFFSETS = _offsets()


def matched(planes: Tensor, step: float) -> Tensor:
    """By how much matched blocks would change each plane: (K, H, W), of K planes (K, H + 2·REACH, W + 2·REACH).

    Blocks are compared in the first plane.

    Args:
        planes: their first pixels are at multiples of STRIDE in the picture.
        step: the quantiser's, in the units of the planes.
    """
    scale = KERNEL * 12 / (SIDE**2 * step**2)  # of a sum of squares over a block
    loops = coder.loops() if planes.device.type == "cpu" else None
    if loops is None:
        return _matched(planes, scale)
    its, threads = planes.contiguous().numpy(), torch.get_num_threads()
    return torch.from_numpy(loops.matched(its, REACH, OFFSETS, MATCHES, scale, CONSTANT, threads))


def _matched(planes: Tensor, scale: float) -> Tensor:
    """As the compiled loop has them."""
    height, width = (side - 2 * REACH for side in planes.shape[1:])
    # Blocks begin STRIDE pixels before the picture, and at its last pixels.
    down, right = (-(-side // STRIDE) + 1 for side in (height, width))
    first = REACH - STRIDE
    distances, matches = nearest(planes[0], first, (down, right), OFFSETS, MATCHES)
    weights = (1 + scale * distances).pow(-4)
    weights = weights / (weights.sum(0) + CONSTANT)
    places = places_of(planes[0], first, (down, right))
    changes = planes.new_zeros(len(planes), down, right, SIDE, SIDE)
    flat = planes.flatten(1)
    own = flat[:, places]
    for weight, away in zip(weights, matches, strict=True):
        changes += weight[..., None, None] * (flat[:, places + away[..., None, None]] - own)
    blocks = changes.flatten(1, 2).flatten(2).transpose(1, 2)  # (K, SIDE², blocks)
    size = STRIDE * (down - 1) + SIDE, STRIDE * (right - 1) + SIDE
    total = F.fold(blocks, size, SIDE, stride=STRIDE)[:, 0]
    return total[:, STRIDE : STRIDE + height, STRIDE : STRIDE + width] / (SIDE // STRIDE) ** 2


def nearest(
    plane: Tensor, first: int, blocks: tuple[int, int], offsets: np.ndarray, matches: int
) -> tuple[Tensor, Tensor]:
    """What blocks of a plane (H, W) are most like, the nearest first: (matches, ROWS, COLUMNS), each.

    Sums of the squares of differences, and how far away in the flattened plane that is; of equal sums the first ones.

    Args:
        first: the row and column of the first block.
        blocks: (ROWS, COLUMNS), at every STRIDE-th row and column.
        offsets: (N, 2), down and right.
    """
    rows, columns = (STRIDE * (count - 1) + SIDE for count in blocks)

    def moved(by: tuple[int, int]) -> Tensor:
        return plane[first + by[0] :, first + by[1] :][:rows, :columns]

    distances = plane.new_full((matches, *blocks), math.inf)
    chosen = torch.zeros_like(distances, dtype=torch.int64)
    for start in range(0, len(offsets), _TOGETHER):
        some = offsets[start : start + _TOGETHER].tolist()
        squares = ((moved(at) - moved((0, 0))).square_()[None] for at in some)  # stay in the cache
        found = torch.cat([F.avg_pool2d(its, SIDE, STRIDE, divisor_override=1) for its in squares])
        number = torch.arange(start, start + len(some), device=plane.device)
        all_numbers = torch.cat([chosen, number[:, None, None].expand_as(found)])
        distances, places = torch.cat([distances, found]).sort(dim=0, stable=True)
        distances, chosen = distances[:matches], all_numbers.gather(0, places[:matches])
    return distances, torch.from_numpy(offsets @ [plane.shape[1], 1]).to(plane.device)[chosen]


def places_of(plane: Tensor, first: int, blocks: tuple[int, int]) -> Tensor:
    """Where the pixels of the blocks of :func:`nearest` lie in the flattened plane: (ROWS, COLUMNS, SIDE, SIDE)."""
    inside = torch.arange(SIDE, device=plane.device)
    rows, columns = (first + STRIDE * torch.arange(count, device=plane.device)[:, None] + inside for count in blocks)
    return rows[:, None, :, None] * plane.shape[1] + columns[:, None]
