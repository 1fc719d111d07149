"""Streams: range-coded symbols from the front, bypass bits from the back (bitstream_spec.md 4)."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from lic.coder import bypass, range_coder, torchac_backend
from lic.coder.tables import COST_UNIT, END, IntArray, Tables
from lic.errors import CorruptError, LicError, UsageError

VALUE_LIMIT = 1 << 20  # largest magnitude of a value
_FLAG_ROW = [0, (END + 1) * 7 // 8, END]  # first symbol of a stream: 1 if some skipped symbol deviates
_FLAG_COST = [round((16 - math.log2(_FLAG_ROW[i + 1] - _FLAG_ROW[i])) * COST_UNIT) for i in (0, 1)]
_ESCAPE_ORDER, _GAP_ORDER = 1, 13  # orders of the Exp-Golomb codes
_MAX_UNUSED_BITS = 16  # between the two parts of a stream, and 1 in 2**15 more
_POSITION_LIMIT = 1 << 40  # of a deviation: no stream has so many values
_MAX_DECODE_BYTES = 1 << 29  # torchac wants one whole row per symbol
Ints = npt.NDArray[Any]


def encode(values: Ints, rows: Ints, tables: Tables, *, backend: str = "auto") -> bytes:
    """One whole stream.

    Args:
        values: (N,) integers, magnitude at most 2**20.
        rows: (N,) row of ``tables`` for each value.
        backend: "torchac", "python" (slower, same bytes) or "auto": what the environment variable LIC_CODER
            says, else torchac if it works here.

    Returns:
        the stream; empty if there is nothing to say.

    Raises:
        ValueError: shapes differ, a value or row is out of range.
        LicError: torchac was asked for and does not work.
    """
    encoder = Encoder()
    encoder.push(values, rows, tables)
    return encoder.finish(backend=backend)


def decode(data: bytes, rows: Ints, tables: Tables, *, backend: str = "auto") -> IntArray:
    """Inverse of :func:`encode`: (N,) int32 values from a whole stream and its (N,) rows.

    Not every damage can be seen here: damaged data gives CorruptError or wrong values.

    Raises:
        CorruptError: the data is no stream for these rows.
        ValueError, LicError: as in :func:`encode`.
    """
    decoder = Decoder(data)
    if _use_torchac(backend):
        values = decoder._pull_all_by_torchac(rows, tables)
    else:
        values = decoder.pull(rows, tables)
        decoder.finish()
    return values


def ideal_bits(values: Ints, rows: Ints, tables: Tables) -> float:
    """Bits that :func:`encode` needs for these values, but for the coder's end and the rounding to bytes."""
    encoder = Encoder()
    encoder.push(values, rows, tables)
    _, lengths = encoder._bypass_codes()
    return encoder._coded_cost / COST_UNIT + float(lengths.sum())


