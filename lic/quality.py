"""Quality scale: ``-q`` 0..100 to the 16-bit code of the header, to λ and to a quantiser step. No torch.

λ weighs distortion in ``L = bits per pixel + λ · MSE`` with the MSE over 8-bit RGB values (255²).
An active coefficient of an orthonormal transform costs least at the step ``Δ = sqrt(26 / λ)``: with
``D = Δ²/12`` per sample, ``dR/dΔ = -1/(Δ ln 2)`` bits per coefficient and three coefficients per pixel.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Tune = Literal["psnr", "ms-ssim"]  # what a file is to be good in, at its size
TUNES: tuple[Tune, ...] = get_args(Tune)
MAX_CODE = 50_000  # 1/500 of a quality step: finer than any size target needs
MIN_LAMBDA, MAX_LAMBDA = 0.0005, 1.0
MAX_EFFORT = 9
DEFAULT_QUALITY = 40.0  # about 0.5 bpp on Kodak


def code_of(quality: float) -> int:
    """The header's quality code of ``quality`` (0..100). Raises ValueError outside that range."""
    if not 0 <= quality <= 100:  # also refuses NaN
        raise ValueError(f"quality must be between 0 and 100, not {quality:g}")
    return round(quality / 100 * MAX_CODE)


def quality_of(code: int) -> float:
    """Inverse of :func:`code_of`."""
    return code * 100 / MAX_CODE


def lambda_of(code: float) -> float:
    """λ of a quality code: log-spaced from MIN_LAMBDA to MAX_LAMBDA."""
    return MIN_LAMBDA * (MAX_LAMBDA / MIN_LAMBDA) ** (code / MAX_CODE)


def step_of(code: float) -> float:
    """Theoretical quantiser step in units of 8-bit samples for an orthonormal transform."""
    return math.sqrt(26 / lambda_of(code))
