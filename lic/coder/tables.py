"""Integer probability tables: what encoder and decoder share. Made once, shipped with the weights."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

PRECISION = 16  # probabilities are multiples of 1/65536
END = (1 << PRECISION) - 1  # the last 1/65536 is never coded: it goes to padding, which torchac needs
SKIP_WIDTH = END + 1 - (1 << 3)  # a value at least this wide (1 - 2**-13) is not coded at all
MAX_SIZE = 1 << 14
COST_UNIT = 1 << 32
TRIM = 2.0**-17  # a rarer outermost value costs less as an escape than as an entry of the alphabet

SCALES: npt.NDArray[np.float64] = np.geomspace(0.11, 256.0, 64)
HALF_WIDTH = 3.6  # alphabet in standard deviations each way; 1 value in 3000 escapes
MAX_SCALE = 2.0**18
MAX_CODED_SCALE = 5.7  # in units of 2**raw_bits


@dataclass(frozen=True, eq=False)
class Tables:
    """A set of probability rows, immutable.

    Row ``r`` codes ``size[r]`` symbols. Symbols ``0 .. size[r] - 2`` stand for values ``offset[r] + symbol``;
    the last one is the escape: the value lies outside and follows in the bypass part. With
    ``raw_bits[r] = k > 0`` the row codes ``(v + 2**(k-1)) >> k`` instead of the value v, and the k low bits
    of ``v + 2**(k-1)`` follow raw in the bypass part.
    """

    cdf: npt.NDArray[np.uint16]
    """(rows, width): ``cdf[r, s] / 65536`` is the lower end of symbol s, 65535 from ``s = size[r]`` on."""
    size: IntArray
    """(rows,): number of symbols, the escape included."""
    offset: IntArray
    """(rows,): the value of symbol 0."""
    raw_bits: npt.NDArray[np.uint8]
    """(rows,): number of low bits that are not modelled."""

    def __post_init__(self) -> None:
        _validate(self)
        for array in (self.cdf, self.size, self.offset, self.raw_bits):
            array.setflags(write=False)

    @classmethod
    def from_pmfs(
        cls, pmfs: Sequence[npt.ArrayLike], offsets: Sequence[int], raw_bits: Sequence[int] | None = None
    ) -> Tables:
        """Rows from probability mass functions; what a pmf lacks to 1 is the probability of its escape.

        Args:
            pmfs: one float array per row, any lengths, each with a sum of at most 1 (and a rounding error).
            offsets: the value that the first entry of each pmf stands for.
            raw_bits: low bits of the value left out of each pmf, 0 by default.

        Raises:
            ValueError: an empty, negative or not finite pmf, one with a sum above 1, unequal numbers of rows.
        """
        raw_bits = [0] * len(pmfs) if raw_bits is None else raw_bits
        if not len(pmfs) == len(offsets) == len(raw_bits) > 0:
            raise ValueError("one offset per pmf, and at least one pmf")
        rows, firsts = [], []
        for pmf, offset in zip(pmfs, offsets, strict=True):
            p = np.asarray(pmf, dtype=np.float64)
            if p.ndim != 1 or p.size == 0 or not np.all(np.isfinite(p)) or p.min() < 0 or p.sum() > 1 + 1e-4:
                raise ValueError("a pmf must be a list of non-negative numbers with a sum of at most 1")
            kept = np.flatnonzero(p >= TRIM)
            first, last = (kept[0], kept[-1]) if kept.size else (0, 0)
            p = p[first : last + 1]
            rows.append(_quantise(np.append(p, max(0.0, 1.0 - p.sum()))))
            firsts.append(offset + int(first))
        size = np.array([len(row) for row in rows], dtype=np.int32)
        cdf = np.full((len(rows), int(size.max()) + 2), END, dtype=np.uint16)
        for r, row in enumerate(rows):
            cdf[r, : len(row)] = np.cumsum(row) - row
        return cls(cdf, size, np.array(firsts, dtype=np.int32), np.array(raw_bits, dtype=np.uint8))

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Plain integer arrays to be stored, by field name."""
        return {"cdf": self.cdf, "size": self.size, "offset": self.offset, "raw_bits": self.raw_bits}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Tables:
        """Inverse of :meth:`to_arrays`. Raises ValueError if the arrays are no valid set of tables."""
        types = {"cdf": np.uint16, "size": np.int32, "offset": np.int32, "raw_bits": np.uint8}
        if set(arrays) != set(types):
            raise ValueError(f"coder tables need the arrays {', '.join(types)}")
        for name, dtype in types.items():
            if arrays[name].dtype != dtype:
                raise ValueError(f"coder table {name} must be {np.dtype(dtype).name}")
        return cls(**{name: np.array(arrays[name]) for name in types})

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.size)

    @cached_property
    def mode(self) -> IntArray:
        """(rows,): the most probable symbol."""
        return np.argmax(self._widths, axis=1).astype(np.int32)

    @cached_property
    def skipped(self) -> npt.NDArray[np.bool_]:
        """(rows,): rows so nearly certain that only deviations from the mode are written."""
        is_value = self.mode < self.size - 1
        return (self._widths.max(axis=1) >= SKIP_WIDTH) & is_value & (self.raw_bits == 0)

    @cached_property
    def cost(self) -> npt.NDArray[np.int64]:
        """(rows, width - 1): code length of each symbol in units of 1 / COST_UNIT bit; 16 bits for padding.

        Integers, so that a sum does not depend on its order. Each is 8 units too large: more than rounding
        adds to the coded bits where a symbol is nearly certain (bitstream_spec.md 4.6).
        """
        bits = PRECISION - np.log2(np.maximum(1, self._widths))
        return np.ceil(bits * COST_UNIT).astype(np.int64) + 8

    @cached_property
    def lists(self) -> list[list[int]]:
        """Per row: the lower ends of its symbols and the upper end of the last, for the coder in Python."""
        return [row[: n + 1] for row, n in zip(self.cdf.tolist(), self.size.tolist(), strict=True)]

    @property
    def _widths(self) -> IntArray:
        cdf = self.cdf.astype(np.int32)
        return cdf[:, 1:] - cdf[:, :-1]


