"""Distortion between two pictures of equal size, in NumPy float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from lic import images

Pixels = NDArray[np.uint8]  # (H, W, 3)
Plane = NDArray[np.float64]  # (H, W)

# A lossless result has no finite PSNR; a ceiling keeps means finite and exceeds what 8-bit pictures of
# any usual size reach otherwise (one sample of 10 megapixels wrong by one: 123 dB, of Kodak: 109 dB).
MAX_PSNR = 130.0


def psnr(a: Pixels, b: Pixels) -> float:
    """PSNR in dB over all samples of two uint8 arrays; ``MAX_PSNR`` if they are equal.

    The PSNR of a set of pictures is the mean of their PSNRs, never the PSNR of their mean MSE.
    Raises ValueError if the shapes or types do not fit.
    """
    _check(a, b)
    return min(MAX_PSNR, images.psnr(a, b))


def ms_ssim(a: Pixels, b: Pixels) -> float:
    """Multi-scale SSIM in 0..1 of two uint8 arrays (H, W, 3): mean over the three channels.

    As learned codecs report it: 11-tap Gaussian window without padding, 2×2 means between scales,
    negative terms clamped to 0. A picture whose shorter side has no room for five scales (less than
    161 pixels) uses the scales that fit, their exponents rescaled to the same sum; below 11 pixels the
    window shrinks to the picture. Raises ValueError if the shapes or types do not fit.
    """
    _check(a, b)
    if a.ndim != 3:
        raise ValueError(f"expected arrays (H, W, C), not {a.shape}")
    return float(np.mean([_ms_ssim_plane(a[..., c], b[..., c]) for c in range(a.shape[2])]))


def ms_ssim_db(value: float) -> float:
    """MS-SSIM on the scale that plots and BD-rates use: ``-10 log10(1 - value)`` dB."""
    return -10 * math.log10(max(1 - value, 1e-10))


def _check(a: Pixels, b: Pixels) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.size == 0:
        raise ValueError(f"expected two uint8 arrays of one shape, not {a.dtype} {a.shape} and {b.dtype} {b.shape}")


def _ms_ssim_plane(a: Pixels, b: Pixels) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    exponents = images.ms_ssim_exponents(min(x.shape))
    result = 1.0
    for scale, exponent in enumerate(exponents):
        ssim, contrast = _ssim(x, y)
        last = scale == len(exponents) - 1
        result *= max(ssim if last else contrast, 0.0) ** exponent
        if not last:
            x, y = _halve(x), _halve(y)
    return result


def _ssim(x: Plane, y: Plane) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure term of one scale."""
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    contrast = (2 * covariance + images.MS_SSIM_C2) / (var_x + var_y + images.MS_SSIM_C2)
    luminance = (2 * mean_x * mean_y + images.MS_SSIM_C1) / (mean_x**2 + mean_y**2 + images.MS_SSIM_C1)
    return float(np.mean(luminance * contrast)), float(np.mean(contrast))


def _blur(x: Plane) -> Plane:
    """Gaussian window at every position where it fits entirely (odd size, at most the picture)."""
    for axis in (0, 1):
        radius = (min(images.MS_SSIM_WINDOW, x.shape[axis]) - 1) // 2
        taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * images.MS_SSIM_SIGMA**2))
        x = correlate1d(x, taps / taps.sum(), axis=axis)
        inside = slice(radius, x.shape[axis] - radius)
        x = x[inside] if axis == 0 else x[:, inside]
    return x


def _halve(x: Plane) -> Plane:
    """Means of 2×2 blocks; an odd last row or column is repeated."""
    x = np.pad(x, [(0, side % 2) for side in x.shape], mode="edge")
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4
