"""Shrunken cosine transforms: by how much less of what is small in them a pixel's surroundings would change it.

Of blocks of 8x8 pixels all around a pixel, coefficients that are no larger than the quantiser's error are mostly that
error; a Wiener filter multiplies them by less than one (Yaroslavsky 1996, "Local adaptive image restoration and
enhancement with the use of DFT and DCT in a running window", SPIE 2825; bitstream_spec.md, 6.4).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lic import coder

THRESHOLDS = (0.3, 1.0)  # standard deviations of the quantiser's error
SHRUNKEN = len(THRESHOLDS)
SIDE, STRIDE = 8, 2  # of blocks, which begin at every second row and column
REACH = SIDE


def shrunken(planes: Tensor, step: float) -> Tensor:
    """What each threshold adds to each plane: (SHRUNKEN, K, H, W), of K planes (K, H + 2·REACH, W + 2·REACH).

    Args:
        planes: their first pixels have even places in the picture.
        step: the quantiser's, in the units of the planes.
    """
    thresholds = tuple(of_error * step / math.sqrt(12) for of_error in THRESHOLDS)
    loops = coder.loops() if planes.device.type == "cpu" else None
    if loops is None:
        return _shrunken(planes, thresholds)
    return torch.from_numpy(loops.shrunken(planes.contiguous().numpy(), REACH, thresholds, torch.get_num_threads()))


def _shrunken(planes: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """As the compiled loop has them."""
    transform = planes.new_tensor(np.kron(cosines(), cosines()))
    found = transform @ F.unfold(planes[:, None], SIDE, stride=STRIDE)  # (K, 64, blocks)
    inner = (..., slice(REACH, -REACH), slice(REACH, -REACH))
    of_thresholds = []
    for threshold in thresholds:
        power = found.square()
        shrunken = found * (power / (power + threshold**2))
        shrunken[:, 0] = found[:, 0]
        total = F.fold(transform.T @ shrunken, planes.shape[1:], SIDE, stride=STRIDE)[:, 0]
        of_thresholds.append(total[inner] / (SIDE // STRIDE) ** 2 - planes[inner])
    return torch.stack(of_thresholds)


def cosines() -> np.ndarray:
    """(frequency, place), orthonormal."""
    frequency, place = np.ogrid[:SIDE, :SIDE]
    cosines = np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE)) * math.sqrt(2 / SIDE)
    cosines[0] /= math.sqrt(2)
    return cosines
