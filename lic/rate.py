"""Rate control: the quality code at which a file meets a target. No torch here: whoever calls encodes.

Size and PSNR grow with the quality code, smoothly but not strictly. The search keeps a code on each side of the target
and interpolates between them, so that few encodings are needed; what it returns has been encoded and meets the target.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

from lic.errors import LicError
from lic.quality import MAX_CODE

MAX_TRIES = 24  # more than enough to halve the whole range of codes
SIZE_USED = 0.99  # of a size: good enough to stop
PSNR_ABOVE = 0.015  # dB over a PSNR: good enough to stop
_TYPICAL = {"size": (math.log(0.08), math.log(3.5)), "psnr": (25.0, 43.5)}  # at both ends: log of bpp; dB

Kind = Literal["size", "bpp", "psnr"]
T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What to meet: ``size`` in bytes or ``bpp`` of the whole file, never exceeded; ``psnr`` in dB, from above."""

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        """Raises ValueError for targets of no such kind and for those that are no positive number."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"a target is one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"a target must be a positive number, not {self.value:g}")

    def __str__(self) -> str:
        return {"size": "{:.0f} bytes", "bpp": "{:.4g} bpp", "psnr": "{:.4g} dB"}[self.kind].format(self.value)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes of ``20000``, ``20k`` (1000), ``1.5M``, ``100Ki`` (1024), with or without a B. Raises ValueError."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size: write for instance 20000, 20k or 100Ki")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Try(Generic[T]):
    """One encoding: its code, its value in the target's measure, and whatever the encoder returned."""

    code: int
    value: float
    result: T


def search(
    encode: Callable[[int], T],
    value_of: Callable[[T], float],
    target: Target,
    pixels: int,
    *,
    first: int | None = None,
    or_nearest: bool = False,
) -> Try[T]:
    """The encoding that meets the target most closely.

    Args:
        encode: encodes at a quality code.
        value_of: size in bytes (for a target of size or bpp) or PSNR in dB of what ``encode`` returned.
        target: what to meet.
        pixels: of the picture.
        first: the code to try first.
        or_nearest: return the nearest possible encoding instead of raising LicError.

    Raises:
        LicError: no quality meets the target; the message names the nearest possible value.
    """
    wants_psnr = target.kind == "psnr"
    limit = target.value * pixels / 8 if target.kind == "bpp" else target.value
    scale: Callable[[float], float] = (lambda v: v) if wants_psnr else (lambda v: math.log(max(v, 1) * 8 / pixels))
    # The middle of what is good enough: aimed at the limit itself, every other try would miss it by a little.
    goal = scale(limit) + PSNR_ABOVE / 2 if wants_psnr else scale((1 + SIZE_USED) / 2 * limit)

    ends = _TYPICAL["psnr" if wants_psnr else "size"]
    low, high = (0, ends[0]), (MAX_CODE, ends[1])  # (code, scaled value), guessed until encoded
    known: dict[int, float] = {}
    best: Try[T] | None = None
    end: Try[T] | None = None  # of the range of codes, on the side of the target
    while len(known) < MAX_TRIES:
        code = first if first is not None and not known else _between(low, high, goal, known)
        if code is None:
            break
        result = encode(code)
        value = known[code] = value_of(result)
        if code == (MAX_CODE if wants_psnr else 0):
            end = Try(code, value, result)
        meets = value >= limit if wants_psnr else value <= limit
        if meets and (best is None or abs(value - limit) < abs(best.value - limit)):
            best = Try(code, value, result)
        if best is not None and abs(best.value - limit) <= (PSNR_ABOVE if wants_psnr else (1 - SIZE_USED) * limit):
            break
        if value > limit:
            high = (code, scale(value))
        else:
            low = (code, scale(value))
    if best is None:
        assert end is not None
        if or_nearest:
            return end
        nearest = end.value
        shown = f"{nearest:.2f} dB" if wants_psnr else f"{nearest:.0f} bytes ({8 * nearest / pixels:.4f} bpp)"
        raise LicError(f"no quality gives {target}: {'at most' if wants_psnr else 'at least'} {shown} are possible")
    return best


def _between(low: tuple[int, float], high: tuple[int, float], goal: float, known: dict[int, float]) -> int | None:
    """The next code to try, or None when there is none left between the two sides."""
    for end, is_outside in ((low, goal <= low[1]), (high, goal >= high[1])):
        if is_outside and end[0] not in known:
            return end[0]  # a guess about the end of the range was wrong, or the target lies beyond it
    if high[0] - low[0] <= 1:
        return next((code for code in (low[0], high[0]) if code not in known), None)
    share = (goal - low[1]) / (high[1] - low[1]) if high[1] > low[1] else 0.5
    if len(known) > 6:
        share = 0.5  # not smooth enough to interpolate
    code = low[0] + round((high[0] - low[0]) * min(max(share, 0.02), 0.98))
    return min(max(code, low[0] + 1), high[0] - 1)
