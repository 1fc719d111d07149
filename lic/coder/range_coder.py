"""The arithmetic coder in plain integers: the same bytes as torchac, no compiler needed, and it can pause.

State: an interval ``[low, high]`` of 32-bit numbers. A symbol with ``[c, d) / 65536`` narrows it to

    span = high - low + 1
    high = low + (span · d >> 16) - 1
    low  = low + (span · c >> 16)

Then leading bits that both ends share are shifted out, and after them every second bit while low begins with
01 and high with 10 (the bit is pending: the opposite of the next one written). All shifts of one symbol are
done at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from lic.errors import CorruptError

_TOP, _QUARTER, _MASK, _REST = 1 << 31, 1 << 30, (1 << 32) - 1, (1 << 31) - 1
_REFILL = 8  # bytes
_TOO_SHORT = "damaged data: a coded stream ends too early"


def encode(bounds: Iterable[tuple[int, int]]) -> bytes:
    """Code a sequence of symbols given as (lower end, upper end), 0 <= lower < upper <= 65536; N >= 0."""
    low, high, pending = 0, _MASK, 0
    out = bytearray()
    word, filled = 1, 0  # bits not yet in `out`, below a leading 1
    for lower, upper in bounds:
        span = high - low + 1
        high = low + (span * upper >> 16) - 1
        low += span * lower >> 16
        shift = 32 - (low ^ high).bit_length()
        if shift:
            bits = low >> (32 - shift)
            if pending:  # first bit, then its opposite `pending` times, then the others
                first, others = bits >> (shift - 1), bits & ((1 << (shift - 1)) - 1)
                bits = ((first << pending) + (0 if first else (1 << pending) - 1)) << (shift - 1) | others
                filled += pending
                word <<= pending
                pending = 0
            word = word << shift | bits
            filled += shift
            low = low << shift & _MASK
            high = high << shift & _MASK | ((1 << shift) - 1)
            if filled >= 64:
                keep = filled & 7
                out += (word >> keep & (1 << (filled - keep)) - 1).to_bytes((filled - keep) >> 3, "big")
                word = 1 << keep | word & ((1 << keep) - 1)
                filled = keep
        if low >= _QUARTER and high < _TOP + _QUARTER:
            shift = 31 - (~(low & ~high) & _REST).bit_length()
            low = low << shift & _REST
            high = high << shift & _REST | _TOP | ((1 << shift) - 1)
            pending += shift
    # 01.. or 10.. lies inside [low, high] whatever follows, so the reader may see any bytes behind ours.
    pending += 1
    tail = (1 << pending) - 1 if low < _QUARTER else 1 << pending
    word = word << (pending + 1) | tail
    filled += pending + 1
    padding = -filled % 8
    word = (word << padding) & ((1 << (filled + padding)) - 1)
    return bytes(out + word.to_bytes((filled + padding) >> 3, "big"))


class RangeDecoder:
    """Reads symbols from the front of ``data``; whatever follows the coded symbols is ignored."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._next = _REFILL  # byte offset of what is not in `_word` yet
        word = int.from_bytes(data[:_REFILL].ljust(_REFILL, b"\0"), "big")
        self._filled = _REFILL * 8 - 32
        self._word = word & ((1 << self._filled) - 1)
        self._low, self._high = 0, _MASK
        self._distance = word >> self._filled  # of the code value from low
        self._used = 2

    @property
    def data(self) -> bytes:
        return self._data

    @property
    def state(self) -> tuple[int, int, int, int, int]:
        """Low and high end, distance of the code value from low, offset of the next bit in the data, bits used."""
        return self._low, self._high, self._distance, 8 * self._next - self._filled, self._used

    @state.setter
    def state(self, state: tuple[int, int, int, int, int]) -> None:
        self._low, self._high, self._distance, position, self._used = state
        self._next, self._filled = -(-position // 8), -position % 8
        begun = self._data[position // 8 : self._next].ljust(1, b"\0")[0]
        self._word = begun & ((1 << self._filled) - 1)

    @property
    def bits_used(self) -> int:
        """Bits that the encoder would have written, its last two included, had it stopped here."""
        return self._used

    def read(self, rows: Iterable[int], cdfs: Sequence[Sequence[int]], symbols: list[int] | None = None) -> list[int]:
        """The next symbols, one per row; ``cdfs[row]`` holds lower ends and, last, the upper end.

        They are appended to ``symbols``, which ``rows`` may look at to say the next row.

        Raises:
            CorruptError: the code value lies outside the row, or the data has ended.
        """
        low, high, distance = self._low, self._high, self._distance
        data, position, word, filled, used = self._data, self._next, self._word, self._filled, self._used
        symbols = [] if symbols is None else symbols
        try:
            for row in rows:
                cdf = cdfs[row]
                span = high - low + 1
                symbol = bisect_right(cdf, ((distance + 1 << 16) - 1) // span) - 1
                symbols.append(symbol)
                high = low + (span * cdf[symbol + 1] >> 16) - 1
                step = span * cdf[symbol] >> 16
                low += step
                distance -= step
                shift = 32 - (low ^ high).bit_length()
                if shift:
                    low = low << shift & _MASK
                    high = high << shift & _MASK | ((1 << shift) - 1)
                if low >= _QUARTER and high < _TOP + _QUARTER:
                    extra = 31 - (~(low & ~high) & _REST).bit_length()
                    low = low << extra & _REST
                    high = high << extra & _REST | _TOP | ((1 << extra) - 1)
                    shift += extra
                if shift:
                    if filled < shift:
                        if position > len(data) + _REFILL:  # long past the end, however many rows are left
                            raise CorruptError(_TOO_SHORT)
                        more = data[position : position + _REFILL].ljust(_REFILL, b"\0")
                        word = word << _REFILL * 8 | int.from_bytes(more, "big")
                        filled += _REFILL * 8
                        position += _REFILL
                    filled -= shift
                    distance = distance << shift | word >> filled
                    word &= (1 << filled) - 1
                    used += shift
        except IndexError:
            raise CorruptError("damaged data: a symbol outside the coder's alphabet") from None
        self._low, self._high, self._distance = low, high, distance
        self._next, self._word, self._filled, self._used = position, word, filled, used
        if used > 8 * len(data):
            raise CorruptError(_TOO_SHORT)
        return symbols
