"""Means of the first step, improved by neighbours in the same step.

The first step of a context model knows the hyper-latents alone, and one of their positions stands for many latents.
What they leave open of a few channels, the means of brightness and colour above all, is alike at positions next to each
other. These channels are therefore coded before the others of the step, from a coarse grid to finer ones, and what is
known of a position's neighbours is added to its mean: interpolation as in progressive coding of pictures (Burt and
Adelson 1983, IEEE Trans. Commun. 31(4)), of what the network does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lic.coder import SCALES

FRACTIONS = 8  # positions of a mean between two integers: means count in eighths
MEAN_LIMIT = FRACTIONS << 17  # of means in eighths, as of those that context models predict
WEIGHT_BITS = 8  # weights count in 256ths
MAX_LEVELS = 11  # a coarsest grid of every 32nd position

TYPES = {"channels": np.dtype(np.int16), "weight": np.dtype(np.int8), "narrower": np.dtype(np.int8)}  # in weights files

Ints = npt.NDArray[np.int64]


class Level(NamedTuple):
    """Positions (P,) of a grid, in raster order, whose neighbours lie ``distance`` off: diagonally or next to them."""

    positions: Ints
    distance: int
    is_diagonal: bool


class Piece(NamedTuple):
    """Latents of a step that are coded together, in an order of their own, and whether they are its last ones.

    at: their places in the step, n of them; mean, in eighths, and scale_index: as predicted, (B, n).
    """

    at: Ints | slice
    mean: Ints
    scale_index: Ints
    is_last: bool

    @property
    def shift(self) -> Ints:
        """The mean, rounded."""
        return (self.mean + FRACTIONS // 2) // FRACTIONS

    @property
    def eighths(self) -> Ints:
        """Of the mean's fraction plus 4, 0..7."""
        return (self.mean + FRACTIONS // 2) % FRACTIONS


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What the first step of a model learns from neighbours.

    channels: (K,), increasing. weight: (K, levels - 1), of the sum of four neighbours, in 256ths, for all levels but
    the coarsest. narrower: (K, levels), how many scale indices less its latents have. ValueError if they are not so, or
    beyond 16 bits (channels) and 8 bits.
    """

    channels: Ints
    weight: Ints
    narrower: Ints

    def __post_init__(self) -> None:
        count, levels = len(self.channels), self.narrower.shape[-1]
        if levels % 2 == 0 or not 1 < levels <= MAX_LEVELS:
            raise ValueError(f"{levels} levels of neighbours")
        if not count or self.weight.shape != (count, levels - 1) or self.narrower.shape != (count, levels):
            raise ValueError("weights of other neighbours")
        if np.any(np.diff(self.channels, prepend=-1) <= 0):
            raise ValueError("channels of neighbours that do not increase")
        for name, array in vars(self).items():
            if np.any(array != array.astype(TYPES[name])):
                raise ValueError(f"neighbours: {name} out of range")

    def pieces(self, grid: tuple[int, int], mean: Ints, scale_index: Ints, integers: Ints) -> Iterator[Piece]:
        """The latents of a step in pieces to be coded one after another, those of each level and then all others.

        Args:
            grid: rows and columns of the positions of the step.
            mean, scale_index: as predicted without neighbours, (B, N) of N latents in the order (row, column, channel),
                the mean in eighths.
            integers: (B, N); those of a piece must be there when the next one is asked for.
        """
        rows, columns = grid
        width = mean.shape[1] // (rows * columns)
        expected = mean.reshape(len(mean), rows, columns, width)[..., self.channels]
        for number, (positions, distance, is_diagonal) in enumerate(levels_of(grid, self.narrower.shape[1])):
            if not len(positions):
                continue
            at = (positions[:, None] * width + self.channels).ravel()
            its_mean = mean[:, at]
            if number:
                known = integers.reshape(len(mean), rows, columns, width)[..., self.channels]
                total = sum_around(FRACTIONS * known - expected, distance, is_diagonal)
                change = self.weight[:, number - 1] * total.reshape(len(mean), rows * columns, -1)[:, positions]
                change = change + (1 << WEIGHT_BITS - 1) >> WEIGHT_BITS
                its_mean = (its_mean + change.reshape(its_mean.shape)).clip(-MEAN_LIMIT, MEAN_LIMIT)
            narrower = np.tile(self.narrower[:, number], len(positions))
            yield Piece(at, its_mean, (scale_index[:, at] - narrower).clip(0, len(SCALES) - 1), False)
        is_other = np.ones((rows * columns, width), bool)
        is_other[:, self.channels] = False
        others = np.flatnonzero(is_other)
        yield Piece(others, mean[:, others], scale_index[:, others], True)


def levels_of(grid: tuple[int, int], levels: int) -> list[Level]:
    """Every position of a grid once: each second, fourth, ... of both directions, then what lies between these."""
    rows, columns = np.indices(grid)
    spacing = 1 << levels // 2

    def level(chosen: npt.NDArray[np.bool_], distance: int, is_diagonal: bool) -> Level:
        return Level(np.flatnonzero(chosen), distance, is_diagonal)

    found = [level((rows % spacing == 0) & (columns % spacing == 0), spacing, False)]
    while spacing > 1:
        half = spacing // 2
        on_grid = (rows % half == 0) & (columns % half == 0)
        odd_row, odd_column = rows // half % 2 == 1, columns // half % 2 == 1
        found.append(level(on_grid & odd_row & odd_column, half, True))
        found.append(level(on_grid & (odd_row != odd_column), half, False))
        spacing = half
    return found


def sum_around(x: Ints, distance: int, is_diagonal: bool) -> Ints:
    """Of x (B, rows, columns, K), at each position the sum of its four neighbours."""
    by_rows = _sum_of_both(x, distance, 1)
    return _sum_of_both(by_rows, distance, 2) if is_diagonal else by_rows + _sum_of_both(x, distance, 2)


def _sum_of_both(x: Ints, distance: int, axis: int) -> Ints:
    """Of the neighbours each way along an axis; the other one twice where one is missing, 0 where both are."""
    size = x.shape[axis]
    here = np.arange(size)
    before, after = here - distance, here + distance
    has_before, has_after = before >= 0, after < size
    before, after = np.where(has_before, before, after), np.where(has_after, after, before)
    known = np.reshape(has_before | has_after, [-1 if n == axis else 1 for n in range(x.ndim)])
    both: Ints = x.take(before, axis, mode="clip") + x.take(after, axis, mode="clip")
    return both * known
