"""A second decoder of the symbols of a `.lic` file, written from bitstream_spec.md alone; it shares no code with `lic`.

    python tests/reference_decoder.py FILE.lic WEIGHTS.safetensors

prints the SHA-256 of the symbols, as `lic verify --json` does. It covers the container (chapters 1 to 3, the contents
of sections passed over), the range coder (4) and the entropy model `groupedmixer` (5), but no pixels (6, 7). All
arithmetic is on integers, in arrays of 64 bits. Numbers in parentheses below are sections of the specification.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Tile = tuple[np.ndarray, np.ndarray]  # z, y


class DamagedError(ValueError):
    """No `.lic` file, or a truncated or altered one."""


class UnsupportedError(ValueError):
    """A sound file that needs another reader or other weights."""


class TooLargeError(ValueError):
    """A file over a limit of 3.6."""


@dataclass
class Symbols:
    """tiles: for each tile (z, y), int32 arrays (channel, row, column). sha256: over all of them, in hexadecimal."""

    tiles: list[Tile]
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
    if data[3] >> 2 != 1:
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

    table = [(bits.u(32).to_bytes(4, "big"), bits.u(32)) for _ in range(bits.u(8))] if has_sections else []
    kinds = [kind for kind, _ in table]
    require(not has_sections or bool(kinds), "an empty section table")
    require(all(kind.isalpha() for kind in kinds) and len(set(kinds)) == len(kinds), "bad section table")
    at = bits.at // 8
    require(at + sum(lengths) + sum(n for _, n in table) + 4 == len(data), "the size of the file is wrong")

    unknown = [kind for kind in kinds if kind[:1].isupper() and kind != b"Alph"]
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

    def __init__(self, data: bytes, limit: int) -> None:
        self.data, self.read, self.limit = data, 0, limit

    def u(self, n: int) -> int:
        require(self.read + n <= self.limit, "a stream is too short")
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


def decode_stream(data: bytes, tables: Tables, rows: list[int]) -> list[int]:
    """The values of a stream (4.2, 4.5), one for each of ``rows``."""
    modes = [tables.mode[row] for row in rows]
    skipped = [i for i, mode in enumerate(modes) if mode is not None]
    coded = [i for i, mode in enumerate(modes) if mode is None]
    values = [tables.offset[row] + (mode or 0) for row, mode in zip(rows, modes, strict=True)]
    if not data:
        require(not coded, "a stream is missing")
        return values
    decoder = RangeDecoder(data)
    flag = decoder.symbol(FLAG)
    require(bool(flag or coded), "a stream should be empty")
    symbols = [decoder.symbol(tables.cdf[rows[i]]) for i in coded]
    a = decoder.shifts + 2
    bypass = Bypass(data, 8 * len(data) - a)

    if flag:
        at = -1
        for _ in range(bypass.number(0) + 1):
            at += bypass.number(13) + 1
            require(at < len(skipped), "a deviation behind the end")
            x = bypass.number(1)
            values[skipped[at]] += -(x // 2 + 1) if x % 2 else x // 2 + 1
    for i, s in zip(coded, symbols, strict=True):
        row = rows[i]
        escape, offset, k = len(tables.cdf[row]) - 2, tables.offset[row], tables.raw_bits[row]
        value = offset + s
        if s == escape:
            x = bypass.number(1)
            value = offset - 1 - x // 2 if x % 2 else offset + escape + x // 2
        if k:
            value = (value << k) + bypass.u(k) - (1 << k - 1)
        values[i] = value
    require(all(abs(value) <= 1 << 20 for value in values), "a value is out of range")

    unused = 8 * len(data) - a - bypass.read
    between = int.from_bytes(data, "big") >> bypass.read & (1 << unused) - 1
    require(unused < 16 + (a >> 15) and between == 0, "a stream has unused bits")
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


class Weights:
    """The arrays of a weights file, and the operations of 5.1 that name one."""

    def __init__(self, data: bytes) -> None:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        information = json.loads(header.pop("__metadata__")["lic"])
        self.config: dict[str, Any] = information["config"]
        self.grids: dict[str, int] = information["grids"]
        self.types: dict[str, str] = {}
        self.arrays: dict[str, np.ndarray] = {}
        types = {"I8": "|i1", "U8": "|u1", "U16": "<u2", "F16": "<f2", "I32": "<i4", "F32": "<f4"}
        for name, entry in header.items():
            self.types[name] = types[entry["dtype"]]
            kind = self.types[name].replace("f", "u")  # floats as their bits: see rounded()
            start, stop = (end + offset for offset in entry["data_offsets"])
            self.arrays[name] = np.frombuffer(data[start:stop], kind).reshape(entry["shape"])
        settings = {**self.config, "grids": self.grids, "revision": 2}
        settings.pop("name", None)
        settled = json.dumps(settings, sort_keys=True).encode()
        self.entropy_id = self._digest(settled, ("h_s", "context", "units", "tables"))[:4]
        self.synthesis_id = self._digest(b"", ("shortcut", "g_s", "log_gain", "log_igain"))[:2]
        self.y, self.z = (
            Tables(*(self.arrays[f"tables.{part}.{name}"] for name in ("cdf", "size", "offset", "raw_bits")))
            for part in "yz"
        )

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
        """round(p · 2^n) for every float p of an array, from the bits of p: sign, 8 of exponent, 23 of mantissa."""
        bits = self.arrays[name].astype(np.int64)
        exponent, mantissa = bits >> 23 & 255, bits & (1 << 23) - 1
        if self.types[name] != "<f4" or (exponent == 255).any():
            raise ValueError(f"{name} should be finite 32-bit floats")
        whole = np.where(exponent > 0, mantissa | 1 << 23, mantissa)
        return np.where(bits >> 31, -1, 1) * scale(whole, np.maximum(exponent, 1) - 150 + n)

    def grid(self, name: str) -> tuple[int, int]:
        """The bits and the limit."""
        last = name.split(".")[-1]
        limits = {"q_grid": 511, "k_grid": 511, "v_grid": 511, "answer": 32767}
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


# Entropy model (5.3 to 5.7)


def hyper_latents(data: bytes, weights: Weights, code: int, rows: int, columns: int) -> Ints:
    """ẑ (row, column, channel) of a tile (5.4)."""
    channels = weights.config["hyper_latent"]
    bucket = code * weights.config["hyper_buckets"] // 50001
    table_rows = list(range(bucket * channels, (bucket + 1) * channels)) * (rows * columns)
    z = np.array(decode_stream(data, weights.z, table_rows), np.int64).reshape(rows, columns, channels)
    require(bool((np.abs(z) <= 63).all()), "a hyper-latent is out of range")
    return z


def hyper_synthesis(z: Ints, w: Weights, code: int) -> Activation:
    """ψ of ẑ (5.4)."""
    x = w.linear("h_s.first", Activation(z, 0, 63), "h_s.wide64")
    x = w.sum("h_s.wide64", x, w.quality("h_s.quality", code, "h_s.wide64"))
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


def rows_and_means(answer: Activation, log2: Ints, index: Ints) -> tuple[Ints, Ints]:
    """For each latent its row of `tables.y` and the m that is added to the value from the stream (5.5, 5.6)."""
    mean, spread = np.split(answer.a, 2, axis=-1)
    a, n = power(log2)
    e = clamp(scale(mean * a, n - 7), 1 << 20)
    i = np.clip(scale(spread * 133144 + index, -24), 0, 63)
    m = (e + 4) // 8
    return 8 * i + e + 4 - 8 * m, m


PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))


class GroupedMixer:
    """The context model (5.7) of one tile. psi: ψ; g below is the number of a group."""

    def __init__(self, weights: Weights, code: int, psi: Activation) -> None:
        self.weights, self.code, self.psi = weights, code, psi
        self.heads: int = weights.config["context"]["heads"]
        self.past: list[list[tuple[Activation, Activation]]] = [[] for _ in range(weights.config["context"]["mixers"])]

    def answer(self, g: int, features: Activation | None) -> Activation:
        """(a, b) of group g at each cell. features: those of group g - 1. To be called for each group in turn."""
        weights, (row, column) = self.weights, PHASES[g % 4]
        group = weights.param("context.wide", "context.group")
        quality = weights.quality("context.quality", self.code, "context.wide")
        own = weights.sum("context.wide", group._replace(a=group.a[g]), quality)
        psi = self.psi._replace(a=self.psi.a[row::2, column::2])
        x = weights.sum("context.wide", weights.linear(f"context.psi.{g // 4}", psi, "context.wide"), own)
        if features is not None:
            embedded = weights.linear(f"context.embed.{(g - 1) // 4}", features, "context.wide")
            x = weights.sum("context.wide", x, embedded)
        for i in range(len(self.past)):
            x = self.cross(i, g, self.inner(i, g, x))
        return weights.linear(f"context.head.{g // 4}", weights.to("context.narrow", x), "context.answer")

    def queries_keys_values(self, name: str, x: Activation) -> list[Activation]:
        """Each (row, column, head, channel)."""
        n = self.weights.to(f"{name}.narrow", x)
        three = [self.weights.linear(f"{name}.{part}", n, f"{name}.{part}_grid") for part in "qkv"]
        return [t._replace(a=t.a.reshape(*t.a.shape[:2], self.heads, -1)) for t in three]

    def finish(self, name: str, x: Activation, attention: Activation) -> Activation:
        joined = attention._replace(a=attention.a.reshape(x.a.shape))
        out = self.weights.linear(f"{name}.attention.out", joined, "context.wide")
        return self.weights.feed(f"{name}.feed", self.weights.sum("context.wide", x, out), "context.wide")

    def inner(self, i: int, g: int, x: Activation) -> Activation:
        """Over the cells of a window, within group g."""
        name, window = f"context.inner.{i}", self.weights.config["context"]["window"]
        n = self.weights.to(f"{name}.narrow", x)
        x = self.weights.sum("context.wide", x, self.weights.depthwise(f"{name}.spatial", n, "context.wide", g))
        q, k, v = self.queries_keys_values(f"{name}.attention", x)
        bias = self.weights.rounded(f"{name}.bias", 5)  # (offset, head)
        result = np.zeros_like(v.a)
        rows, columns = x.a.shape[:2]
        first = -(window // 2) if i % 2 else 0
        for top in range(first, rows, window):
            for left in range(first, columns, window):
                cells = np.mgrid[max(top, 0) : min(top + window, rows), max(left, 0) : min(left + window, columns)]
                r, c = cells.reshape(2, -1)
                offset = (r[:, None] - r + window - 1) * (2 * window - 1) + c[:, None] - c + window - 1
                qs, ks, vs = (t._replace(a=t.a[r, c].swapaxes(0, 1)) for t in (q, k, v))  # (head, cell, channel)
                result[r, c] = attend(qs, ks, vs, bias[offset].transpose(2, 0, 1)).a.swapaxes(0, 1)
        return self.finish(name, x, v._replace(a=result))

    def cross(self, i: int, g: int, x: Activation) -> Activation:
        """Over the groups up to g, within a cell."""
        name = f"context.cross.{i}"
        q, k, v = self.queries_keys_values(f"{name}.attention", x)
        self.past[i].append((k, v))
        keys, values = (  # (row, column, head, group, channel)
            t[0]._replace(a=np.stack([group.a for group in t], axis=-2)) for t in zip(*self.past[i], strict=True)
        )
        bias = self.weights.rounded(f"{name}.bias", 5)[:, g, None, : g + 1]  # (head, 1, group)
        return self.finish(name, x, attend(q._replace(a=q.a[..., None, :]), keys, values, bias))


def decode_tile(streams: list[bytes], width: int, height: int, weights: Weights, code: int) -> Tile:
    """(z, y), each (channel, row, column)."""
    rows, columns = -(-height // 64), -(-width // 64)
    z = hyper_latents(streams[0], weights, code, rows, columns)
    model = GroupedMixer(weights, code, hyper_synthesis(z, weights, code))
    log2, index = (interpolate(weights.ints(f"units.{name}"), code) for name in ("log2", "index"))
    slices: list[int] = weights.config["context"]["slices"]
    y = np.zeros((4 * rows, 4 * columns, sum(slices)), np.int64)
    seen = None
    for g, stream in enumerate(streams[1:]):
        first = sum(slices[: g // 4])
        channels = slice(first, first + slices[g // 4])
        table_rows, m = rows_and_means(model.answer(g, seen), log2[channels], index[channels])
        values = decode_stream(stream, weights.y, table_rows.ravel().tolist())
        group = np.array(values, np.int64).reshape(m.shape) + m
        row, column = PHASES[g % 4]
        y[row::2, column::2, channels] = group
        seen = features(group, log2[channels])
    return z.astype(np.int32).transpose(2, 0, 1), y.astype(np.int32).transpose(2, 0, 1)


def decode_symbols(data: bytes, weights: bytes) -> Symbols:
    """Decode all symbols of a `.lic` file with the contents of a weights file.

    Raises DamagedError, UnsupportedError (also for other weights than those of the file) or TooLargeError.
    """
    container, model = read_container(data), Weights(weights)
    if (container.entropy_id, container.synthesis_id) != (model.entropy_id, model.synthesis_id):
        raise UnsupportedError("the file needs other weights")
    if model.config["system"] != "groupedmixer":
        raise UnsupportedError("the weights are of another system than groupedmixer")
    groups = 4 * len(model.config["context"]["slices"])
    require(len(container.streams[0]) == groups + 1, "the number of streams does not fit the model")
    parts = zip(container.streams, container.tiles, strict=True)
    tiles = [decode_tile(streams, *size, model, container.quality) for streams, size in parts]
    written = b"".join(array.astype("<i4").tobytes() for tile in tiles for array in tile)
    require(zlib.crc32(written) == container.symbols_crc, "wrong symbols")
    return Symbols(tiles, hashlib.sha256(written).hexdigest())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: reference_decoder.py FILE.lic WEIGHTS.safetensors")
    try:
        print(decode_symbols(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes()).sha256)
    except ValueError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
