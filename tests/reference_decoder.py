"""A second decoder of the symbols of a `.lic` file, written from bitstream_spec.md alone; it shares no code with `lic`.

    python tests/reference_decoder.py FILE.lic WEIGHTS.safetensors

prints the SHA-256 of the symbols, as `lic verify --json` does. It covers the container (chapters 1 to 3, the contents
of sections passed over), the range coder (4) and the entropy model with each of its systems (5), but no pixels (6, 7).
All arithmetic is on integers, in arrays of 64 bits. Numbers in parentheses below are sections of the specification.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Symbols = tuple[np.ndarray, np.ndarray]  # z, y
Place = tuple[Ints, Ints, Ints]


class DamagedError(ValueError):
    """No `.lic` file, or a truncated or altered one."""


class UnsupportedError(ValueError):
    """A sound file that needs another reader or other weights."""


class TooLargeError(ValueError):
    """A file over a limit of 3.6."""


@dataclass
class Decoded:
    """tiles: for each tile (z, y), int32 arrays (channel, row, column). sha256: over all of them, in hexadecimal."""

    tiles: list[Symbols]
    sha256: str


def require(condition: bool, what: str) -> None:
    if not condition:
        raise DamagedError(what)


# Container (chapters 1 to 3)


@dataclass
class Container:
    """Of the header what the symbols depend on. tiles: (width, height) of each; streams: for each tile its streams."""

    entropy_id: bytes
    synthesis_id: bytes
    symbols_crc: int
    quality: int
    tiles: list[tuple[int, int]]
    streams: list[list[bytes]]


class Bits:
    """Reads bit fields of a header, which ends where the checksum of the file begins."""

    def __init__(self, data: bytes, byte: int) -> None:
        self.data, self.at, self.end = data, 8 * byte, 8 * (len(data) - 4)

    def u(self, n: int) -> int:
        require(self.at + n <= self.end, "the header is cut off")
        first, last = self.at // 8, (self.at + n + 7) // 8
        self.at += n
        return int.from_bytes(self.data[first:last], "big") >> (8 * last - self.at) & (1 << n) - 1

    def array(self, k: int) -> list[int]:
        n = self.u(5) + 1
        require(k * n <= self.end - self.at, "the header is cut off")
        numbers = [self.u(n) for _ in range(k)]
        require(n == max(1, max(numbers).bit_length()), "an array is wider than it need be")
        return numbers


def padded_area(width: int, height: int) -> int:
    return 4096 * -(-width // 64) * -(-height // 64)


def read_container(data: bytes) -> Container:
    require(data[:3] == b"\x8bLI" and len(data) > 3, "this is no .lic file")
    if data[3] >> 2 not in (1, 2, 3):
        raise UnsupportedError("unknown format version")
    require(len(data) >= 22 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "big"), "wrong checksum")
    symbols_crc, quality, streams, flags = struct.unpack(">IHBB", data[10:18])
    require(quality <= 50000 and streams >= 2 and flags >> 1 & 15 <= 9, "a field of the header is out of range")
    bits = Bits(data, 18)

    has_sections = bits.u(1)
    name = [bits.u(6) for _ in range(bits.u(5))]
    require(len(name) > 0 and max(name) <= 38, "bad model name")
    width, height = (n + 1 for n in bits.array(2))
    side = 64 * (bits.u(16) + 1) if flags & 1 else 64 * -(-max(width, height) // 64)
    require(not flags & 32 or bits.u(8) > 0, "an empty field for reductions")
    columns, rows = -(-width // side), -(-height // side)
    require(streams * columns * rows <= 1 << 18, "too many streams")
    lengths = bits.array(streams * columns * rows)
    require(bits.u(-bits.at % 8) == 0, "the padding is not zero")

    table = []
    if has_sections:
        has_filter, others = bits.u(1), bits.u(7)
        table = [(b"Filt", bits.u(8))] if has_filter else []
        table += [(bits.u(32).to_bytes(4, "big"), bits.u(32)) for _ in range(others)]
    kinds = [kind for kind, _ in table]
    require(not has_sections or bool(kinds), "an empty section table")
    require(all(kind.isalpha() for kind in kinds) and len(set(kinds)) == len(kinds), "bad section table")
    at = bits.at // 8
    require(at + sum(lengths) + sum(n for _, n in table) + 4 == len(data), "the size of the file is wrong")

    unknown = [kind for kind in kinds if kind[:1].isupper() and kind not in (b"Alph", b"Filt")]
    if data[3] & 3 or unknown:
        raise UnsupportedError(f"unknown coder {data[3] & 3} or sections {unknown}")
    if padded_area(min(width, side), min(height, side)) > 1 << 22 or padded_area(width, height) > 1 << 28:
        raise TooLargeError("the picture or its tiles are too large")

    corners = ((x, y) for y in range(0, height, side) for x in range(0, width, side))
    tiles = [(min(side, width - x), min(side, height - y)) for x, y in corners]
    parts: list[list[bytes]] = [[] for _ in tiles]
    for i, n in enumerate(lengths):  # all tiles of a stream before the next stream
        parts[i % len(tiles)].append(data[at : at + n])
        at += n
    return Container(data[4:8], data[8:10], symbols_crc, quality, tiles, parts)


# Range coder and tables (chapter 4)

FLAG = (0, 57344, 65535)


class Tables:
    """A set of tables (4.1)."""

    def __init__(self, cdf: np.ndarray, size: np.ndarray, offset: np.ndarray, raw_bits: np.ndarray) -> None:
        self.cdf = [tuple(row[: n + 1].tolist()) for row, n in zip(cdf, size, strict=True)]
        self.offset: list[int] = offset.tolist()
        self.raw_bits: list[int] = raw_bits.tolist()
        # The symbol that a skipped row stands for, None for a row that is not skipped.
        self.mode: list[int | None] = []
        for row, k in zip(self.cdf, self.raw_bits, strict=True):
            if row[0] != 0 or row[-1] != 65535 or any(a >= b for a, b in pairwise(row)):
                raise ValueError("bad tables in the weights")
            wide = [s for s in range(len(row) - 2) if row[s + 1] - row[s] >= 65528]
            self.mode.append(wide[0] if wide and k == 0 else None)


class RangeDecoder:
    """The coded bits of a stream (4.3)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.shifts = data, 0
        self.low, self.high, self.code = 0, (1 << 32) - 1, int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def symbol(self, cdf: Sequence[int]) -> int:
        span = self.high - self.low + 1
        count = ((self.code - self.low + 1) * 65536 - 1) // span
        require(count < 65535, "a stream is damaged")
        s = bisect_right(cdf, count) - 1
        self.high = self.low + (span * cdf[s + 1] >> 16) - 1
        self.low += span * cdf[s] >> 16
        while True:
            if self.high < 1 << 31:
                base = 0
            elif self.low >= 1 << 31:
                base = 1 << 31
            elif self.low >= 1 << 30 and self.high < 3 << 30:
                base = 1 << 30
            else:
                return s
            at = self.shifts + 32
            bit = self.data[at // 8] >> (7 - at % 8) & 1 if at < 8 * len(self.data) else 0
            self.low, self.high = 2 * (self.low - base), 2 * (self.high - base) + 1
            self.code = 2 * (self.code - base) + bit
            self.shifts += 1
            require(self.shifts + 2 <= 8 * len(self.data), "a stream is too short")


class Bypass:
    """The bypass bits of a stream, from its last byte back (4.2), and the numbers in them (4.4)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.read = data, 0

    def u(self, n: int) -> int:
        require(self.read + n <= 8 * len(self.data), "a stream is too short")
        number = 0
        for _ in range(n):
            number = 2 * number + (self.data[-1 - self.read // 8] >> self.read % 8 & 1)
            self.read += 1
        return number

    def number(self, order: int) -> int:
        t = 0
        while self.u(1):
            t += 1
            require(t <= 24, "a number is too large")
        q = 1 << t | self.u(t)
        return q - 1 << order | self.u(order)


class Stream:
    """Reads the values of a stream (4.2, 4.5) run by run, as their rows become known."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.skipped = self.coded = 0  # values read so far
        self.deviations: dict[int, int] = {}  # by how many skipped values are before it
        if not data:
            return
        self.decoder, self.bypass = RangeDecoder(data), Bypass(data)
        self.flag = self.decoder.symbol(FLAG)
        if self.flag:
            at = -1
            for _ in range(self.bypass.number(0) + 1):
                at += self.bypass.number(13) + 1
                x = self.bypass.number(1)
                self.deviations[at] = -(x // 2 + 1) if x % 2 else x // 2 + 1

    def read(self, tables: Tables, rows: list[int]) -> list[int]:
        """The next values, one for each of ``rows``."""
        values = [self.value(tables, row) for row in rows]
        require(all(abs(value) <= 1 << 20 for value in values), "a value is out of range")
        return values

    def value(self, tables: Tables, row: int) -> int:
        mode, offset, k = tables.mode[row], tables.offset[row], tables.raw_bits[row]
        if mode is not None:
            self.skipped += 1
            return offset + mode + self.deviations.get(self.skipped - 1, 0)
        require(bool(self.data), "a stream is missing")
        self.coded += 1
        cdf = tables.cdf[row]
        s, escape = self.decoder.symbol(cdf), len(cdf) - 2
        value = offset + s
        if s == escape:
            x = self.bypass.number(1)
            value = offset - 1 - x // 2 if x % 2 else offset + escape + x // 2
        return (value << k) + self.bypass.u(k) - (1 << k - 1) if k else value

    def end(self) -> None:
        """To be called after the last value."""
        if not self.data:
            return
        require(bool(self.flag or self.coded), "a stream should be empty")
        require(max(self.deviations, default=-1) < self.skipped, "a deviation behind the end")
        a = self.decoder.shifts + 2
        unused = 8 * len(self.data) - a - self.bypass.read
        require(0 <= unused < 16 + (a >> 15), "a stream is too short, or has unused bits")
        between = int.from_bytes(self.data, "big") >> self.bypass.read & (1 << unused) - 1
        require(between == 0, "unused bits of a stream are not zero")


def decode_stream(data: bytes, tables: Tables, rows: list[int]) -> list[int]:
    """The values of a stream whose rows are all known, one for each of ``rows``."""
    stream = Stream(data)
    values = stream.read(tables, rows)
    stream.end()
    return values


# Integer arithmetic and tables (5.1)


class Activation(NamedTuple):
    """Integers a (row, column, channel), which stand for a · 2^-bits; none is beyond the limit."""

    a: Ints
    bits: int
    limit: int


def scale(x: Ints, n: Ints | int) -> Ints:
    """round(x · 2^n), of two equally near integers the even one. |x| < 2^60.

    Shifts to the left stop at 27 places: what is not 0 is then beyond every limit that is applied to the result.
    """
    left, right = np.clip(n, 0, 27).astype(np.int64), np.clip(np.negative(n), 0, 61).astype(np.int64)
    floor = x >> right
    rest, half = x - (floor << right), np.int64(1) << right >> 1
    up = (right > 0) & ((rest > half) | ((rest == half) & (floor & 1 == 1)))
    result: Ints = (floor + up) << left
    return result


def divide(numerator: Ints, denominator: Ints | int) -> Ints:
    """The nearest integer, of two equally near ones the larger."""
    return (2 * numerator + denominator) // (2 * denominator)


def clamp(x: Ints, limit: int) -> Ints:
    return np.clip(x, -limit, limit)


def depth_to_space(x: Activation, r: int) -> Activation:
    rows, columns, channels = x.a.shape
    a = x.a.reshape(rows, columns, r, r, channels // r**2).transpose(0, 2, 1, 3, 4)
    return x._replace(a=a.reshape(rows * r, columns * r, channels // r**2))


@cache
def function_table(name: str) -> Ints:
    """EXP, LOG or EXP2."""
    with localcontext(Context(prec=25)):
        if name == "EXP":
            exact, total = [512 * (Decimal(-i) / 32).exp() for i in range(256)], 16629
        elif name == "LOG":
            exact, total = [128 * (1 + Decimal(i) / 128).ln() for i in range(16385)], 8174545
        else:
            exact, total = [2 ** (14 + Decimal(i) / 4096) for i in range(4096)], 96809401
    table = np.array([round(number) for number in exact], np.int64)
    assert table.sum() == total
    return table


def power(exponent: Ints) -> tuple[Ints, Ints]:
    """(a, n) with a · 2^n = power(exponent) of 5.5."""
    return function_table("EXP2")[exponent % 4096], exponent // 4096 - 14


def interpolate(table: Ints, code: int) -> Ints:
    """The row of a table over quality, (K, ...), for a quality code."""
    knots = len(table)
    d = 50000 // (knots - 1)
    k = min(code // d, knots - 2)
    t = code - k * d
    return divide(table[k] * (d - t) + table[k + 1] * t, d)


def attend(q: Activation, k: Activation, v: Activation, bias: Ints) -> Activation:
    """q (..., queries, D), k and v (..., keys, D), bias (..., queries, keys), rounded to 1/32 -> (..., queries, D)."""
    s = (q.a.shape[-1].bit_length() - 1) // 2
    logit = scale(q.a @ np.swapaxes(k.a, -1, -2), 5 - s - q.bits - k.bits) + bias
    weight = function_table("EXP")[np.minimum(255, logit.max(-1, keepdims=True) - logit)]
    return v._replace(a=divide(weight @ v.a, weight.sum(-1, keepdims=True)))


# Weights (5.2)

ENTROPY = ("h_s", "context", "units", "tables", "trellis", "chain", "neighbours")
SYNTHESIS = ("shortcut", "g_s", "log_gain", "log_igain", "centroids", "offsets", "refinement")


class Weights:
    """The arrays of a weights file, and the operations of 5.1 that name one."""

    def __init__(self, path: Path) -> None:
        self.types: dict[str, str] = {}
        self.arrays: dict[str, np.ndarray] = {}
        information = self._read(path)
        if information.get("shared_from") is not None:
            self._read(path.with_name(information["shared_from"]), information["shared"])
        self.config: dict[str, Any] = information["config"]
        self.grids: dict[str, int] = information["grids"]
        settings = {**self.config, "grids": self.grids, "revision": 2}
        for name in ("name", "refinement"):
            settings.pop(name, None)
        settled = json.dumps(settings, sort_keys=True).encode()
        self.entropy_id = self._digest(settled, ENTROPY)[:4]
        self.synthesis_id = self._digest(b"", SYNTHESIS)[:2]
        self.y, self.z = (
            Tables(*(self.arrays[f"tables.{part}.{name}"] for name in ("cdf", "size", "offset", "raw_bits")))
            for part in "yz"
        )

    def _read(self, path: Path, shared: Sequence[str] | None = None) -> Any:
        """Take over the arrays of a file: all, or those that are shared and not there yet. Returns its metadata."""
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        information = json.loads(header.pop("__metadata__")["lic"])
        deflated = information.get("deflated", {})
        types = {"I8": "|i1", "U8": "|u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "F32": "<f4"}
        for name, entry in header.items():
            begins = shared is not None and any(part.endswith(".") and name.startswith(part) for part in shared)
            if name in self.arrays or not (shared is None or name in shared or begins):
                continue
            start, stop = (end + offset for offset in entry["data_offsets"])
            content, kind, shape = data[start:stop], types[entry["dtype"]], entry["shape"]
            if name in deflated:
                content, (kind, shape) = zlib.decompress(content), deflated[name]
            self.types[name] = kind
            # Floats as their bits: see rounded().
            self.arrays[name] = np.frombuffer(content, kind.replace("f", "u")).reshape(shape)
        return information

    def _digest(self, start: bytes, modules: Sequence[str]) -> bytes:
        digest = hashlib.sha256(start)
        for name in sorted(self.arrays):
            if name.split(".")[0] in modules:
                array = self.arrays[name]
                digest.update(f"{name} {self.types[name]} {array.shape}".encode() + array.tobytes())
        return digest.digest()

    def ints(self, name: str) -> Ints:
        return self.arrays[name].astype(np.int64)

    def rounded(self, name: str, n: Ints | int) -> Ints:
        """round(p · 2^n) for every float p of an array, from the bits of p: sign, exponent, mantissa."""
        places = {"<f4": (8, 23), "<f2": (5, 10)}.get(self.types[name])  # of exponent and mantissa
        if places is None:
            raise ValueError(f"{name} should be floats of 16 or 32 bits")
        of_exponent, of_mantissa = places
        bits = self.arrays[name].astype(np.int64)
        exponent, mantissa = bits >> of_mantissa & (1 << of_exponent) - 1, bits & (1 << of_mantissa) - 1
        if (exponent == (1 << of_exponent) - 1).any():
            raise ValueError(f"{name} should be finite")
        whole = np.where(exponent > 0, mantissa | 1 << of_mantissa, mantissa)
        unit = 2 - (1 << of_exponent - 1) - of_mantissa  # exponent of the last place of the smallest numbers
        return np.where(bits >> of_exponent + of_mantissa, -1, 1) * scale(whole, unit - 1 + np.maximum(exponent, 1) + n)

    def grid(self, name: str) -> tuple[int, int]:
        """The bits and the limit."""
        last = name.split(".")[-1]
        limits = {"q_grid": 511, "k_grid": 511, "v_grid": 511, "answer": 32767, "gate": 512}
        return self.grids[name], 32767 if last.startswith("wide") else limits.get(last, 1023)

    def put(self, grid: str, x: Ints, shift: Ints | int) -> Activation:
        """x · 2^shift on a grid."""
        bits, limit = self.grid(grid)
        return Activation(clamp(scale(x, bits + shift), limit), bits, limit)

    def to(self, grid: str, x: Activation) -> Activation:
        return self.put(grid, x.a, -x.bits)

    def sum(self, grid: str, first: Activation, *others: Activation) -> Activation:
        total = self.to(grid, first)
        for other in others:
            total = total._replace(a=clamp(total.a + self.to(grid, other).a, total.limit))
        return total

    def linear(self, name: str, x: Activation, grid: str, leaky: bool = False) -> Activation:
        """`linear` or `linear_leaky`."""
        weight, exponent = self.ints(f"{name}.weight"), self.ints(f"{name}.weight.exponent")
        bias = self.rounded(f"{name}.bias", exponent + x.bits)
        if (x.limit * np.abs(weight).sum(1) + np.abs(bias) >= 1 << 24).any():
            raise ValueError(f"the weights {name} are too large")
        acc = x.a @ weight.T + bias
        return self.put(grid, acc, -x.bits - exponent - (3 * (acc < 0) if leaky else 0))

    def depthwise(self, name: str, x: Activation, grid: str, group: int | None = None) -> Activation:
        weight, exponent = self.ints(f"{name}.weight"), self.ints(f"{name}.weight.exponent")
        if group is not None:
            weight, exponent = weight[group], exponent[group]
        rows, columns, _ = x.a.shape
        padded = np.pad(x.a, ((1, 1), (1, 1), (0, 0)))
        acc = np.zeros_like(x.a)
        for i, j in np.ndindex(3, 3):
            acc += weight[i, j] * padded[i : i + rows, j : j + columns]
        return self.put(grid, acc, -x.bits - exponent)

    def param(self, grid: str, name: str) -> Activation:
        bits, limit = self.grid(grid)
        return Activation(clamp(self.rounded(name, bits), limit), bits, limit)

    def quality(self, name: str, code: int, grid: str) -> Activation:
        table = self.param(grid, f"{name}.table")
        return table._replace(a=interpolate(table.a, code))

    def feed(self, name: str, x: Activation, wide: str) -> Activation:
        t = self.linear(f"{name}.expand", self.to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        return self.sum(wide, x, self.linear(f"{name}.reduce", t, wide))

    def block(self, name: str, x: Activation, wide: str) -> Activation:
        t = self.linear(f"{name}.inner", self.to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        t = self.depthwise(f"{name}.spatial", t, f"{name}.mixed")
        return self.feed(f"{name}.feed", self.sum(wide, x, self.linear(f"{name}.outer", t, wide)), wide)

    def non_local(self, name: str, x: Activation, wide: str) -> Activation:
        t = self.linear(f"{name}.inner", self.to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        t = self.linear(f"{name}.outer", self.depthwise(f"{name}.spatial", t, f"{name}.mixed"), f"{name}.branch")
        n = self.to(f"{name}.attention.narrow", x)
        parts = [self.linear(f"{name}.attention.{part}", n, f"{name}.attention.{part}_grid") for part in "qkv"]
        seen = parts[2]._replace(a=np.empty_like(parts[2].a))
        heads, channels = self.config["non_local_heads"], seen.a.shape[2]
        for block in windows(*x.a.shape[:2], side=16, shifted=False):
            cut = [p._replace(a=p.a[block].reshape(-1, heads, channels // heads).swapaxes(0, 1)) for p in parts]
            attended = attend(*cut, bias=np.zeros((), np.int64))
            seen.a[block] = attended.a.swapaxes(0, 1).reshape(seen.a[block].shape)
        s = self.sum(wide, x, self.linear(f"{name}.attention.out", seen, wide))
        m = self.linear(f"{name}.mask", self.to(f"{name}.joined", s), f"{name}.gate")
        return self.sum(wide, x, self.put(wide, t.a * (m.a + 512), -t.bits - m.bits))


# What all systems share (5.3 to 5.6, 5.12)


def hyper_latents(stream: Stream, weights: Weights, code: int, rows: int, columns: int) -> Ints:
    """ẑ (row, column, channel) of a tile (5.4)."""
    channels = weights.config["hyper_latent"]
    bucket = code * weights.config["hyper_buckets"] // 50001
    table_rows = list(range(bucket * channels, (bucket + 1) * channels)) * (rows * columns)
    z = np.array(stream.read(weights.z, table_rows), np.int64).reshape(rows, columns, channels)
    require(bool((np.abs(z) <= 63).all()), "a hyper-latent is out of range")
    return z


def hyper_synthesis(z: Ints, w: Weights, code: int) -> Activation:
    """ψ of ẑ (5.4)."""
    x = w.linear("h_s.first", Activation(z, 0, 63), "h_s.wide64")
    x = w.sum("h_s.wide64", x, w.quality("h_s.quality", code, "h_s.wide64"))
    if w.config.get("non_local_heads"):
        x = w.non_local("h_s.non_local", x, "h_s.wide64")
    x = w.to("h_s.narrow64", w.block("h_s.block64", x, "h_s.wide64"))
    x = depth_to_space(w.linear("h_s.up32", x, "h_s.wide32"), 2)
    x = w.to("h_s.narrow32", w.block("h_s.block32", x, "h_s.wide32"))
    x = depth_to_space(w.linear("h_s.up16", x, "h_s.wide16"), 2)
    x = w.to("h_s.narrow16", w.block("h_s.block16", x, "h_s.wide16"))
    return w.linear("h_s.last", x, "h_s.psi")


def features(y: Ints, log2: Ints) -> Activation:
    """What the context model sees of latents, whose channels have the units 2^(log2 / 4096) (5.5)."""
    a, n = power(-log2)
    x = clamp(scale(y * a, n + 10), 16384)
    p = clamp(scale(x, -3), 1023)
    g = np.sign(x) * function_table("LOG")[np.abs(x)]
    return Activation(np.concatenate([p, g], axis=-1), 7, 1023)


def scales_and_means(answer: Activation, log2: Ints, index: Ints) -> tuple[Ints, Ints, Ints]:
    """For each latent i, j and m (5.5, 5.6)."""
    mean, spread = np.split(answer.a, 2, axis=-1)
    a, n = power(log2)
    e = clamp(scale(mean * a, n - 7), 1 << 20)
    i = np.clip(scale(spread * 133144 + index, -24), 0, 63)
    m = (e + 4) // 8
    return i, e + 4 - 8 * m, m


def read_dependent(stream: Stream, tables: Tables, arrays: dict[str, np.ndarray], i: Ints, j: Ints) -> Ints:
    """ŷ - m of the latents of a step, or of a piece of the first one, (N,) (5.12)."""
    trellis, (least, u) = arrays["trellis"].astype(np.int64), arrays.get("chain", np.array([8, 17])).tolist()
    if trellis.ndim == 1:
        h0, h1 = trellis.tolist()
        state, parity = np.arange(1 << h0.bit_length() - 1)[:, None], np.arange(2)
        trellis = state // 2 ^ state % 2 * (h0 // 2) ^ parity * (h1 // 2)
    t = least
    if "chain" not in arrays:
        count = np.bincount(i, minlength=64)
        t = next(t for t in range(least, u + 1) if count[t:u].sum() <= len(i) // 6)
    large, medium, small = (np.flatnonzero(kind).tolist() for kind in (i >= u, (i >= t) & (i < u), i < t))
    if "chain" in arrays:
        medium.sort(key=lambda at: (i[at], at))
    k, q = (np.zeros(len(i), np.int64) for _ in range(2))

    state = 0
    for at in medium:
        q[at] = state % 2
        (k[at],) = stream.read(tables, [int(8 * u + 16 * (i[at] - least) + 2 * j[at] + q[at])])
        state = trellis[state, k[at] % 2]

    parities = 8 * u + 16 * (u - least)
    c = 4 * (i[large] - u) + j[large] // 2
    parity = stream.read(tables, (parities + c).tolist())
    require(set(parity) <= {0, 1}, "a parity is out of range")
    for at, odd in zip(large, parity, strict=True):
        q[at] = state % 2
        state = trellis[state, odd]
    rest = stream.read(tables, (parities + 4 * (64 - u) + 4 * c + 2 * q[large] + parity).tolist())
    k[large] = 2 * np.array(rest, np.int64) + np.array(parity, np.int64)

    k[small] = stream.read(tables, (8 * i[small] + j[small]).tolist())
    return 2 * k - np.where(k < 0, -q, np.where(k > 0, q, 0))


def read_with_neighbours(stream: Stream, tables: Tables, arrays: dict[str, np.ndarray], i: Ints, e: Ints) -> Ints:
    """ŷ of the first step, all (row, column, channel) (5.13)."""
    channels, weight, narrower = (
        arrays[f"neighbours.{name}"].astype(np.int64) for name in ("channels", "weight", "narrower")
    )
    rows, columns, _ = i.shape
    y = np.zeros_like(i)

    def read(at: Place, e: Ints, i: Ints) -> None:
        m = (e + 4) // 8
        y[at] = m + read_dependent(stream, tables, arrays, i, e + 4 - 8 * m)

    def level(r: int, s: int) -> tuple[int, int]:
        """Its d and number."""
        for n in range(0, narrower.shape[1] - 1, 2):
            d = 1 << (narrower.shape[1] - 1 - n) // 2
            if r % d == s % d == 0:
                return d, n
            if r % d and s % d and (2 * r) % d == (2 * s) % d == 0:
                return d // 2, n + 1
        return 1, narrower.shape[1] - 1

    def mirrored(at: int, to: int, size: int) -> int | None:
        return to if 0 <= to < size else 2 * at - to if 0 <= 2 * at - to < size else None

    positions = [(*level(r, s), r, s) for r, s in product(range(rows), range(columns))]
    for n in range(narrower.shape[1]):
        places, means, scales = [], [], []
        for d, r, s in ((d, r, s) for d, number, r, s in positions if number == n):
            steps = [(-d, -d), (-d, d), (d, -d), (d, d)] if n % 2 else [(-d, 0), (d, 0), (0, -d), (0, d)]
            for k, c in enumerate(channels):
                total = 0
                for down, right in steps if n else ():
                    row, column = mirrored(r, r + down, rows), mirrored(s, s + right, columns)
                    if row is not None and column is not None:
                        total += 8 * int(y[row, column, c]) - int(e[row, column, c])
                places.append((r, s, c))
                change = (int(weight[k, n - 1]) * total + 128) // 256 if n else 0
                means.append(min(max(int(e[r, s, c]) + change, -(1 << 20)), 1 << 20))
                scales.append(min(max(i[r, s, c] - narrower[k, n], 0), 63))
        if places:
            read(tuple(np.array(places).T), np.array(means), np.array(scales))  # type: ignore[arg-type]
    others = np.setdiff1d(np.arange(i.shape[2]), channels)
    at = tuple(t.ravel() for t in np.meshgrid(np.arange(rows), np.arange(columns), others, indexing="ij"))
    read(at, e[at], i[at])  # type: ignore[arg-type]
    return y


class Tile:
    """A tile whose hyper-latents are known. y: (row, column, channel), as far as it has been read.

    A *place* below stands for latents: arrays of rows, columns and channels, which broadcast to one shape, (..., C).
    """

    def __init__(self, weights: Weights, code: int, z: Ints) -> None:
        self.weights, self.code, self.psi = weights, code, hyper_synthesis(z, weights, code)
        self.is_first = True  # nothing has been read
        self.log2, self.index = (interpolate(weights.ints(f"units.{name}"), code) for name in ("log2", "index"))
        self.y = np.zeros((4 * z.shape[0], 4 * z.shape[1], weights.config["latent"]), np.int64)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the system."""
        options: dict[str, Any] = self.weights.config["context"]
        return options

    def read(self, stream: Stream, place: Place, answer: Activation) -> None:
        """Read the latents of a place. answer: (..., 2C), first all means, then all scales."""
        i, j, m = scales_and_means(answer, self.log2[place[2]], self.index[place[2]])
        tables, is_first, self.is_first = self.weights.y, self.is_first, False
        if is_first and "neighbours.channels" in self.weights.arrays:
            self.y[place] = read_with_neighbours(stream, tables, self.weights.arrays, i, 8 * m + j - 4)
            return
        if "offsets" in self.weights.arrays:
            values = read_dependent(stream, tables, self.weights.arrays, i.ravel(), j.ravel())
        else:
            values = np.array(stream.read(tables, (8 * i + j).ravel().tolist()), np.int64)
        self.y[place] = values.reshape(m.shape) + m

    def features(self, place: Place) -> Activation:
        return features(self.y[place], self.log2[place[2]])

    def psi_at(self, place: Place) -> Activation:
        """ψ at the positions of a place, (..., channel)."""
        return self.psi._replace(a=self.psi.a[place[0][..., 0], place[1][..., 0]])

    def linear(self, name: str, x: Activation, grid: str, leaky: bool = False) -> Activation:
        return self.weights.linear(f"context.{name}", x, f"context.{grid}", leaky)

    def to(self, grid: str, x: Activation) -> Activation:
        return self.weights.to(f"context.{grid}", x)

    def sum(self, grid: str, first: Activation, *others: Activation) -> Activation:
        return self.weights.sum(f"context.{grid}", first, *others)

    def quality(self, name: str, grid: str) -> Activation:
        return self.weights.quality(f"context.{name}", self.code, f"context.{grid}")

    def own(self, name: str, i: int) -> Activation:
        """Row i of an array, plus `quality`."""
        rows = self.weights.param("context.wide", f"context.{name}")
        return self.sum("wide", rows._replace(a=rows.a[i]), self.quality("quality", "wide"))

    def heads(self, name: str, x: Activation, parts: str) -> list[Activation]:
        """Queries, keys and values, or some of them, each (..., head, channel)."""
        n = self.to(f"{name}.narrow", x)
        results = [self.linear(f"{name}.{part}", n, f"{name}.{part}_grid") for part in parts]
        return [t._replace(a=t.a.reshape(*t.a.shape[:-1], self.options["heads"], -1)) for t in results]

    def add_attention(self, name: str, x: Activation, attention: Activation) -> Activation:
        """x, plus what attention, (..., head, channel), adds to it."""
        joined = attention._replace(a=attention.a.reshape(x.a.shape))
        return self.sum("wide", x, self.linear(f"{name}.out", joined, "wide"))

    def feed(self, name: str, x: Activation) -> Activation:
        return self.weights.feed(f"context.{name}", x, "context.wide")

    def psi_head(self, name: str, psi: Activation) -> Activation:
        """(5.9)"""
        x = self.sum(f"{name}.wide", psi, self.quality(f"{name}.quality", f"{name}.wide"))
        x = self.linear(f"{name}.first", self.to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        return self.linear(f"{name}.last", x, "answer")


PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))


def grid_of(rows: Iterable[int], columns: Iterable[int], channels: Iterable[int]) -> Place:
    """The place of everything that lies in one of the rows, columns and channels."""
    return np.ix_(*(np.fromiter(part, np.int64) for part in (rows, columns, channels)))  # type: ignore[return-value]


def channels_of(slices: list[int], s: int) -> range:
    """The channels of slice s."""
    return range(sum(slices[:s]), sum(slices[: s + 1]))


def windows(rows: int, columns: int, side: int, shifted: bool) -> Iterator[tuple[slice, slice]]:
    """What exists of each window."""
    first = -(side // 2) if shifted else 0
    for top, left in product(range(first, rows, side), range(first, columns, side)):
        yield slice(max(top, 0), top + side), slice(max(left, 0), left + side)


class GroupedMixer:
    """(5.7) g is the number of a group."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.past: list[list[tuple[Activation, Activation]]] = [[] for _ in range(tile.options["mixers"])]

    @staticmethod
    def groups(options: dict[str, Any]) -> int:
        return 4 * len(options["slices"])

    def decode(self, streams: Sequence[Stream]) -> None:
        tile = self.tile
        for g, stream in enumerate(streams):
            psi = tile.linear(f"psi.{g // 4}", tile.psi_at(self.place(g)), "wide")
            x = tile.sum("wide", psi, tile.own("group", g))
            if g > 0:
                seen = tile.features(self.place(g - 1))
                x = tile.sum("wide", x, tile.linear(f"embed.{(g - 1) // 4}", seen, "wide"))
            for i in range(len(self.past)):
                x = self.cross(i, g, self.inner(i, g, x))
            tile.read(stream, self.place(g), tile.linear(f"head.{g // 4}", tile.to("narrow", x), "answer"))

    def place(self, g: int) -> Place:
        rows, columns, _ = self.tile.y.shape
        row, column = PHASES[g % 4]
        return grid_of(range(row, rows, 2), range(column, columns, 2), channels_of(self.tile.options["slices"], g // 4))

    def inner(self, i: int, g: int, x: Activation) -> Activation:
        """Over the cells of a window, within group g."""
        tile, name, window = self.tile, f"inner.{i}", self.tile.options["window"]
        n = tile.to(f"{name}.narrow", x)
        x = tile.sum("wide", x, tile.weights.depthwise(f"context.{name}.spatial", n, "context.wide", g))
        q, k, v = tile.heads(f"{name}.attention", x, "qkv")
        bias = tile.weights.rounded(f"context.{name}.bias", 5)  # (offset, head)
        result = np.zeros_like(v.a)
        rows, columns = x.a.shape[:2]
        for vertical, horizontal in windows(rows, columns, window, i % 2 == 1):
            r, c = (t.ravel() for t in np.mgrid[:rows, :columns][:, vertical, horizontal])
            offset = (r[:, None] - r + window - 1) * (2 * window - 1) + c[:, None] - c + window - 1
            qs, ks, vs = (t._replace(a=t.a[r, c].swapaxes(0, 1)) for t in (q, k, v))  # (head, cell, channel)
            result[r, c] = attend(qs, ks, vs, bias[offset].transpose(2, 0, 1)).a.swapaxes(0, 1)
        return tile.feed(f"{name}.feed", tile.add_attention(f"{name}.attention", x, v._replace(a=result)))

    def cross(self, i: int, g: int, x: Activation) -> Activation:
        """Over the groups up to g, within a cell."""
        tile, name = self.tile, f"cross.{i}"
        q, k, v = tile.heads(f"{name}.attention", x, "qkv")
        self.past[i].append((k, v))
        keys, values = (  # (row, column, head, group, channel)
            t[0]._replace(a=np.stack([group.a for group in t], axis=-2)) for t in zip(*self.past[i], strict=True)
        )
        bias = tile.weights.rounded(f"context.{name}.bias", 5)[:, g, None, : g + 1]  # (head, 1, group)
        attention = attend(q._replace(a=q.a[..., None, :]), keys, values, bias)
        return tile.feed(f"{name}.feed", tile.add_attention(f"{name}.attention", x, attention))


@dataclass
class Keys:
    """Of one group in one layer of eContextformer. k, v: (position, head, channel)."""

    segment: int
    rows: Ints
    columns: Ints
    k: Activation
    v: Activation


class EContextformer:
    """(5.8) Activations of a group are (position, channel)."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.past: list[list[Keys]] = [[] for _ in range(tile.options["layers"])]

    @staticmethod
    def groups(options: dict[str, Any]) -> int:
        return 2 * len(options["segments"])

    def decode(self, streams: Sequence[Stream]) -> None:
        tile, segments = self.tile, self.tile.options["segments"]
        by_segment = {"spatial": True, "channel": False}[tile.options["order"]]
        for g, stream in enumerate(streams):
            s, half = divmod(g, 2) if by_segment else (g % len(segments), g // len(segments))
            rows, columns = np.nonzero(np.indices(tile.y.shape[:2]).sum(0) % 2 == half)
            place = rows[:, None], columns[:, None], np.array(channels_of(segments, s))
            x = tile.sum("wide", tile.linear(f"psi.{s}", tile.psi_at(place), "wide"), tile.own("group", g))
            before = []
            for i in range(len(self.past)):
                before.append(x)
                if g > 0:
                    x = self.attention(i, s, rows, columns, x)
                x = tile.feed(f"layers.{i}.feed", x)
            tile.read(stream, place, tile.linear(f"head.{s}", tile.to("narrow", x), "answer"))
            if g < len(streams) - 1:
                embedded = tile.linear(f"embed.{s}", tile.features(place), "wide")
                for i, x in enumerate(before):
                    k, v = tile.heads(f"layers.{i}.attention", tile.sum("wide", x, embedded), "kv")
                    self.past[i].append(Keys(s, rows, columns, k, v))

    def attention(self, i: int, s: int, rows: Ints, columns: Ints, x: Activation) -> Activation:
        """Of a group of segment s over all groups before it."""
        tile, name, side = self.tile, f"layers.{i}", self.tile.options["window"]
        (q,) = tile.heads(f"{name}.attention", x, "q")
        past, bias = self.past[i], tile.weights.rounded(f"context.{name}.bias", 5)  # (offset, head)
        key_rows, key_columns = (np.concatenate([getattr(t, part) for t in past]) for part in ("rows", "columns"))
        key_segments = np.concatenate([np.full(len(t.rows), t.segment) for t in past])
        k, v = (getattr(past[0], t)._replace(a=np.concatenate([getattr(p, t).a for p in past])) for t in "kv")
        result = np.zeros_like(q.a)
        height, width, _ = tile.y.shape
        for vertical, horizontal in windows(height, width, side, i % 2 == 1):
            inside = np.zeros((height, width), bool)
            inside[vertical, horizontal] = True
            queries, keys = np.flatnonzero(inside[rows, columns]), np.flatnonzero(inside[key_rows, key_columns])
            offset = s - key_segments[keys] + len(tile.options["segments"]) - 1
            offset = offset * (2 * side - 1) + rows[queries, None] - key_rows[keys] + side - 1
            offset = offset * (2 * side - 1) + columns[queries, None] - key_columns[keys] + side - 1
            chosen = ((q, queries), (k, keys), (v, keys))
            qs, ks, vs = (t._replace(a=t.a[which].swapaxes(0, 1)) for t, which in chosen)  # (head, position, channel)
            result[queries] = attend(qs, ks, vs, bias[offset].transpose(2, 0, 1)).a.swapaxes(0, 1)
        return tile.add_attention(f"{name}.attention", x, v._replace(a=result))


class Hyperprior:
    """(5.9)"""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile

    @staticmethod
    def groups(options: dict[str, Any]) -> int:
        return 1

    def decode(self, streams: Sequence[Stream]) -> None:
        tile = self.tile
        tile.read(streams[0], grid_of(*map(range, tile.y.shape)), tile.psi_head("head", tile.psi))


class Msp:
    """(5.10) known: K."""

    def __init__(self, tile: Tile) -> None:
        self.tile, self.slices = tile, tile.options["slices"]
        bits, limit = tile.weights.grid("context.wide_known")
        self.known = Activation(np.zeros((*tile.y.shape[:2], tile.options["width"]), np.int64), bits, limit)

    @staticmethod
    def groups(options: dict[str, Any]) -> int:
        levels: int = options["levels"]
        return 1 + 3 * levels * len(options["slices"])

    def decode(self, streams: Sequence[Stream]) -> None:
        tile, levels, n = self.tile, self.tile.options["levels"], len(self.slices)
        coarsest = self.positions(1 << levels, (0, 0), range(len(tile.log2)))
        tile.read(streams[0], coarsest, tile.psi_head("coarsest", tile.psi_at(coarsest)))
        for s in range(n):
            self.observe(self.positions(1 << levels, (0, 0), channels_of(self.slices, s)), s)
        for step, stream in enumerate(streams[1:]):
            level, t = divmod(step, 3 * n)
            s = t % n
            cell = 1 << levels - level
            place = self.positions(cell, PHASES[1 + t // n], channels_of(self.slices, s))
            x = tile.sum("wide", tile.linear(f"psi.{s}", tile.psi_at(place), "wide"), tile.own("step", step))
            tile.read(stream, place, self.answer(x, level, t, cell))
            self.observe(place, s)

    def positions(self, cell: int, phase: tuple[int, int], channels: Iterable[int]) -> Place:
        """Of one phase of all cells, which are ``cell`` positions wide."""
        rows, columns = (range(p * cell // 2, n, cell) for p, n in zip(phase, self.tile.y.shape[:2], strict=True))
        return grid_of(rows, columns, channels)

    def observe(self, place: Place, s: int) -> None:
        embedded = self.tile.linear(f"embed.{s}", self.tile.features(place), "wide_known")
        at = place[0][..., 0], place[1][..., 0]
        before = self.known._replace(a=self.known.a[at])
        self.known.a[at] = self.tile.sum("wide_known", before, embedded).a

    def answer(self, x: Activation, level: int, t: int, cell: int) -> Activation:
        """Of step t of a level, for the tokens x of its cells."""
        tile, n = self.tile, len(self.slices)
        for p, phase in enumerate(PHASES):
            first = 1 + (p - 1) * n if p else 0
            if t >= first:
                rows, columns, _ = self.positions(cell, phase, range(1))
                near = tile.to("known", self.known._replace(a=self.known.a[rows[..., 0], columns[..., 0]]))
                kernel = level * (3 * n - first) + t - first
                x = tile.sum("wide", x, tile.weights.depthwise(f"context.around.{p}", near, "context.wide", kernel))
        for i in range(tile.options["depth"]):
            name = f"blocks.{i}"
            y = tile.linear(f"{name}.inner", tile.to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
            kernel = level * 3 * n + t
            y = tile.weights.depthwise(f"context.{name}.spatial", y, f"context.{name}.mixed", kernel)
            x = tile.feed(f"{name}.feed", tile.sum("wide", x, tile.linear(f"{name}.outer", y, "wide")))
        return tile.linear(f"head.{t % n}", tile.to("narrow", x), "answer")


class Nlaic:
    """(5.11) seen: (row + 2, column + 2, channel + 2, 2), p and |g| of what has been read, with a border of zeros."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        rows, columns, channels = tile.y.shape
        self.seen = np.zeros((rows + 4, columns + 4, channels + 2, 2), np.int64)
        psi = tile.linear("psi", tile.psi, "wide")
        psi = psi._replace(a=psi.a.reshape(rows, columns, channels, tile.options["features"]))
        self.own = tile.sum("wide", psi, tile.quality("quality", "wide"))

    @staticmethod
    def groups(options: dict[str, Any]) -> int:
        return len(options["slices"])

    def decode(self, streams: Sequence[Stream]) -> None:
        rows, columns, channels = self.tile.y.shape
        last_channels = np.cumsum(self.tile.options["slices"]) - 1
        for t in range(rows + 3 * (channels - 1)):
            last = min(t // 3, channels - 1)
            c = np.arange(max(0, (t - rows) // 3 + 1), last + 1)
            place = t - 3 * c, np.arange(columns)[:, None], c
            self.tile.read(streams[int(np.searchsorted(last_channels, last))], place, self.answer(*place))
            p, g = np.split(self.tile.features(place).a, 2, axis=-1)
            self.seen[place[0] + 2, place[1] + 2, place[2] + 2] = np.stack([p, np.abs(g)], axis=-1)

    def answer(self, r: Ints, x: Ints, c: Ints) -> Activation:
        """For the latents of a step, (column, channel)."""
        tile = self.tile
        around = [(n, i) for n in (-2, -1) for i in range(-2, 3)] + [(0, -2), (0, -1)]
        near = [self.seen[r + i + 2, x + j + 2, c + n + 2] for n, i in around for j in range(-2, 3)]
        u = Activation(np.concatenate(near, axis=-1), 7, 1023)
        v = tile.linear("filters", u, "joined")
        own = tile.to("joined", self.own._replace(a=self.own.a[r, x, c]))
        v = v._replace(a=np.concatenate([v.a, own.a], axis=-1))
        v = tile.linear("second", tile.linear("first", v, "hidden1", leaky=True), "hidden2", leaky=True)
        pairs = tile.linear("head", v, "answer")
        return pairs._replace(a=np.concatenate([pairs.a[..., 0], pairs.a[..., 1]], axis=-1))


SYSTEMS: dict[str, type[GroupedMixer | EContextformer | Hyperprior | Msp | Nlaic]] = {
    "groupedmixer": GroupedMixer,
    "econtextformer": EContextformer,
    "hyperprior": Hyperprior,
    "msp": Msp,
    "nlaic": Nlaic,
}


def decode_tile(data: list[bytes], width: int, height: int, weights: Weights, code: int) -> Symbols:
    """data: the streams of the tile."""
    first, *others = streams = [Stream(part) for part in data]
    z = hyper_latents(first, weights, code, -(-height // 64), -(-width // 64))
    tile = Tile(weights, code, z)
    SYSTEMS[weights.config["system"]](tile).decode(others)
    for stream in streams:
        stream.end()
    return z.astype(np.int32).transpose(2, 0, 1), tile.y.astype(np.int32).transpose(2, 0, 1)


def decode_symbols(data: bytes, weights: Path) -> Decoded:
    """Decode all symbols of a `.lic` file with a weights file.

    Raises DamagedError, UnsupportedError (also for other weights than those of the file) or TooLargeError.
    """
    container, model = read_container(data), Weights(weights)
    if (container.entropy_id, container.synthesis_id) != (model.entropy_id, model.synthesis_id):
        raise UnsupportedError("the file needs other weights")
    if model.config["system"] not in SYSTEMS:
        raise UnsupportedError("the weights are of an unknown system")
    groups = SYSTEMS[model.config["system"]].groups(model.config["context"])
    require(len(container.streams[0]) == groups + 1, "the number of streams does not fit the model")
    parts = zip(container.streams, container.tiles, strict=True)
    tiles = [decode_tile(streams, *size, model, container.quality) for streams, size in parts]
    written = b"".join(array.astype("<i4").tobytes() for tile in tiles for array in tile)
    require(zlib.crc32(written) == container.symbols_crc, "wrong symbols")
    return Decoded(tiles, hashlib.sha256(written).hexdigest())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: reference_decoder.py FILE.lic WEIGHTS.safetensors")
    try:
        print(decode_symbols(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])).sha256)
    except ValueError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