class Encoder:
    """Collects the values of one stream, in as many steps and with as many tables as wanted."""

    def __init__(self) -> None:
        self._bounds: list[npt.NDArray[np.uint16]] = []  # (n, 2) lower and upper ends
        self._codes: list[tuple[bypass.CodeArray, bypass.CodeArray]] = []  # bypass codes and lengths
        self._deviating: list[tuple[Ints, Ints]] = []  # positions among the skipped symbols, differences
        self._skipped = 0
        self._symbol_cost = 0

    @property
    def is_empty(self) -> bool:
        """Whether the stream has no bytes: nothing pushed, or only symbols that equal their skipped mode."""
        return not self._bounds and not self._deviating

    def push(self, values: Ints, rows: Ints, tables: Tables) -> None:
        """Appends (N,) values with their (N,) rows. Raises ValueError as :func:`encode` does."""
        rows = _checked_rows(rows, tables)
        values = np.asarray(values)
        if values.shape != rows.shape or not (np.issubdtype(values.dtype, np.integer) or values.size == 0):
            raise ValueError("values must be integers, as many as rows")
        values = values.astype(np.int64)
        if np.abs(values).max(initial=0) > VALUE_LIMIT:
            raise ValueError(f"values must be within ±{VALUE_LIMIT}")

        skipped = tables.skipped[rows]
        if skipped.any():
            at, value = rows[skipped], values[skipped]
            difference = value - tables.offset[at] - tables.mode[at]
            where = np.flatnonzero(difference)
            if where.size:
                self._deviating.append((where + self._skipped, difference[where]))
            self._skipped += len(at)
            rows, values = rows[~skipped], values[~skipped]
        if not len(rows):
            return

        k = tables.raw_bits[rows].astype(np.int64)
        shifted = values + ((1 << k) >> 1)
        symbol = (shifted >> k) - tables.offset[rows]
        last = tables.size[rows] - 1
        escape = (symbol < 0) | (symbol >= last)
        beyond = np.where(symbol < 0, -1 - symbol, symbol - last)[escape]
        code, length = np.zeros((2, len(rows), 2), dtype=np.int64)
        signed = 2 * beyond + (symbol[escape] < 0)
        code[escape, 0], length[escape, 0] = bypass.exp_golomb(signed, _ESCAPE_ORDER)
        code[:, 1], length[:, 1] = shifted & ((1 << k) - 1), k
        used = length > 0
        self._codes.append((code[used], length[used]))

        symbol[escape] = last[escape]
        self._bounds.append(np.stack([tables.cdf[rows, symbol], tables.cdf[rows, symbol + 1]], axis=1))
        self._symbol_cost += int(tables.cost[rows, symbol].sum())

    def finish(self, *, backend: str = "auto") -> bytes:
        """The whole stream. Raises LicError as :func:`encode` does."""
        if self.is_empty:
            return b""
        flag = _FLAG_ROW[1:] if self._deviating else _FLAG_ROW[:2]
        bounds = np.concatenate([np.array([flag], dtype=np.uint16), *self._bounds])
        if _use_torchac(backend):
            coded = torchac_backend.encode(bounds)
        else:
            coded = range_coder.encode(bounds.tolist())
        # torchac does not say how many bits it has used. They are at most the code length, 2 more, and the
        # drift from rounding the interval: below 1.45 / 2**14 bits for a symbol of 16 bits, less for others.
        coded_bits = (self._coded_cost + (self._coded_cost >> 17)) // COST_UNIT + 2
        return bypass.append(coded, coded_bits, *self._bypass_codes())

    @property
    def _coded_cost(self) -> int:
        return 0 if self.is_empty else self._symbol_cost + _FLAG_COST[bool(self._deviating)]

    def _bypass_codes(self) -> tuple[bypass.CodeArray, bypass.CodeArray]:
        codes = self._codes
        if self._deviating:
            position, difference = (np.concatenate(part) for part in zip(*self._deviating, strict=True))
            gap = bypass.exp_golomb(np.diff(position, prepend=-1) - 1, _GAP_ORDER)
            amount = bypass.exp_golomb(2 * (np.abs(difference) - 1) + (difference < 0), _ESCAPE_ORDER)
            pairs = [np.stack(both, axis=1).ravel() for both in zip(gap, amount, strict=True)]
            codes = [bypass.exp_golomb(np.array([len(position) - 1]), 0), (pairs[0], pairs[1]), *codes]
        if not codes:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        code, length = (np.concatenate(part) for part in zip(*codes, strict=True))
        return code, length


