"""Streams: both coders give the same bytes, every value comes back, and nothing is wasted."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lic import coder
from lic.coder import SCALES, VALUE_LIMIT, Decoder, Encoder, Tables, bypass, gaussian_tables, range_coder
from lic.errors import CorruptError, LicError, UsageError

GAUSSIAN = gaussian_tables()
UNEVEN = Tables.from_pmfs(
    [[1.0], [0.5, 0.5], [1 - 1e-6, 1e-6], [0.2] * 5, np.full(300, 1 / 300), [1e-9, 0.3, 1e-9]],
    [0, -1, 7, -2, -150, VALUE_LIMIT - 5],
)
needs_torchac = pytest.mark.skipif(
    not coder.backend_info().startswith("torchac"), reason=f"coder: {coder.backend_info()}"
)
BACKENDS = [pytest.param("torchac", marks=needs_torchac), "python"]


def sample(median: float, count: int, seed: int = 0, spread: float = 1.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, rows, σ index) of latents with log-normal standard deviations around ``median``."""
    rng = np.random.default_rng(seed)
    sigma = np.clip(median * np.exp(rng.normal(size=count) * spread), SCALES[0], SCALES[-1])
    index = np.rint(np.log(sigma / SCALES[0]) / np.log(SCALES[1] / SCALES[0])).astype(int)
    fraction = np.where(SCALES[index] < 0.2, 4, rng.integers(0, 8, count))
    values = np.rint((fraction - 4) / 8 + SCALES[index] * rng.normal(size=count)).astype(int)
    return values, index * 8 + fraction, index


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Tables]:
    tables = draw(st.sampled_from([GAUSSIAN, UNEVEN]))
    row = st.integers(0, len(tables) - 1)
    usual = st.integers(-3, 3)
    rare = st.one_of(st.integers(-300, 300), st.integers(-VALUE_LIMIT, VALUE_LIMIT))
    value = st.one_of(usual, usual, usual, rare)
    pairs = draw(st.lists(st.tuples(value, row), max_size=60))
    values, rows = (np.array(part, dtype=np.int32) for part in zip(*pairs, strict=True)) if pairs else ((), ())
    return np.asarray(values, dtype=np.int32), np.asarray(rows, dtype=np.int32), tables


@given(streams())
@settings(max_examples=300, deadline=None)
def test_python_round_trip(stream: tuple[np.ndarray, np.ndarray, Tables]) -> None:
    values, rows, tables = stream
    data = coder.encode(values, rows, tables, backend="python")
    decoded = coder.decode(data, rows, tables, backend="python")
    assert decoded.dtype == np.int32
    assert decoded.tolist() == values.tolist()
    assert -1 <= 8 * len(data) - coder.ideal_bits(values, rows, tables) < 16


@needs_torchac
@given(streams())
@settings(max_examples=300, deadline=None)
def test_torchac_gives_the_same_bytes(stream: tuple[np.ndarray, np.ndarray, Tables]) -> None:
    values, rows, tables = stream
    data = coder.encode(values, rows, tables, backend="torchac")
    assert data == coder.encode(values, rows, tables, backend="python")
    assert coder.decode(data, rows, tables, backend="torchac").tolist() == values.tolist()


