"""Rate-distortion curves and the Bjøntegaard delta rate between them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from lic.bench.metrics import ms_ssim_db
from lic.errors import LicError


@dataclass(frozen=True)
class Curve:
    """One codec on one set of pictures: means over the pictures, one entry per quality."""

    name: str
    bpp: tuple[float, ...]
    psnr: tuple[float, ...] | None  # dB
    ms_ssim: tuple[float, ...] | None = None  # linear, 0..1
    source: str = ""

    def quality(self, metric: str) -> tuple[float, ...] | None:
        """The points in dB of ``metric`` ("psnr" or "ms_ssim"); None if the curve has none."""
        if metric == "psnr":
            return self.psnr
        return None if self.ms_ssim is None else tuple(map(ms_ssim_db, self.ms_ssim))


def bd_rate(anchor: Curve, test: Curve, metric: str = "psnr") -> float:
    """Mean difference in bits of ``test`` against ``anchor`` at equal quality, in percent.

    Log-rate as a function of quality (PSNR, or MS-SSIM in dB), interpolated by PCHIP and integrated over
    the qualities that both curves reach; negative: ``test`` needs fewer bits. Raises ValueError if a curve
    lacks the metric, has fewer than two points or quality that does not grow with rate, or if the two
    curves share no quality.
    """
    curves = [_log_rate(curve, metric) for curve in (anchor, test)]
    low, high = overlap(anchor, test, metric)
    difference = curves[1].integrate(low, high) - curves[0].integrate(low, high)
    return (math.exp(float(difference) / (high - low)) - 1) * 100


def overlap(a: Curve, b: Curve, metric: str = "psnr") -> tuple[float, float]:
    """The range of quality in dB that both curves reach. Raises ValueError if there is none."""
    points = [_quality(curve, metric) for curve in (a, b)]
    low, high = max(map(min, points)), min(map(max, points))
    if not low < high:
        raise ValueError(f"no overlap in {metric}: {a.name} and {b.name} share no quality")
    return low, high


def load_curves(path: Path) -> list[Curve]:
    """Read ``{"curves": {name: {"bpp": [...], "psnr": [...] or null, "ms_ssim": [...], "source": ...}}}``.

    Raises LicError naming the file if it cannot be read or does not have this form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["curves"]
        return [_curve(name, entry) for name, entry in entries.items()]
    except OSError as error:
        raise LicError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LicError(f"{path}: not a file of rate-distortion curves ({error!r})") from error


def dump_curves(curves: Sequence[Curve], about: str) -> str:
    """JSON text that :func:`load_curves` reads."""
    entries = {}
    for curve in curves:
        points = {"bpp": curve.bpp, "psnr": curve.psnr, "ms_ssim": curve.ms_ssim}
        rounded = {key: [round(v, 6) for v in values] for key, values in points.items() if values is not None}
        entries[curve.name] = {**rounded, "source": curve.source}
    return json.dumps({"_about": about, "curves": entries}, indent=1, ensure_ascii=False) + "\n"


def _curve(name: str, entry: Mapping[str, Any]) -> Curve:
    def points(key: str) -> tuple[float, ...] | None:
        values = entry.get(key)
        return None if values is None else tuple(float(value) for value in values)

    bpp, psnr, ms_ssim = points("bpp"), points("psnr"), points("ms_ssim")
    if bpp is None or any(len(bpp) != len(values) for values in (psnr, ms_ssim) if values is not None):
        raise ValueError(f"lists of unequal length in {name!r}")
    if not all(math.isfinite(value) for values in (bpp, psnr, ms_ssim) if values for value in values):
        raise ValueError(f"a value of {name!r} is not finite")
    return Curve(name, bpp, psnr, ms_ssim, str(entry.get("source", "")))


def _quality(curve: Curve, metric: str) -> tuple[float, ...]:
    quality = curve.quality(metric)
    if quality is None:
        raise ValueError(f"{curve.name} has no {metric}")
    if len(quality) < 2:
        raise ValueError(f"{curve.name} has fewer than two points")
    return quality


def _log_rate(curve: Curve, metric: str) -> PchipInterpolator:
    order = np.argsort(curve.bpp)
    rate, quality = np.array(curve.bpp)[order], np.array(_quality(curve, metric))[order]
    if rate[0] <= 0 or np.any(np.diff(rate) <= 0) or np.any(np.diff(quality) <= 0):
        raise ValueError(f"{curve.name}: {metric} does not grow with rate")
    return PchipInterpolator(quality, np.log(rate))
