"""What denoising would change in decoded pixels (bitstream_spec.md, 6.4).

A synthesis, which sees a place through fixed kernels, does not compare pixels. The refinement behind it
(:mod:`lic.model.refinement`) is given the changes by non-local means, shrunken cosine transforms and groups of blocks
(:mod:`lic.denoising.groups`). The first two, and those by matched blocks (:mod:`lic.denoising.block_matching`), are
features of the picture's own filter (:mod:`lic.pipeline.restoration`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lic.denoising import cosine_shrinkage, non_local_means
from lic.denoising.cosine_shrinkage import SHRUNKEN
from lic.denoising.non_local_means import MEANS

CHANGES = MEANS + SHRUNKEN
REACH = max(non_local_means.REACH, cosine_shrinkage.REACH)  # pixels; even, for the sake of the latter
MIDDLE = 127.5  # of samples 0..255
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (2 / 3, -4 / 3, 2 / 3))  # what each plane adds to red, green and blue


def changes(planes: Tensor, step: float) -> Tensor:
    """By how much each of the CHANGES would change each plane: (CHANGES, K, H, W).

    Args:
        planes: (K, H + 2·REACH, W + 2·REACH), K being 1 or 3; their first pixels have even places in the picture.
        step: the quantiser's, in the units of the planes.
    """

    def with_around(pixels: int) -> Tensor:
        inner = slice(REACH - pixels, pixels - REACH or None)
        return planes[:, inner, inner]

    found = planes.new_empty(CHANGES, len(planes), *(size - 2 * REACH for size in planes.shape[1:]))
    found[:MEANS] = non_local_means.means(with_around(non_local_means.REACH), step)
    found[MEANS:] = cosine_shrinkage.shrunken(with_around(cosine_shrinkage.REACH), step)
    return found


def planes_of(pixels: Tensor) -> list[Tensor]:
    """Of (..., 3): the mean of the colours, red - blue, and these two - green, whose errors are orthogonal."""
    if pixels.shape[-1] == 1:
        return [pixels[..., 0] - MIDDLE]
    red, green, blue = pixels.unbind(-1)
    return [(red + green + blue) / 3 - MIDDLE, (red - blue) / 2, (red - 2 * green + blue) / 4]


def pixels_of(planes: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`planes_of`."""
    if len(planes) == 1:
        return planes[0][..., None] + MIDDLE
    mean, first, second = planes
    mean = mean + MIDDLE
    return torch.stack([mean + first + 2 / 3 * second, mean - 4 / 3 * second, mean - first + 2 / 3 * second], dim=-1)