@needs_torchac
@pytest.mark.parametrize("median", [0.02, 0.4, 20.0])
def test_long_streams_agree(median: float) -> None:
    values, rows, _ = sample(median, 30_000)
    data = coder.encode(values, rows, GAUSSIAN, backend="torchac")
    assert data == coder.encode(values, rows, GAUSSIAN, backend="python")
    for backend in ("torchac", "python"):
        assert np.array_equal(coder.decode(data, rows, GAUSSIAN, backend=backend), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_symbol_of_every_row(backend: str) -> None:
    rows = np.repeat(np.arange(len(GAUSSIAN)), GAUSSIAN.size + 1)
    symbols = np.concatenate([np.arange(-1, n) for n in GAUSSIAN.size])  # an escape at either end
    values = (symbols + GAUSSIAN.offset[rows]) << GAUSSIAN.raw_bits[rows].astype(int)
    data = coder.encode(values, rows, GAUSSIAN, backend=backend)
    assert np.array_equal(coder.decode(data, rows, GAUSSIAN, backend=backend), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_widest_values_in_the_rarest_symbols(backend: str) -> None:
    """Symbols of 16 bits each: here the interval is rounded most."""
    rows = np.zeros(5000, dtype=int)
    certain = Tables.from_pmfs([[0.9, 0.1]], [0])
    values = np.tile([VALUE_LIMIT, -VALUE_LIMIT], 2500)
    data = coder.encode(values, rows, certain, backend=backend)
    assert np.array_equal(coder.decode(data, rows, certain, backend=backend), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_certain_symbols_cost_nothing(backend: str) -> None:
    row = int(np.flatnonzero(GAUSSIAN.skipped)[0])
    rows, values = np.full(100_000, row), np.zeros(100_000, dtype=int)
    assert coder.encode(values, rows, GAUSSIAN, backend=backend) == b""
    assert np.array_equal(coder.decode(b"", rows, GAUSSIAN, backend=backend), values)

    values[[0, 1, 500, 99_999]] = [1, -1, VALUE_LIMIT, -VALUE_LIMIT]  # but they need not be what they seem
    data = coder.encode(values, rows, GAUSSIAN, backend=backend)
    assert 0 < len(data) < 40
    assert np.array_equal(coder.decode(data, rows, GAUSSIAN, backend=backend), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_an_empty_stream(backend: str) -> None:
    nothing = np.zeros(0, dtype=np.int32)
    assert coder.encode(nothing, nothing, GAUSSIAN, backend=backend) == b""
    assert coder.decode(b"", nothing, GAUSSIAN, backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_stream_has_no_coded_values(backend: str) -> None:
    """Not even likely ones, which need not a whole byte."""
    likely = Tables.from_pmfs([[0.97, 0.03], [1.0]], [0, 0])
    for count in (1, 10):
        rows = np.tile([1, 0], count)
        with pytest.raises(CorruptError, match="empty"):
            coder.decode(b"", rows, likely, backend=backend)
    with pytest.raises(CorruptError, match="empty"):
        Decoder(b"").pull(np.array([0]), likely)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_deviations_take_time_in_proportion(backend: str) -> None:
    count = 200_000
    rows = np.full(count, int(np.flatnonzero(GAUSSIAN.skipped)[0]))
    values = np.where(np.arange(count) % 2, 1, -2)
    data = coder.encode(values, rows, GAUSSIAN, backend=backend)
    start = time.process_time()
    assert np.array_equal(coder.decode(data, rows, GAUSSIAN, backend=backend), values)
    assert time.process_time() - start < 6


def test_deviations_in_steps() -> None:
    """Whatever the steps, each deviation is applied to its value, and none is left over unnoticed."""
    row = int(np.flatnonzero(GAUSSIAN.skipped)[0])
    rows, values = np.full(1000, row), np.zeros(1000, dtype=int)
    values[[0, 1, 9, 10, 500, 999]] = [1, -1, 7, 8, -3, 2]
    data = coder.encode(values, rows, GAUSSIAN)
    for step in (1, 9, 10, 333, 1000):
        decoder = Decoder(data)
        parts = [decoder.pull(rows[i : i + step], GAUSSIAN) for i in range(0, 1000, step)]
        decoder.finish()
        assert np.array_equal(np.concatenate(parts), values)
    decoder = Decoder(data)
    decoder.pull(rows[:999], GAUSSIAN)
    with pytest.raises(CorruptError):
        decoder.finish()


def test_deviations_behind_the_end_of_any_stream() -> None:
    """Gaps that add up to more than the positions of any stream, in a stream of consistent length."""
    number, gap, amount = ((np.array([n]), m) for n, m in ((2**24 - 2, 0), (2**37, 13), (0, 1)))
    codes = [bypass.exp_golomb(*part) for part in (number, *[gap, amount] * 8)]
    code, length = (np.concatenate(part) for part in zip(*codes, strict=True))
    flag = range_coder.encode([(57344, 65535)])
    data = bypass.append(flag, 5, code, length)
    with pytest.raises(CorruptError, match="behind the end"):
        Decoder(data)


def test_a_short_stream_fails_soon_however_many_rows_it_is_for() -> None:
    rows = iter([0] * 100_000)
    with pytest.raises(CorruptError, match="too early"):
        range_coder.RangeDecoder(b"\x00\x01").read(rows, [[0, 32768, 65535]])
    assert len(list(rows)) > 99_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend: str) -> None:
    values, rows, _ = sample(1.0, 2000)
    data = coder.encode(values[::2].copy(), rows[::2].copy(), GAUSSIAN, backend=backend)
    wide = np.stack([values.astype(np.int16), rows], axis=1)  # a column of a matrix
    assert coder.encode(wide[::2, 0], wide[::2, 1], GAUSSIAN, backend=backend) == data
    assert np.array_equal(coder.decode(data, rows[::2], GAUSSIAN, backend=backend), values[::2])
    assert np.array_equal(coder.decode(memoryview(data), rows[::2], GAUSSIAN, backend=backend), values[::2])


@given(streams(), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_steps_give_the_same_bytes_as_one_call(stream: tuple[np.ndarray, np.ndarray, Tables], step: int) -> None:
    values, rows, tables = stream
    encoder = Encoder()
    for start in range(0, len(rows), step):
        encoder.push(values[start : start + step], rows[start : start + step], tables)
    data = encoder.finish(backend="python")
    assert data == coder.encode(values, rows, tables, backend="python")

    decoder = Decoder(data)
    for start in range(0, len(rows), step):
        pulled = decoder.pull(rows[start : start + step], tables)
        assert pulled.tolist() == values[start : start + step].tolist()
    decoder.finish()


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_different_tables(backend: str) -> None:
    values, rows, _ = sample(0.3, 300)
    encoder = Encoder()
    encoder.push(np.array([5, -1, 2]), np.array([3, 1, 4]), UNEVEN)
    encoder.push(values, rows, GAUSSIAN)
    encoder.push(np.array([1]), np.array([0]), UNEVEN)
    decoder = Decoder(encoder.finish(backend=backend))
    assert decoder.pull(np.array([3, 1, 4]), UNEVEN).tolist() == [5, -1, 2]
    assert np.array_equal(decoder.pull(rows, GAUSSIAN), values)
    assert decoder.pull(np.array([0]), UNEVEN).tolist() == [1]
    decoder.finish()


def test_finish_before_the_end() -> None:
    values, rows, _ = sample(1.0, 100)
    decoder = Decoder(coder.encode(values, rows, GAUSSIAN))
    decoder.pull(rows[:50], GAUSSIAN)
    with pytest.raises(CorruptError):
        decoder.finish()


def gaussian_bits(values: np.ndarray, rows: np.ndarray) -> float:
    """Code length under exact Gaussians, no tables."""
    pairs, counts = np.unique(np.stack([rows, values], axis=1), axis=0, return_counts=True)
    sigma, mean = SCALES[pairs[:, 0] // 8], (pairs[:, 0] % 8 - 4) / 8
    distance = np.abs(pairs[:, 1] - mean)
    ends = np.stack([distance - 0.5, distance + 0.5]) / sigma / math.sqrt(2)
    tails = np.vectorize(math.erfc)(ends) / 2
    return float(-(counts * np.log2(tails[0] - tails[1])).sum())


@pytest.mark.parametrize(("median", "rate"), [(0.031, 0.1), (0.06, 0.25), (0.21, 1.0), (0.71, 2.5)])
def test_overhead_over_the_ideal_gaussian_code(median: float, rate: float) -> None:
    """A picture of 768x512 with 320 channels at 1/16, in 8 streams."""
    values, rows, _ = sample(median, 320 * 32 * 48)
    ideal = gaussian_bits(values, rows)
    assert ideal / (768 * 512) == pytest.approx(rate, rel=0.15)
    streams = zip(np.split(values, 8), np.split(rows, 8), strict=True)
    size = sum(len(coder.encode(v, r, GAUSSIAN)) for v, r in streams)
    assert 8 * size <= 1.003 * ideal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("median", [0.03, 1.0, 60.0])
def test_damaged_streams(backend: str, median: float) -> None:
    """Wrong values are allowed (a checksum above finds them), any other exception is not."""
    values, rows, _ = sample(median, 400)
    data = coder.encode(values, rows, GAUSSIAN, backend=backend)
    rng = np.random.default_rng(1)
    damaged = [data[:n] for n in range(0, len(data), 7)] + [data[n:] for n in range(1, len(data), 7)]
    damaged += [data + bytes(n) for n in (1, 2, 100)] + [data + b"\xff" * n for n in (1, 2, 100)]
    damaged += [bytes(len(data)), b"\xff" * len(data), rng.bytes(len(data))]
    for _ in range(40):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for wrong in damaged:
        try:
            assert coder.decode(wrong, rows, GAUSSIAN, backend=backend).shape == rows.shape
        except CorruptError as error:
            assert "\n" not in str(error)
    for wrong in (b"", data[: len(data) // 2], data + bytes(20)):
        with pytest.raises(CorruptError):
            coder.decode(wrong, rows, GAUSSIAN, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.binary(max_size=80), stream=streams())
@settings(max_examples=200, deadline=None)
def test_foreign_data(backend: str, data: bytes, stream: tuple[np.ndarray, np.ndarray, Tables]) -> None:
    _, rows, tables = stream
    try:
        values = coder.decode(data, rows, tables, backend=backend)
    except CorruptError:
        return
    assert np.abs(values).max(initial=0) <= VALUE_LIMIT


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ([0, 0], [0]),
        ([0], [-1]),
        ([0], [len(GAUSSIAN)]),
        ([VALUE_LIMIT + 1], [0]),
        ([0.5], [0]),
        ([0], [0.0]),
        ([[0]], [[0]]),
    ],
)
def test_wrong_arguments(values: list[int], rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"values|rows"):
        coder.encode(np.array(values), np.array(rows), GAUSSIAN)


def test_backend_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIC_CODER", "python")
    assert coder.backend_info() == "python (LIC_CODER=python)"
    monkeypatch.setenv("LIC_CODER", "fortran")
    with pytest.raises(UsageError, match="LIC_CODER"):
        coder.encode(np.array([0]), np.array([100]), GAUSSIAN)


def test_torchac_forced_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder.stream.torchac_backend, "problem", lambda: "g++ not found")
    monkeypatch.setenv("LIC_CODER", "torchac")
    with pytest.raises(LicError, match=r"g\+\+ not found"):
        coder.encode(np.array([0]), np.array([100]), GAUSSIAN)
    monkeypatch.delenv("LIC_CODER")
    assert coder.backend_info().startswith("python (g++ not found), loops in ")
    assert coder.encode(np.array([0]), np.array([100]), GAUSSIAN)


@needs_torchac
def test_too_large_for_torchac(monkeypatch: pytest.MonkeyPatch) -> None:
    values, rows, _ = sample(1.0, 1000)
    data = coder.encode(values, rows, GAUSSIAN)
    monkeypatch.setattr(coder.stream, "_MAX_DECODE_BYTES", 1000)
    assert np.array_equal(coder.decode(data, rows, GAUSSIAN), values)


def three_rows() -> Tables:
    """The tables of the example in the specification of the format."""
    cdf = [
        [0, 16384, 49152, 61440, 65535, 65535],
        [0, 65530, 65535, 65535, 65535, 65535],
        [0, 20000, 40000, 60000, 65535, 65535],
    ]
    return Tables.from_arrays(
        {
            "cdf": np.array(cdf, dtype=np.uint16),
            "size": np.array([4, 2, 4], dtype=np.int32),
            "offset": np.array([-1, 0, -1], dtype=np.int32),
            "raw_bits": np.array([0, 0, 2], dtype=np.uint8),
        }
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "rows", "stream"),
    [
        ([0, 0], [1, 1], ""),
        ([0, -1, 1, 0, 5, -6], [0, 0, 0, 1, 0, 2], "51 f0 03"),
        ([0, -1, 1, 0, 5, -6, 3], [0, 0, 0, 1, 0, 2, 1], "eb b4 00 1a c0 00"),
    ],
)
def test_example_of_the_specification(backend: str, values: list[int], rows: list[int], stream: str) -> None:
    data = coder.encode(np.array(values), np.array(rows), three_rows(), backend=backend)
    assert data == bytes.fromhex(stream)
    assert coder.decode(data, np.array(rows), three_rows(), backend=backend).tolist() == values