def gaussian_tables(scales: npt.ArrayLike = SCALES, fractions: int = 8) -> Tables:
    """Rows for integers distributed as a Gaussian that is integrated over each rounding interval.

    Row ``i * fractions + j``: standard deviation ``scales[i]``, mean ``(j - fractions // 2) / fractions``.

    Raises:
        ValueError: no scales, a scale that is not positive or too large, fractions < 1.
    """
    sigmas = np.asarray(scales, dtype=np.float64)
    if sigmas.ndim != 1 or sigmas.size == 0 or not np.all((sigmas > 0) & (sigmas < MAX_SCALE)) or fractions < 1:
        raise ValueError(f"scales must be positive and below {MAX_SCALE}, fractions at least 1")
    pmfs, offsets, raw_bits = [], [], []
    for sigma in sigmas.tolist():
        k = max(0, math.ceil(math.log2(sigma / MAX_CODED_SCALE)))
        step = 1 << k
        half = max(1, math.ceil(HALF_WIDTH * sigma / step))
        for j in range(fractions):
            mean = (j - fractions // 2) / fractions
            lowest = -half * step - step // 2  # smallest v of the first entry
            edges = [lowest + n * step - 0.5 - mean for n in range(2 * half + 2)]
            ends = np.array([0.5 * math.erfc(-edge / (sigma * math.sqrt(2))) for edge in edges])
            pmfs.append(np.diff(ends))
            offsets.append(-half)
            raw_bits.append(k)
    return Tables.from_pmfs(pmfs, offsets, raw_bits)


def _quantise(p: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Positive integers with the sum END, as close to ``p * END`` as the code length asks for.

    Every count is rounded and at least 1; the rest is given or taken, unit by unit, where that changes the
    expected code length most favourably. Ties go to the lower index, so the result is deterministic.
    """
    if len(p) > MAX_SIZE:
        raise ValueError(f"a pmf may have at most {MAX_SIZE - 1} entries")
    count = np.maximum(1, np.rint(p / p.sum() * END)).astype(np.int64)
    unit = 1 if count.sum() < END else -1

    def cost(i: int) -> float:
        if count[i] + unit < 1:
            return math.inf
        return float(p[i]) * math.log(count[i] / (count[i] + unit))

    heap = [(cost(i), i) for i in range(len(p))]
    heapq.heapify(heap)
    for _ in range(abs(END - int(count.sum()))):
        i = heap[0][1]
        count[i] += unit
        heapq.heapreplace(heap, (cost(i), i))
    return count


def _validate(t: Tables) -> None:
    rows = t.size.shape[0] if t.size.ndim == 1 else 0
    if rows == 0 or {t.cdf.shape[:1], t.offset.shape, t.raw_bits.shape} != {(rows,)} or t.cdf.ndim != 2:
        raise ValueError("coder tables: shapes do not match")
    if t.size.min() < 2 or t.size.max() > MAX_SIZE or t.cdf.shape[1] != t.size.max() + 2:
        raise ValueError("coder tables: sizes do not match the width")
    if t.raw_bits.max() > 16 or np.abs(t.offset.astype(np.int64)).max() > 1 << 20:
        raise ValueError("coder tables: offset or raw bits out of range")
    inside = np.arange(t.cdf.shape[1]) < t.size[:, None]
    if np.any(t.cdf[:, 0] != 0) or np.any(t.cdf[~inside] != END) or np.any(t.cdf[inside] == END):
        raise ValueError("coder tables: a row must begin with 0 and end with 65535")
    if np.any(np.diff(t.cdf.astype(np.int32), axis=1)[inside[:, :-1]] <= 0):
        raise ValueError("coder tables: a row must increase strictly")
