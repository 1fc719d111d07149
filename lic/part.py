"""What part of a file to decode: a region of the picture, or its leading groups."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from lic.errors import LicError, UsageError

if TYPE_CHECKING:
    import numpy as np

Preview: TypeAlias = int | Literal["auto"]  # how many groups; "auto": all those that are whole


class Region(NamedTuple):
    """A rectangle of the upright picture in pixels; ``x`` and ``y`` are those of its top left pixel."""

    x: int
    y: int
    width: int
    height: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    def check_inside(self, width: int, height: int) -> None:
        """Raises LicError unless the region lies inside a picture of that size."""
        if self.x + self.width > width or self.y + self.height > height:
            raise LicError(f"the region {self} reaches beyond the picture of {width}x{height} pixels")

    def of(self, samples: np.ndarray) -> np.ndarray:
        """The region of samples (H, W, ...), a view."""
        return samples[self.y : self.y + self.height, self.x : self.x + self.width]


def region_of(values: Sequence[int]) -> Region:
    """(x, y, width, height) as a region. Raises UsageError if it is empty, or can be inside no picture."""
    try:
        region = Region(*map(operator.index, values))
    except TypeError:
        raise UsageError(f"a region is four whole numbers x, y, width, height, not {values!r}") from None
    if min(region.x, region.y) < 0 or min(region.width, region.height) < 1:
        raise UsageError(f"a region starts at 0,0 or later and is at least one pixel wide and high, not {region}")
    return region


def parse_region(text: str) -> Region:
    """``X,Y,W,H``. Raises UsageError."""
    try:
        return region_of([int(word) for word in text.split(",")])
    except ValueError:
        raise UsageError(f"a region is four whole numbers X,Y,W,H, not {text!r}") from None


def preview_of(value: Preview) -> Preview:
    """``value`` itself. Raises UsageError unless it is a positive whole number or "auto"."""
    if value != "auto" and not (isinstance(value, int) and value > 0):
        raise UsageError(f"a preview is of 1 or more groups, or 'auto', not {value!r}")
    return value


def parse_preview(text: str) -> Preview:
    """``N`` or ``auto``. Raises UsageError."""
    number = text.isascii() and text.isdigit()
    return preview_of(int(text) if number else text)  # type: ignore[arg-type]
