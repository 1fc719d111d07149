"""Integers to bytes and back: probability tables, range coder, escape codes. Knows nothing of networks.

>>> tables = gaussian_tables()
>>> data = encode(values, rows, tables)
>>> values = decode(data, rows, tables)
"""

from lic.coder.stream import (
    VALUE_LIMIT,
    Decoder,
    Encoder,
    backend_info,
    code_lengths,
    decode,
    encode,
    ideal_bits,
    loops,
)
from lic.coder.tables import SCALES, Tables, gaussian_tables

__all__ = [
    "SCALES",
    "VALUE_LIMIT",
    "Decoder",
    "Encoder",
    "Tables",
    "backend_info",
    "code_lengths",
    "decode",
    "encode",
    "gaussian_tables",
    "ideal_bits",
    "loops",
]
