"""Unsigned integers as runs of bits, most significant bit first."""

from __future__ import annotations

from lic.errors import CorruptError


class BitWriter:
    """Appends integers to :attr:`data`."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._pending = 0  # value of the bits that do not fill a byte yet
        self._count = 0  # how many they are, 0..7

    def write(self, value: int, bits: int) -> None:
        """Append ``value``, which must be in ``0..2**bits - 1``."""
        self._pending = self._pending << bits | value
        whole, self._count = divmod(self._count + bits, 8)
        self.data += (self._pending >> self._count).to_bytes(whole, "big")
        self._pending &= (1 << self._count) - 1

    def align(self) -> None:
        """Fill the last byte with zero bits."""
        self.write(0, -self._count % 8)


class BitReader:
    """Reads integers from ``data``."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0  # in bits

    @property
    def offset(self) -> int:
        """Index of the first byte of which nothing has been read."""
        return (self._position + 7) // 8

    def require(self, bits: int) -> None:
        """Raise CorruptError unless ``bits`` more bits are there."""
        if self._position + bits > 8 * len(self._data):
            raise CorruptError(f"truncated: the file ends inside its header, after {len(self._data)} bytes")

    def read(self, bits: int) -> int:
        """The next ``bits`` bits. CorruptError at the end of the data."""
        self.require(bits)
        end = self._position + bits
        window = int.from_bytes(self._data[self._position // 8 : (end + 7) // 8], "big")
        self._position = end
        return window >> (-end % 8) & ((1 << bits) - 1)

    def read_bytes(self, count: int) -> bytes:
        """The next ``count`` bytes, at a whole byte only. CorruptError at the end of the data."""
        self.require(8 * count)
        start = self.offset
        self._position += 8 * count
        return self._data[start : start + count]

    def align(self) -> None:
        """Skip to the next whole byte. CorruptError if the skipped bits are not zero."""
        if self.read(-self._position % 8):
            raise CorruptError("damaged: the padding of the header is not zero")
