"""Non-local means: by how much pixels that look like a pixel, near and farther away, differ from it.

What rounding has done to a pixel, it has not done to others that should be the same: their weighted mean has less noise
(Buades, Coll and Morel 2005, "A non-local algorithm for image denoising", CVPR; bitstream_spec.md, 6.4). A synthesis,
which sees a place through fixed kernels, does not compare pixels. Pixels count for each other the more, the more alike
their surroundings of 3x3 pixels are, measured by the quantiser's error, and more so where the picture is busy, since
that error is larger there.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lic import coder

# Pixels that are compared are multiples of `step` away, up to `last` in both directions, and farther than those of the
# group before.
LATTICES = ((1, 1), (2, 4), (4, 16))  # step, last
KERNELS = (1 / 0.09, 1 / 0.81)  # of distances
MEANS = len(LATTICES) * len(KERNELS)
CONSTANT = 0.05  # the weight of no difference
CALM_RADIUS = 4  # pixels around one that say how busy its surroundings are
REACH = LATTICES[-1][1] + CALM_RADIUS


def _offsets() -> np.ndarray:
    """(N, 3): down, right, and the group; one of each two opposite ones."""
    found, before = [], 0
    for group, (step, last) in enumerate(LATTICES):
        multiples = range(-last, last + 1, step)
        lattice = ((down, right) for down in multiples for right in multiples if (down, right) > (0, 0))
        found += [(*offset, group) for offset in lattice if max(map(abs, offset)) > before]
        before = last
    return np.array(found, np.int64)


OFFSETS = _offsets()


def means(planes: Tensor, step: float) -> Tensor:
    """The MEANS of each plane: (MEANS, K, H, W), of K planes (K, H + 2·REACH, W + 2·REACH), 1 or 3.

    Args:
        step: the quantiser's, in the units of the planes.
    """
    variance = step**2 / 12  # of the quantiser's error
    calm, scale = _calm(planes[:1], variance), 1 / (9 * variance)
    loops = coder.loops() if planes.device.type == "cpu" else None
    if loops is None:
        return _means(planes, calm, scale)
    arrays = planes.contiguous().numpy(), calm.contiguous().numpy()
    threads = torch.get_num_threads()
    found = loops.means(*arrays, REACH, OFFSETS, scale, KERNELS, CONSTANT, threads)
    return torch.from_numpy(found).flatten(0, 1)


def _calm(plane: Tensor, variance: float) -> Tensor:
    """1 where a plane (1, H, W) is smooth, less where it varies by more than the quantiser's error: (H, W)."""
    powers = torch.stack([plane[0], plane[0].square()])
    for axis in (1, 2):
        size = powers.shape[axis] - 2 * CALM_RADIUS
        powers = reduce(torch.add, (powers.narrow(axis, start, size) for start in range(2 * CALM_RADIUS + 1)))
    mean, square = powers / (2 * CALM_RADIUS + 1) ** 2
    calm = (1 + (square - mean.square()).clamp_(min=0) / (2 * variance)).rsqrt_()
    return F.pad(calm, (CALM_RADIUS,) * 4)  # nobody asks for those at the border


def _means(planes: Tensor, calm: Tensor, scale: float) -> Tensor:
    """As the compiled loop has them."""
    height, width = (side - 2 * REACH for side in planes.shape[1:])
    sums = planes.new_zeros(len(LATTICES), len(KERNELS), 1 + len(planes), height, width)
    for down, right, group in OFFSETS.tolist():
        # Pixels that make a pair with the one at an offset from them, if either is in the picture, begin here.
        top, left = -down, min(0, -right)
        rows, columns = height + down, width + abs(right)

        def pixels(
            plane: Tensor, around: int, i: int, j: int, at: tuple[int, ...] = (top, left, rows, columns)
        ) -> Tensor:
            part = plane.narrow(-2, at[0] + i + REACH - around, at[2] + 2 * around)
            return part.narrow(-1, at[1] + j + REACH - around, at[3] + 2 * around)

        difference = pixels(planes, 1, down, right) - pixels(planes, 1, 0, 0)
        squares = difference.square().sum(0, keepdim=True)
        distance = F.avg_pool2d(squares, 3, 1, divisor_override=1)[0] * scale
        distance *= pixels(calm, 0, 0, 0) * pixels(calm, 0, down, right)
        difference = difference[:, 1:-1, 1:-1]
        for kernel, of_kernel in zip(KERNELS, sums[group], strict=True):
            weight = (1 + distance * kernel).pow(-4)
            changes = torch.cat([weight[None], weight * difference])
            of_kernel += changes[:, down:, -left : width - left]
            changes[1:].neg_()  # what the one is to the other
            of_kernel += changes[:, :height, -left - right : width - left - right]
    return (sums[:, :, 1:] / (sums[:, :, :1] + CONSTANT)).flatten(0, 1)
