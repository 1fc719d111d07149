"""Bits without a model: escapes, raw low bits, deviations of skipped symbols.

They stand at the end of a stream and are read backwards, the lowest bit of the last byte first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lic.errors import CorruptError

BitArray = npt.NDArray[np.uint8]
CodeArray = npt.NDArray[np.int64]
_LONGEST_PREFIX = 24


def exp_golomb(x: npt.NDArray[Any], order: int) -> tuple[CodeArray, CodeArray]:
    """Codes and lengths in bits of numbers 0 <= x < 2**24.

    With ``q = (x >> order) + 1`` and ``n = floor(log2 q)``: n ones, a zero, the n low bits of q, then the
    ``order`` low bits of x.
    """
    x = x.astype(np.int64)
    q = (x >> order) + 1
    n = np.frexp(q)[1].astype(np.int64) - 1
    prefix = ((1 << n) - 1) << 1
    code = (((prefix << n) | (q - (1 << n))) << order) | (x & ((1 << order) - 1))
    return code, 2 * n + 1 + order


def append(coded: bytes, coded_bits: int, code: CodeArray, length: CodeArray) -> bytes:
    """Puts codes with the given lengths >= 0, each high bit first, behind ``coded``.

    They may take what the first ``coded_bits`` bits leave of its last byte, which must be zero there.
    """
    if not length.any():
        return coded
    ends = np.cumsum(length)
    size = (coded_bits + int(ends[-1]) + 7) >> 3
    bits = np.zeros(8 * size, dtype=np.uint8)
    position = ends - length
    while code.size:
        left = length > 0
        code, length, position = code[left], length[left] - 1, position[left]
        bits[position] = (code >> length) & 1
        position = position + 1
    out = np.packbits(bits[::-1])
    out[: len(coded)] |= np.frombuffer(coded, dtype=np.uint8)
    return out.tobytes()


class BypassReader:
    """Reads from the end of ``data``. Every method raises CorruptError when the data has ended."""

    def __init__(self, data: bytes) -> None:
        self._bits: BitArray = np.unpackbits(np.frombuffer(data, dtype=np.uint8))[::-1]
        self._bytes = self._bits.tobytes()
        self._position = 0

    @property
    def bits_used(self) -> int:
        return self._position

    def exp_golomb(self, order: int) -> int:
        """One number written by :func:`exp_golomb`."""
        n = self._bytes.find(b"\0", self._position) - self._position
        if not 0 <= n <= _LONGEST_PREFIX:
            raise CorruptError("damaged data: an impossible escape code")
        self._position += n + 1
        q = 1 << n | self._number(n)
        return (q - 1) << order | self._number(order)

    def skip(self, count: int) -> int:
        """Moves past ``count`` bits, to be read with :meth:`fields`; returns the position of the first."""
        start = self._position
        self._position += count
        if self._position > len(self._bits):
            raise CorruptError("damaged data: a coded stream ends too early")
        return start

    def fields(self, positions: CodeArray, lengths: CodeArray) -> CodeArray:
        """Numbers of ``lengths`` bits each that begin at ``positions``, all of them already skipped."""
        values = np.zeros(len(positions), dtype=np.int64)
        for bit in range(int(lengths.max(initial=0))):
            inside = lengths > bit
            values[inside] = values[inside] << 1 | self._bits[positions[inside] + bit]
        return values

    def _number(self, length: int) -> int:
        start = self.skip(length)
        value = 0
        for bit in self._bytes[start : start + length]:
            value = value << 1 | bit
        return value
