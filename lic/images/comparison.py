"""How far two pictures are apart."""

from __future__ import annotations

import math

import numpy as np

_ROWS = 64  # at a time: memory of a large picture


def mse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error in 8-bit units of two arrays of one shape, both uint8 or both uint16."""
    error, peak = 0, int(np.iinfo(a.dtype).max)
    for top in range(0, len(a), _ROWS):
        difference = a[top : top + _ROWS].astype(np.int64) - b[top : top + _ROWS]
        error += int(np.sum(np.square(difference)))
    return error * (255 / peak) ** 2 / a.size


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, as for :func:`mse`. Infinite if the arrays are equal."""
    error = mse(a, b)
    return 10 * math.log10(255**2 / error) if error else math.inf