class Decoder:
    """Reads one stream in steps; the rows of a step may depend on the values of the steps before.

    Runs in Python throughout: torchac must know all rows at once. Every method raises CorruptError on damage.
    """

    def __init__(self, data: bytes) -> None:
        data = bytes(data)
        self._size = len(data)
        self._data = data
        self._range = range_coder.RangeDecoder(data)
        self._bypass = bypass.BypassReader(data)
        self._deviating = np.zeros((2, 0), dtype=np.int64)  # increasing positions among the skipped; differences
        self._applied = 0  # how many of them the values so far have used
        self._skipped = 0
        self._flag = self._range.read([0], [_FLAG_ROW])[0] if data else 0
        if self._flag:
            self._deviating = self._read_deviations()

    def pull(self, rows: Ints, tables: Tables) -> IntArray:
        """The next (N,) int32 values, given their (N,) rows. Raises ValueError for rows that do not exist."""
        rows = _checked_rows(rows, tables)
        coded = self._coded_rows(rows, tables)
        symbols = self._range.read(coded.tolist(), tables.lists) if len(coded) else []
        return self._assemble(np.array(symbols, dtype=np.int64), coded, rows, tables)

    def finish(self) -> None:
        """Raises CorruptError unless the values pulled so far are exactly the whole stream."""
        self._check_length(self._range.bits_used if self._data else 0)

    def _pull_all_by_torchac(self, rows: Ints, tables: Tables) -> IntArray:
        """All values. torchac does not tell how many bits it has used; the code length does, to 2 bits."""
        rows = _checked_rows(rows, tables)
        coded = self._coded_rows(rows, tables)
        width = int(tables.size[coded].max(initial=2)) + 2
        if 2 * width * len(coded) > _MAX_DECODE_BYTES or not len(coded):
            values = self.pull(rows, tables)
            self.finish()
            return values
        table = np.full((len(tables) + 1, width), END, dtype=np.uint16)
        table[1:] = tables.cdf[:, :width]
        table[0, :2] = _FLAG_ROW[:2]
        symbols = torchac_backend.decode(self._data, table, np.concatenate([[0], coded + 1]))[1:]
        if np.any(symbols >= tables.size[coded]):
            raise CorruptError("damaged data: a symbol outside the coder's alphabet")
        values = self._assemble(symbols, coded, rows, tables)
        cost = int(tables.cost[coded, symbols].sum()) + _FLAG_COST[self._flag]
        self._check_length((cost - (cost >> 17)) // COST_UNIT)
        return values

    def _coded_rows(self, rows: Ints, tables: Tables) -> Ints:
        """The rows that are not skipped: none in an empty stream."""
        coded = rows[~tables.skipped[rows]]
        if len(coded) and not self._data:
            raise CorruptError("damaged data: a coded stream is empty")
        return coded

    def _read_deviations(self) -> npt.NDArray[np.int64]:
        """(2, n): positions among the skipped symbols, which increase, and differences from the mode."""
        positions, differences = [], []
        position = -1
        for _ in range(self._bypass.exp_golomb(0) + 1):
            position += self._bypass.exp_golomb(_GAP_ORDER) + 1
            if position >= _POSITION_LIMIT:
                raise CorruptError("damaged data: a deviation behind the end of its stream")
            amount = self._bypass.exp_golomb(_ESCAPE_ORDER)
            positions.append(position)
            differences.append(-(amount >> 1) - 1 if amount & 1 else (amount >> 1) + 1)
        return np.array([positions, differences], dtype=np.int64)

    def _assemble(self, symbols: Ints, coded: Ints, rows: Ints, tables: Tables) -> IntArray:
        """Values of all rows from the symbols of the coded ones; reads their bypass bits."""
        k = tables.raw_bits[coded].astype(np.int64)
        last = tables.size[coded] - 1
        before = np.cumsum(k) - k  # raw bits ahead of each symbol
        escape_bits = np.zeros(len(coded), dtype=np.int64)
        symbols = symbols.copy()
        start, passed = self._bypass.skip(0), 0
        for i in np.flatnonzero(symbols == last).tolist():
            begin = self._bypass.skip(int(before[i]) - passed) + int(before[i]) - passed
            passed = int(before[i])
            beyond = self._bypass.exp_golomb(_ESCAPE_ORDER)
            symbols[i] = -1 - (beyond >> 1) if beyond & 1 else last[i] + (beyond >> 1)
            escape_bits[i] = self._bypass.skip(0) - begin
        self._bypass.skip(int(k.sum()) - passed)
        low = self._bypass.fields(start + before + np.cumsum(escape_bits), k)

        skipped = tables.skipped[rows]
        values = np.empty(len(rows), dtype=np.int64)
        values[~skipped] = ((symbols + tables.offset[coded]) << k) + low - ((1 << k) >> 1)
        certain = (tables.mode + tables.offset)[rows[skipped]].astype(np.int64)
        positions, differences = self._deviating
        end = int(np.searchsorted(positions, self._skipped + len(certain)))
        certain[positions[self._applied : end] - self._skipped] += differences[self._applied : end]
        self._applied = end
        values[skipped] = certain
        self._skipped += len(certain)
        if np.abs(values).max(initial=0) > VALUE_LIMIT:
            raise CorruptError("damaged data: a value out of range")
        return values.astype(np.int32)

    def _check_length(self, coded_bits: int) -> None:
        """Whether the stream is used up, given a lower bound on the bits of its coded symbols."""
        unused = 8 * self._size - coded_bits - self._bypass.bits_used
        if not 0 <= unused < _MAX_UNUSED_BITS + (coded_bits >> 15) or self._applied < len(self._deviating[0]):
            raise CorruptError("damaged data: a coded stream has the wrong length")


def backend_info() -> str:
    """What "auto" codes with and, if that is not torchac, why: one line. May compile torchac."""
    if _wanted("auto") == "python":
        return "python (LIC_CODER=python)"
    reason = torchac_backend.problem()
    return f"python ({reason})" if reason else "torchac (compiled)"


def _wanted(backend: str) -> str:
    wanted = os.environ.get("LIC_CODER") or "auto" if backend == "auto" else backend
    if wanted not in ("auto", "torchac", "python"):
        raise UsageError(f'the coder (LIC_CODER) must be "auto", "torchac" or "python", not "{wanted}"')
    return wanted


def _use_torchac(backend: str) -> bool:
    wanted = _wanted(backend)
    if wanted == "python":
        return False
    reason = torchac_backend.problem()
    if reason and wanted == "torchac":
        raise LicError(f"torchac does not work here: {reason}")
    return reason is None


def _checked_rows(rows: Ints, tables: Tables) -> npt.NDArray[np.intp]:
    rows = np.asarray(rows)
    if rows.ndim != 1 or not (np.issubdtype(rows.dtype, np.integer) or rows.size == 0):
        raise ValueError("rows must be a list of integers")
    rows = rows.astype(np.intp)
    if rows.size and (rows.min() < 0 or rows.max() >= len(tables)):
        raise ValueError(f"rows must be within 0..{len(tables) - 1}")
    return rows
