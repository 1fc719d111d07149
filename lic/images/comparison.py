"""How far two pictures are apart."""

from __future__ import annotations

import math

import numpy as np

_ROWS = 64  # at a time: memory of a large picture

# Wang, Simoncelli and Bovik 2003: exponents of the five scales, window, stabilising constants.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_WINDOW, MS_SSIM_SIGMA = 11, 1.5
MS_SSIM_C1, MS_SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


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


def ms_ssim_exponents(side: int) -> tuple[float, ...]:
    """Exponents of the scales of MS-SSIM that a picture's shorter side has room for, at least one, their sum kept."""
    count = 1
    while count < len(MS_SSIM_WEIGHTS) and (side := (side + 1) // 2) >= MS_SSIM_WINDOW:
        count += 1
    weights = MS_SSIM_WEIGHTS[:count]
    return tuple(weight * sum(MS_SSIM_WEIGHTS) / sum(weights) for weight in weights)
