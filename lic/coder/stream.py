"""Streams: range-coded symbols from the front, bypass bits from the back (bitstream_spec.md 4)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lic.coder import bypass, native, range_coder, torchac_backend
from lic.coder.native import Loops
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
    decoder = Decoder(data, whole=True, backend=backend)
    values = decoder.pull(rows, tables)
    decoder.finish()
    return values


def ideal_bits(values: Ints, rows: Ints, tables: Tables) -> float:
    """Bits that :func:`encode` needs for these values, but for the coder's end and the rounding to bytes."""
    encoder = Encoder()
    encoder.push(values, rows, tables)
    _, lengths = encoder._bypass_codes()
    return encoder._coded_cost / COST_UNIT + float(lengths.sum())


def code_lengths(values: Ints, rows: Ints, tables: Tables) -> npt.NDArray[np.float32]:
    """Bits of each of (N,) values with their (N,) rows: the symbol, an escape number, raw bits.

    Of a skipped row those of its symbol: a deviation costs about as much.
    """
    symbol, beyond, escape, _ = _symbols(values, rows, tables)
    bits = (tables.cost[rows, symbol] / COST_UNIT).astype(np.float32) + tables.raw_bits[rows]
    bits[escape] += bypass.exp_golomb(beyond, _ESCAPE_ORDER)[1]
    return bits


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
        symbol, beyond, escape, shifted = _symbols(values, rows, tables)
        code, length = np.zeros((2, len(rows), 2), dtype=np.int64)
        code[escape, 0], length[escape, 0] = bypass.exp_golomb(beyond, _ESCAPE_ORDER)
        code[:, 1], length[:, 1] = shifted & ((1 << k) - 1), k
        used = length > 0
        self._codes.append((code[used], length[used]))

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

    By compiled loops or in Python; torchac must know all rows at once, so it only reads a ``whole`` stream, pulled in
    one step. Every method raises CorruptError on damage.
    """

    def __init__(self, data: bytes, *, whole: bool = False, backend: str = "auto") -> None:
        data = bytes(data)
        self._data = data
        self._range = range_coder.RangeDecoder(data)
        self._bypass = bypass.BypassReader(data)
        self._deviating = np.zeros((2, 0), dtype=np.int64)  # increasing positions among the skipped; differences
        self._applied = 0  # how many of them the values so far have used
        self._skipped = 0
        self._flag = self._range.read([0], [_FLAG_ROW])[0] if data else 0
        if self._flag:
            self._deviating = self._read_deviations()
        self._torchac = whole and _use_torchac(backend)
        self._in_python = _wanted(backend) == "python"
        self._cost: int | None = None  # of the symbols that torchac has read, but for the flag

    def pull(self, rows: Ints, tables: Tables) -> IntArray:
        """The next (N,) int32 values, given their (N,) rows. Raises ValueError for rows that do not exist."""
        if self._cost is not None:
            raise ValueError("a whole stream is pulled in one step")
        rows = _checked_rows(rows, tables)
        coded = self._coded_rows(rows, tables)
        return self._assemble(self._read(coded, tables), coded, rows, tables)

    def _read(self, coded: Ints, tables: Tables) -> Ints:
        """The symbols of rows that are not skipped."""
        width = int(tables.size[coded].max(initial=2)) + 2
        if not len(coded):
            return np.zeros(0, np.int64)
        if self._torchac and (len(coded) + 1) * width * tables.cdf.itemsize <= _MAX_DECODE_BYTES:
            cdfs = np.full((len(coded) + 1, width), END, np.uint16)
            cdfs[0, :2] = _FLAG_ROW[:2]
            cdfs[1:] = np.take(tables.cdf[:, :width], coded, axis=0)
            symbols = torchac_backend.decode(self._data, cdfs)[1:]
            if np.any(symbols >= tables.size[coded]):
                raise CorruptError("damaged data: a symbol outside the coder's alphabet")
            self._cost = int(tables.cost[coded, symbols].sum())
            return symbols
        if (loops := self._loops()) is None:
            return np.array(self._range.read(coded.tolist(), tables.lists), np.int64)
        return self._read_by_loops(loops, coded, tables, None)[1]

    def _loops(self) -> Loops | None:
        return None if self._in_python else native.load()[0]

    def pull_chain(self, rows: Ints, tables: Tables, trellis: npt.NDArray[np.int64]) -> IntArray:
        """The next (N,) values, a chain: their rows depend on the values before.

        It begins in state 0. A value in an odd state has the row behind the one of ``rows``, none of them skipped,
        and is followed by the state ``trellis[state, value & 1]``. Never by torchac, whatever reads the rest.
        """
        rows = self._coded_rows(_checked_rows(rows, tables), tables)
        _checked_rows(rows + 1, tables)
        if (loops := self._loops()) is None:
            values = self._read_chain(rows, tables, trellis)
        else:
            values = self._read_by_loops(loops, rows, tables, trellis)[0]
        if np.abs(values).max(initial=0) > VALUE_LIMIT:
            raise CorruptError("damaged data: a value out of range")
        return values.astype(np.int32)

    def _read_chain(self, rows: Ints, tables: Tables, trellis: npt.NDArray[np.int64]) -> Ints:
        offset, escape, after = tables.offset.tolist(), (tables.size - 1).tolist(), trellis.tolist()
        symbols: list[int] = []
        values: list[int] = []

        def chosen() -> Iterator[int]:
            state = 0
            for row in rows.tolist():
                row += state & 1
                yield row
                value = symbols[-1]
                if value == escape[row]:
                    value = self._beyond(value)
                value += offset[row]
                values.append(value)
                state = after[state][value & 1]

        if len(rows):
            self._range.read(chosen(), tables.lists, symbols)
        return np.array(values, np.int64)

    def _read_by_loops(
        self, loops: Loops, rows: Ints, tables: Tables, trellis: npt.NDArray[np.int64] | None
    ) -> tuple[Ints, Ints]:
        """The values of a chain, and its symbols. Without a trellis it is none, and values are left to others."""
        rows = np.ascontiguousarray(rows, np.int64)
        used, symbols, values = np.zeros((3, len(rows)), np.int64)
        known, state = 0, 0
        while known < len(rows):
            known, state = loops.read_chain(self._range, rows, known, tables, trellis, state, (used, symbols, values))
            row, symbol = used[known - 1], int(symbols[known - 1])
            if trellis is not None and symbol == tables.size[row] - 1:
                value = self._beyond(symbol) + int(tables.offset[row])
                values[known - 1], state = value, int(trellis[state, value & 1])
        return values, symbols

    def _beyond(self, last: int) -> int:
        """The symbol that an escape, the ``last`` one of a row, stands for."""
        number = self._bypass.exp_golomb(_ESCAPE_ORDER)
        return -1 - (number >> 1) if number & 1 else last + (number >> 1)

    def finish(self) -> None:
        """Raises CorruptError unless the values pulled so far are exactly the whole stream."""
        if self._cost is not None:
            self._check_length(_least_bits(self._cost + _FLAG_COST[self._flag]))
        else:
            self._check_length(self._range.bits_used if self._data else 0)

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
            symbols[i] = self._beyond(int(last[i]))
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
        unused = 8 * len(self._data) - coded_bits - self._bypass.bits_used
        if not 0 <= unused < _MAX_UNUSED_BITS + (coded_bits >> 15) or self._applied < len(self._deviating[0]):
            raise CorruptError("damaged data: a coded stream has the wrong length")


def _least_bits(cost: int) -> int:
    """A lower bound on the bits of symbols of this code length: torchac does not tell how many it has used."""
    return (cost - (cost >> 17)) // COST_UNIT


def backend_info() -> str:
    """What "auto" codes with and, where nothing is compiled, why: one line. May compile torchac and the loops."""
    if _wanted("auto") == "python":
        return "python (LIC_CODER=python)"
    problem, of_loops = torchac_backend.problem(), native.load()[1]
    symbols = f"python ({problem})" if problem else "torchac (compiled)"
    return f"{symbols}, loops in {f'python ({of_loops})' if of_loops else 'C++ (compiled)'}"


def loops() -> Loops | None:
    """The compiled loops, which may be compiled now; None where that does not work, and with LIC_CODER=python."""
    return None if _wanted("auto") == "python" else native.load()[0]


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


def _symbols(values: Ints, rows: Ints, tables: Tables) -> tuple[Ints, Ints, npt.NDArray[np.bool_], Ints]:
    """Of (N,) values: their symbols, the escape numbers of those outside, which these are, and v + 2**(k-1)."""
    k = tables.raw_bits[rows].astype(np.int64)
    shifted = values + ((1 << k) >> 1)
    symbol = (shifted >> k) - tables.offset[rows]
    last = tables.size[rows] - 1
    below, escape = symbol < 0, (symbol < 0) | (symbol >= last)
    beyond = np.where(below, -1 - symbol, symbol - last)[escape]
    symbol[escape] = last[escape]
    return symbol, 2 * beyond + below[escape], escape, shifted


def _checked_rows(rows: Ints, tables: Tables) -> npt.NDArray[np.intp]:
    rows = np.asarray(rows)
    if rows.ndim != 1 or not (np.issubdtype(rows.dtype, np.integer) or rows.size == 0):
        raise ValueError("rows must be a list of integers")
    rows = rows.astype(np.intp)
    if rows.size and (rows.min() < 0 or rows.max() >= len(tables)):
        raise ValueError(f"rows must be within 0..{len(tables) - 1}")
    return rows
