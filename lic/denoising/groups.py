"""Groups of blocks that look alike: by how much what they have in common differs from a pixel.

Each block of 8x8 pixels looks for the 15 that are most like it, as in :mod:`lic.denoising.block_matching`. Not only
this block is mended then, but all members of its group are, by what they are together, so that a pixel gets what all
groups say that any of its blocks is in, some sixty of them: the collaborative filtering of BM3D (Dabov, Foi, Katkovnik
and Egiazarian 2007, "Image denoising by sparse 3-D transform-domain collaborative filtering", IEEE Trans. Image
Process. 16(8); bitstream_spec.md, 6.4). Two kinds: what is small in cosine transforms of the members, transformed
once more from member to member, is shrunken; and all become their weighted mean.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lic import coder
from lic.denoising import block_matching
from lic.denoising.block_matching import KERNEL, SIDE, STRIDE
from lic.denoising.cosine_shrinkage import cosines

MEMBERS = 16
RADIUS = 14  # pixels that a member may be away from the block that looks for it, in both directions
THRESHOLD = 0.4  # standard deviations of the quantiser's error
GROUPED = 2  # kinds of changes
REACH = -(-(2 * RADIUS + SIDE - 1) // STRIDE) * STRIDE
OFFSETS = block_matching.OFFSETS[np.abs(block_matching.OFFSETS).max(axis=1) <= RADIUS]
_TOGETHER = 4096  # groups at a time


def grouped(planes: Tensor, step: float) -> Tensor:
    """By how much groups would change each plane: (GROUPED, K, H, W), of K planes (K, H + 2·REACH, W + 2·REACH).

    Blocks are compared in the first plane.

    Args:
        planes: their first pixels are at multiples of STRIDE in the picture.
        step: the quantiser's, in the units of the planes.
    """
    threshold, scale = THRESHOLD * step / math.sqrt(12), KERNEL * 12 / (SIDE**2 * step**2)
    loops = coder.loops() if planes.device.type == "cpu" else None
    if loops is None:
        return _grouped(planes, threshold, scale)
    its, threads = planes.contiguous().numpy(), torch.get_num_threads()
    return torch.from_numpy(loops.grouped(its, REACH, OFFSETS, threshold, scale, threads))


def _grouped(planes: Tensor, threshold: float, scale: float) -> Tensor:
    """As the compiled loop has them; on a GPU, which adds up in any order, up to rounding each time."""
    height, width = (side - 2 * REACH for side in planes.shape[1:])
    before = (SIDE - 1 + RADIUS) // STRIDE * STRIDE
    first, blocks = REACH - before, [(before + side - 1 + RADIUS) // STRIDE + 1 for side in (height, width)]
    distances, away = block_matching.nearest(planes[0], first, (blocks[0], blocks[1]), OFFSETS, MEMBERS - 1)
    own = block_matching.places_of(planes[0], first, (blocks[0], blocks[1])).flatten(2).flatten(0, 1)  # (groups, 64)
    away = away.flatten(1)
    away = torch.cat([torch.zeros_like(away[:1]), away])  # (MEMBERS, groups)
    weights = (1 + scale * distances.flatten(1)).pow(-4)
    weights = torch.cat([torch.ones_like(weights[:1]), weights])

    transform = planes.new_tensor(np.kron(cosines(), cosines()))
    haar = planes.new_tensor(_haar())
    sums = planes.new_zeros(GROUPED, len(planes), planes[0].numel())
    counts = planes.new_zeros(GROUPED, planes[0].numel())
    for start in range(0, len(own), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        places = own[some] + away[:, some, None]  # (MEMBERS, groups, 64)
        weight = weights[:, some, None]
        counts[0].index_add_(0, places.flatten(), torch.ones_like(places, dtype=planes.dtype).flatten())
        counts[1].index_add_(0, places.flatten(), weight.expand_as(places).flatten())
        for plane, (shrunken, averaged) in zip(planes, sums.transpose(0, 1), strict=True):
            members = plane.flatten()[places]
            found = torch.einsum("um,mgp->ugp", haar, members @ transform.T)
            power = found.square()
            kept = found * (power / (power + threshold**2))
            kept[0, :, 0] = found[0, :, 0]
            kept = torch.einsum("um,ugp->mgp", haar, kept) @ transform
            shrunken.index_add_(0, places.flatten(), kept.flatten())
            mean = (weight * members).sum(0) / weight.sum(0)
            averaged.index_add_(0, places.flatten(), (weight * mean).flatten())
    changed = (sums / counts[:, None]).unflatten(2, planes.shape[1:])
    inner = (..., slice(REACH, REACH + height), slice(REACH, REACH + width))
    return changed[inner] - planes[inner]


@cache
def _haar() -> np.ndarray:
    """(coefficient, member), orthonormal."""
    haar = np.ones((1, 1))
    while len(haar) < MEMBERS:
        haar = np.concatenate([np.kron(haar, [1, 1]), np.kron(np.eye(len(haar)), [1, -1])]) / math.sqrt(2)
    return haar
