"""Dependent quantisation: the least cost is found, all symbols come back, damage is noticed, and it pays."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import runpy
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file
from small_models import TINY, latents

from lic import coder
from lic.coder import SCALES, Decoder, Encoder, Tables, gaussian_tables
from lic.errors import CorruptError, UnsupportedError
from lic.exact import exact_arithmetic
from lic.model import dependent, store
from lic.model.codec import OF_OTHERS, CodecModel
from lic.model.context import Geometry
from lic.model.dependent import (
    BLOCK,
    FIRST_CHAINS,
    Coded,
    Dependent,
    Forgetful,
    distance,
    polynomials_of,
    trellis_of,
)
from lic.model.store import LoadedModel, ModelInfo
from lic.part import Region
from lic.pipeline import windows
from lic.pipeline.codec import Encoded, decode_rgb, decode_rgbs, encode_rgb, encode_rgbs
from lic.pipeline.distortion import DISTORTIONS
from lic.pipeline.tile import CodedTiles, Latents, Reader, Writer, code_tiles, quantised_in_steps
from lic.quality import MAX_CODE, lambda_of
from lic.train.dependent import CHAINS, TRELLIS, Statistics, ToQuantise, _fitted, fit

ROOT = Path(__file__).parent.parent
SMALL, MEDIUM, LARGE = range(0, 9), range(9, 26), range(26, 64)  # scale indices
SHARE = 6  # with FIRST_CHAINS at most one latent of a step in so many is medium
CODES = (0, 10_000, 20_000, 30_000)
BACKENDS = ["python"]
if coder.backend_info().startswith("torchac"):
    BACKENDS.append("torchac")
GAUSSIAN = gaussian_tables()
EIGHT_STATES = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]])  # those of VVC
TRELLISES = {2: np.array([[0, 1], [1, 0]]), 8: EIGHT_STATES, 128: trellis_of(0o235, 0o126), 4096: TRELLIS}
needs_loops = pytest.mark.skipif(coder.native.load()[0] is None, reason=f"coder: {coder.backend_info()}")
needs_torchac = pytest.mark.skipif("torchac" not in BACKENDS, reason=f"coder: {coder.backend_info()}")

# The hyper-latents that stand in stream 0.
Z = np.array([0, 3, -1, 0, 40])
Z_ROWS = 8 * 12 + np.arange(len(Z))

seeds = st.integers(0, 2**32 - 1)


class Step(NamedTuple):
    """What a step is coded with, all (N,), as :meth:`Dependent.choose` wants it."""

    y: np.ndarray
    scale_index: np.ndarray
    eighths: np.ndarray
    weight: np.ndarray


def step_of(random: np.random.Generator, scale_index: np.ndarray, outliers: float = 0.0) -> Step:
    """Latents as predicted, but for a share of outliers."""
    n = len(scale_index)
    eighths = random.integers(0, 8, n)
    y = (eighths - 4) / 8 + SCALES[scale_index] * random.normal(size=n)
    y = np.where(random.random(n) < outliers, y * 2.0 ** random.uniform(0, 10, n), y)
    weight = 2.0 ** random.uniform(-3, 4, n)
    return Step(y.astype(np.float32), scale_index, eighths, weight.astype(np.float32))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    random = np.random.default_rng(draw(seeds))
    least, most = sorted(draw(st.tuples(*[st.integers(0, len(SCALES) - 1)] * 2)))
    scale_index = random.integers(least, most + 1, draw(st.integers(0, 80)))
    return step_of(random, scale_index, draw(st.sampled_from([0.0, 0.1, 1.0])))


@pytest.fixture(scope="module")
def gaussian() -> Dependent:
    """Before anything is counted, but with offsets."""
    fitted = _fitted(Statistics())
    offsets = np.random.default_rng(0).uniform(-0.1, 0.1, fitted.offsets.shape)
    return replace(fitted, offsets=offsets.astype(np.float32))


# The search for the least cost


def bits_of(quantiser: Dependent, symbols: np.ndarray, q: int, i: int, j: int) -> np.ndarray:
    """Of symbols (K,) of one latent, by bitstream_spec.md 5.12."""

    def lengths(values: np.ndarray, rows: np.ndarray | int) -> np.ndarray:
        return coder.code_lengths(values, np.broadcast_to(rows, values.shape), quantiser.tables).astype(np.float64)

    if i in LARGE:
        c = 4 * (i - 26) + j // 2
        parity = symbols & 1
        return lengths(parity, 480 + c) + lengths(symbols >> 1, 632 + 4 * c + 2 * q + parity)
    return lengths(symbols, 208 + 16 * (i - 9) + 2 * j + q if i in MEDIUM else 8 * i + j)


def cost_of(quantiser: Dependent, step: Step, at: int, q: int, symbols: np.ndarray) -> np.ndarray:
    """Bits + weight·error² of symbols (K,) of one latent."""
    i, j = int(step.scale_index[at]), int(step.eighths[at])
    towards = np.where(symbols == 0, (j - 4) / 8, np.sign(symbols))
    offset = quantiser.offsets[i, q, np.minimum(np.abs(symbols), 3)] * towards
    error = step.y[at] - distance(symbols, q) - offset
    return bits_of(quantiser, symbols, q, i, j) + step.weight[at] * error**2


def least_cost(quantiser: Dependent, step: Step, chain: np.ndarray, choices: Callable[[int, int], list[int]]) -> float:
    """Of all paths through a chain of latents; ``choices`` are the symbols of a latent under a quantiser."""
    symbols = np.array([[choices(at, q) for q in (0, 1)] for at in chain])
    costs = np.array([[cost_of(quantiser, step, at, q, symbols[n, q]) for q in (0, 1)] for n, at in enumerate(chain)])
    count = symbols.shape[-1]
    chosen = np.array(list(itertools.product(range(count), repeat=len(chain))))
    state, total = np.zeros(len(chosen), int), np.zeros(len(chosen))
    for n in range(len(chain)):
        total += costs[n, state % 2, chosen[:, n]]
        state = quantiser.trellis[state, symbols[n, state % 2, chosen[:, n]] & 1]
    return float(total.min())


def chain_of_six(random: np.random.Generator, kind: range) -> tuple[Step, np.ndarray]:
    """A step with one chain, of six latents, and the places of these; the others are small."""
    scale_index = np.zeros(36, int)
    chain = np.sort(random.choice(36, 6, replace=False))
    scale_index[chain] = random.integers(kind.start, kind.stop, 6)
    return step_of(random, scale_index), chain if kind is LARGE else chain[
        np.argsort(scale_index[chain], kind="stable")
    ]


@settings(max_examples=40, deadline=None)
@given(seed=seeds, kind=st.sampled_from([MEDIUM, LARGE]))
def test_the_least_cost_of_all_paths_is_found(gaussian: Dependent, seed: int, kind: range) -> None:
    """Latents on the side of 0 where their mean is, and not too far off: no symbol beyond 2 is of any use."""
    random = np.random.default_rng(seed)
    step, chain = chain_of_six(random, kind)
    n, side = len(step.y), random.choice([-1, 1], len(step.y))
    y, weight = random.uniform(0.2, 2.5, n) * side, random.uniform(2, 16, n)
    eighths = np.where(side > 0, random.integers(4, 8, n), random.integers(0, 4, n))
    step = Step(y.astype(np.float32), step.scale_index, eighths, weight.astype(np.float32))
    chosen = gaussian.choose(*step)
    found = least_cost(gaussian, step, chain, lambda at, q: [chosen[at]])
    assert found == pytest.approx(least_cost(gaussian, step, chain, lambda at, q: [-2, -1, 0, 1, 2]), abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, kind=st.sampled_from([MEDIUM, LARGE]), outliers=st.sampled_from([0.0, 0.3]))
def test_no_path_by_the_nearest_values_costs_less(gaussian: Dependent, seed: int, kind: range, outliers: float) -> None:
    random = np.random.default_rng(seed)
    step, chain = chain_of_six(random, kind)
    step = step_of(random, step.scale_index, outliers)
    chosen = gaussian.choose(*step)

    def nearest(at: int, q: int) -> list[int]:
        """Those just below and just above, and 0."""
        symbols = int(step.y[at] / 2) + np.arange(-3, 4)
        above = int(np.argmax(distance(symbols, q) > step.y[at]))
        return [symbols[above - 1], symbols[above], 0]

    found = least_cost(gaussian, step, chain, lambda at, q: [chosen[at]])
    assert found <= least_cost(gaussian, step, chain, nearest) * (1 + 1e-5) + 1e-3


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_small_latents_are_chosen_by_themselves(gaussian: Dependent, seed: int) -> None:
    random = np.random.default_rng(seed)
    step = step_of(random, random.integers(0, SMALL.stop, 30), 0.3)
    chosen = gaussian.choose(*step)
    for at, symbol in enumerate(chosen):
        below = math.floor(step.y[at] / 2)
        found, *others = cost_of(gaussian, step, at, 0, np.array([symbol, below, below + 1, 0]))
        assert found <= min(others) + 1e-3 * (1 + abs(found))


def test_blocks_hardly_cost_more_than_one_search(gaussian: Dependent, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    step = step_of(random, random.integers(0, 40, 12 * BLOCK + 100), 0.05)

    def total() -> float:
        coded = gaussian.code(Forgetful(), step.scale_index, step.eighths, gaussian.choose(*step))
        return coded.bits + float(step.weight @ (step.y - coded.distances - coded.offsets) ** 2)

    in_blocks, chained = total(), sum(map(len, CHAINS.kinds(step.scale_index)[1:]))
    monkeypatch.setattr(dependent, "BLOCK", len(step.y))
    at_once = total()
    assert at_once * (1 - 1e-6) < in_blocks < at_once + chained / BLOCK  # one bit for each


@needs_loops
def test_compiled_loops_find_the_same_in_many_blocks(gaussian: Dependent, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(10)
    tiles = step_of(random, random.integers(0, 40, (2, 5 * BLOCK + 100)).ravel(), 0.05)
    batch = Step(*(values.reshape(2, -1) for values in tiles))
    chosen = gaussian.choose(*batch)
    assert np.array_equal(gaussian.choose(*batch, threads=3), chosen)
    monkeypatch.setenv("LIC_CODER", "python")
    for beside in (dependent.BESIDE, 3):
        monkeypatch.setattr(dependent, "BESIDE", beside)
        assert np.array_equal(gaussian.choose(*batch), chosen)


@needs_loops
@settings(max_examples=50, deadline=10_000)
@given(step=steps(), states=st.sampled_from(sorted(TRELLISES)))
def test_compiled_loops_find_the_same(gaussian: Dependent, step: Step, states: int) -> None:
    quantiser = replace(gaussian, trellis=TRELLISES[states])
    with pytest.MonkeyPatch.context() as patch:
        chosen = quantiser.choose(*step)
        passed, after = quantiser.quantisers(chosen, 1)
        patch.setenv("LIC_CODER", "python")
        assert np.array_equal(quantiser.choose(*step), chosen)
        their_quantisers, their_after = quantiser.quantisers(chosen, 1)
        assert np.array_equal(passed, their_quantisers) and after == their_after


def test_tiles_of_a_batch_are_chosen_by_themselves(gaussian: Dependent) -> None:
    random = np.random.default_rng(5)
    tiles = [step_of(random, random.integers(0, most, 700), 0.05) for most in (9, 64, 20)]
    together = gaussian.choose(*map(np.stack, zip(*tiles, strict=True)))
    assert np.array_equal(together, [gaussian.choose(*tile) for tile in tiles])


def test_errors_are_smaller_than_those_of_a_quantiser_with_as_many_bits(gaussian: Dependent) -> None:
    """At a high rate 1.53 dB are the most that any quantiser can win."""
    random = np.random.default_rng(4)
    index = 42
    step = step_of(random, np.full(4000, index))
    step = step._replace(weight=np.full(len(step.y), 0.5, np.float32))
    coded = gaussian.code(Forgetful(), step.scale_index, step.eighths, gaussian.choose(*step))
    error = float(np.mean((step.y - coded.distances) ** 2))
    bits = coded.bits / len(step.y)
    # Scalar quantisation at a high rate: entropy log2(σ·√(2πe) / step), error step² / 12.
    of_scalar = (SCALES[index] * math.sqrt(2 * math.pi * math.e) / 2**bits) ** 2 / 12
    assert 0.5 < 10 * math.log10(of_scalar / error) < 1.53


# Kinds


@settings(max_examples=200, deadline=None)
@given(steps())
def test_a_chain_goes_from_small_scales_to_large_ones(step: Step) -> None:
    scale_index = step.scale_index
    kinds = CHAINS.kinds(scale_index)
    assert sorted(np.concatenate(kinds)) == list(range(len(scale_index)))
    for places, scales in zip(kinds, (SMALL, MEDIUM, LARGE), strict=True):
        assert all(i in scales for i in scale_index[places])
    for places in (kinds.small, kinds.large):
        assert np.all(np.diff(places) > 0)
    for one, other in itertools.pairwise(kinds.medium):
        assert (scale_index[one], one) < (scale_index[other], other)


@settings(max_examples=200, deadline=None)
@given(steps())
def test_in_first_chains_the_medium_latents_are_a_share_with_the_largest_scales(step: Step) -> None:
    scale_index = step.scale_index
    small, medium, large = FIRST_CHAINS.kinds(scale_index)
    assert sorted([*small, *medium, *large]) == list(range(len(scale_index)))
    assert all(np.all(np.diff(places) > 0) for places in (small, medium, large))
    assert np.all(scale_index[large] >= 17) and np.all(scale_index[medium] >= 8)
    assert np.all(scale_index[np.concatenate([small, medium])] < 17)
    assert len(medium) <= len(scale_index) // SHARE
    assert scale_index[small].max(initial=0) < scale_index[medium].min(initial=17)
    if np.any(scale_index[small] >= 8):  # not even those of one scale more would have been few enough
        more = np.count_nonzero(scale_index[small] == scale_index[small].max())
        assert len(medium) + more > len(scale_index) // SHARE


# Coding


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LIC_CODER", request.param)
    return str(request.param)


@dataclass
class OfStep:
    """The coder of a tile at a step."""

    symbols: Writer | Reader
    stream: int
    has_stream: bool  # to itself
    is_last: bool

    def code_chain(self, rows: np.ndarray, quantiser: Dependent, values: np.ndarray | None) -> np.ndarray:
        return self.symbols.code_chain(self.stream, rows, quantiser, values)

    def code(self, rows: np.ndarray, tables: Tables, values: np.ndarray | None, *, last: bool) -> np.ndarray:
        last = last and (self.has_stream or self.is_last)
        return self.symbols.code(self.stream, rows, tables, values, last=last)


def code_steps(
    quantiser: Dependent, symbols: Writer | Reader, tile: list[Step], given: list[np.ndarray] | None, shared: bool
) -> list[Coded]:
    """A tile of these steps, each with a stream, or all in one."""
    symbols.code(0, Z_ROWS, quantiser.tables, None if given is None else Z, last=True)
    coded = []
    for n, step in enumerate(tile):
        of_step = OfStep(symbols, 1 if shared else 1 + n, not shared, n == len(tile) - 1)
        values = None if given is None else given[n]
        coded.append(quantiser.code(of_step, step.scale_index, step.eighths, values))
    return coded


def check_round_trip(quantiser: Dependent, tile: list[Step], given: list[np.ndarray], shared: bool) -> list[bytes]:
    writer = Writer()
    written = code_steps(quantiser, writer, tile, given, shared)
    read = code_steps(quantiser, Reader(tuple(writer.streams)), tile, None, shared)
    for theirs, ours, step, symbols in zip(read, written, tile, given, strict=True):
        assert np.array_equal(theirs.distances, ours.distances)
        assert np.array_equal(theirs.offsets, ours.offsets)
        assert np.array_equal(quantiser.symbols_of(theirs.distances, step.scale_index), symbols)
    return writer.streams


@settings(max_examples=60, deadline=None)
@given(tile=st.lists(steps(), min_size=1, max_size=3), shared=st.booleans(), by_choice=st.booleans())
def test_round_trip(gaussian: Dependent, tile: list[Step], shared: bool, by_choice: bool) -> None:
    """With one coder and the other: the bytes are the same."""
    given = [gaussian.choose(*step) if by_choice else np.rint(step.y / 2).astype(np.int64) for step in tile]
    streams = []
    for name in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LIC_CODER", name)
            streams.append(check_round_trip(gaussian, tile, given, shared))
    assert streams[0] == streams[-1]


def test_long_chains_with_escapes(gaussian: Dependent, backend: str) -> None:
    random = np.random.default_rng(5)
    every = np.arange(7 * BLOCK + 700)
    medium = np.where(every % 7 == 0, random.integers(9, 26, len(every)), 3)
    assert len(CHAINS.kinds(medium).medium) > BLOCK
    tile = [step_of(random, scale_index, 0.02) for scale_index in (random.integers(26, 64, 1500), medium)]
    for step in tile:
        step.y[::100] = random.choice([-1, 1], len(step.y[::100])) * 500_000
    given = [gaussian.choose(*step) for step in tile]
    assert all(np.abs(symbols).max() > 240_000 for symbols in given)
    check_round_trip(gaussian, tile, given, shared=False)


@pytest.mark.parametrize("index", [0, 12, 30, 63])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_kinds_without_latents(gaussian: Dependent, backend: str, index: int, count: int) -> None:
    step = step_of(np.random.default_rng(count), np.full(count, index))
    symbols = np.arange(count) - 2
    check_round_trip(gaussian, [step], [symbols], shared=False)
    assert gaussian.choose(*step).shape == (count,)


def test_an_empty_stream_without_chains(gaussian: Dependent, backend: str) -> None:
    """All latents are as certain as they are predicted, and none is medium."""
    nothing = np.zeros(0, np.int64)
    certain = np.flatnonzero(gaussian.tables.skipped)[:3]
    writer, reader = Writer(), Reader((b"",))
    writer.code_chain(0, nothing, gaussian, nothing)
    writer.code(0, certain, gaussian.tables, np.zeros(3, np.int64), last=True)
    assert writer.streams == [b""]
    assert reader.code_chain(0, nothing, gaussian, None).shape == (0,)
    assert not reader.code(0, certain, gaussian.tables, None, last=True).any()


@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_estimated_bits_are_those_of_the_streams(gaussian: Dependent, step: Step) -> None:
    writer = Writer()
    symbols = gaussian.choose(*step)
    (coded,) = code_steps(gaussian, writer, [step], [symbols], False)
    spent = 8 * sum(map(len, writer.streams)) - coder.ideal_bits(Z, Z_ROWS, gaussian.tables)
    deviating = np.count_nonzero(symbols[step.scale_index < LARGE.start])  # may cost less or more than estimated
    assert coded.bits - 1 - 20 * deviating < spent < coded.bits + 40 + 40 * deviating


# Symbols from integers


@settings(max_examples=100, deadline=None)
@given(step=steps())
def test_symbols_of_inverts_distances(gaussian: Dependent, step: Step) -> None:
    symbols = gaussian.choose(*step)
    coded = gaussian.code(Forgetful(), step.scale_index, step.eighths, symbols)
    assert np.array_equal(gaussian.symbols_of(coded.distances, step.scale_index), symbols)


@settings(max_examples=100, deadline=None)
@given(step=steps(), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_any_integers_become_symbols_of_those_next_to_them(gaussian: Dependent, step: Step, scale: float) -> None:
    integers = np.rint(step.y * scale).astype(np.int64)
    symbols = gaussian.symbols_of(integers, step.scale_index)
    allowed = gaussian.code(Forgetful(), step.scale_index, step.eighths, symbols).distances
    assert np.abs(allowed - integers).max(initial=0) <= 1
    assert np.all(allowed[integers == 0] == 0)
    assert np.array_equal(gaussian.symbols_of(allowed, step.scale_index), symbols)


# The coder


@st.composite
def rows_and_values(draw: st.DrawFn, most: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Places of rows in their tables, from 0 to 1, and values."""
    random = np.random.default_rng(draw(seeds))
    n = draw(st.integers(0, most))
    values = np.rint(random.normal(size=n) * draw(st.sampled_from([0.3, 2.0, 1000.0]))).astype(np.int64)
    return random.random(n), values


@settings(max_examples=100, deadline=None)
@given(stream=rows_and_values(), of_gaussian_tables=st.booleans())
def test_code_lengths_add_up(
    gaussian: Dependent, stream: tuple[np.ndarray, np.ndarray], of_gaussian_tables: bool
) -> None:
    tables = GAUSSIAN if of_gaussian_tables else gaussian.tables
    coded = np.flatnonzero(~tables.skipped)
    places, values = stream
    rows = coded[(places * len(coded)).astype(int)]
    lengths = coder.code_lengths(values, rows, tables)
    assert lengths.shape == values.shape and np.all(lengths > 0)
    of_flag = -math.log2(7 / 8) if len(values) else 0  # that no certain value deviates
    assert coder.ideal_bits(values, rows, tables) == pytest.approx(float(lengths.sum(dtype=float)) + of_flag, rel=1e-5)


def split(places: np.ndarray, values: np.ndarray, tables: Tables) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (rows, values) of three steps."""
    rows = (places * len(tables)).astype(int)
    cuts = [len(rows) // 4, len(rows) // 2]
    return list(zip(np.split(rows, cuts), np.split(values, cuts), strict=True))


def pulled(data: bytes, rows: Sequence[np.ndarray], tables: Tables, backend: str) -> list[list[int]] | None:
    """Values of the rows, pulled part by part, or None if that finds damage."""
    try:
        decoder = Decoder(data, backend=backend)
        values = [decoder.pull(part, tables).tolist() for part in rows]
        decoder.finish()
    except CorruptError:
        return None
    return values


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Cut, flipped or replaced by noise."""
    kind, at = random.integers(3), int(random.integers(max(1, len(data))))
    if kind == 0 or not data:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :]
    return random.bytes(int(random.integers(2 * len(data))))


@settings(max_examples=100, deadline=None)
@given(stream=rows_and_values(), seed=seeds)
def test_compiled_loops_read_the_same(gaussian: Dependent, stream: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    tables = gaussian.tables
    parts = split(*stream, tables)
    encoder = Encoder()
    for rows, values in parts:
        encoder.push(values, rows, tables)
    data, rows_of = encoder.finish(), [rows for rows, _ in parts]
    expected = [values.tolist() for _, values in parts]
    assert pulled(data, rows_of, tables, "auto") == expected
    assert pulled(data, rows_of, tables, "python") == expected
    damaged = mutated(data, np.random.default_rng(seed))
    assert pulled(damaged, rows_of, tables, "auto") == pulled(damaged, rows_of, tables, "python")


@pytest.mark.parametrize("backend", ["python", "auto"])
def test_chains_between_values(gaussian: Dependent, backend: str) -> None:
    random, tables = np.random.default_rng(9), gaussian.tables
    plain, chain = np.full(50, 8 * 12 + 4), 208 + 2 * random.integers(0, 136, 60)
    values = [random.integers(-1, 2, len(rows)) for rows in (plain, chain, plain, chain, plain)]
    encoder = Encoder()
    for n, its in enumerate(values):
        rows = chain + gaussian.quantisers(its)[0] if n % 2 else plain
        encoder.push(its, rows, tables)
    decoder = Decoder(encoder.finish(), backend=backend)
    for n, its in enumerate(values):
        if n % 2:
            assert np.array_equal(decoder.pull_chain(chain, tables, gaussian.trellis), its)
        else:
            assert np.array_equal(decoder.pull(plain, tables), its)
    decoder.finish()


@settings(max_examples=200, deadline=10_000)
@given(step=steps(), seed=seeds, count=st.sampled_from([0, 1, 30, 20_000]))
def test_damaged_chains(gaussian: Dependent, step: Step, seed: int, count: int) -> None:
    """They raise CorruptError or give values, however many are asked for."""
    random = np.random.default_rng(seed)
    writer = Writer()
    code_steps(gaussian, writer, [step], [gaussian.choose(*step)], False)
    data = mutated(writer.streams[1], random)
    each: list[list[int] | None] = []
    rows = 208 + 2 * random.integers(0, 136, count)
    found = []
    for backend in ("python", "auto"):
        each.append(None)
        try:
            decoder = Decoder(data, backend=backend)
            values = decoder.pull_chain(rows, gaussian.tables, gaussian.trellis)
            each[-1] = values.tolist()
            decoder.finish()
        except CorruptError:
            found.append(None)
        else:
            assert values.shape == (count,)
            found.append(values.tolist())
    assert found[0] == found[1] and each[0] == each[1]


def test_chains_that_end_too_early(gaussian: Dependent) -> None:
    random = np.random.default_rng(6)
    step = step_of(random, np.where(np.arange(1800) % 6 == 0, 14, 3), 0.1)
    writer = Writer()
    code_steps(gaussian, writer, [step], [gaussian.choose(*step)], False)
    first, second = writer.streams
    assert len(second) > 40
    unnoticed = 0
    for end in range(len(second)):
        with contextlib.suppress(CorruptError):
            code_steps(gaussian, Reader((first, second[:end])), [step], None, False)
            unnoticed += 1
    assert unnoticed < 0.1 * len(second)  # where what is left of the stream by chance has the right length


@settings(max_examples=60, deadline=10_000)
@given(tile=st.lists(steps(), min_size=1, max_size=2), shared=st.booleans(), seed=seeds, data=st.data())
def test_damaged_tiles(gaussian: Dependent, tile: list[Step], shared: bool, seed: int, data: st.DataObject) -> None:
    writer = Writer()
    code_steps(gaussian, writer, tile, [gaussian.choose(*step) for step in tile], shared)
    streams = writer.streams
    which = data.draw(st.integers(1, len(streams) - 1))
    streams[which] = mutated(streams[which], np.random.default_rng(seed))
    try:
        coded = code_steps(gaussian, Reader(tuple(streams)), tile, None, shared)
    except CorruptError:
        return
    assert [len(step.distances) for step in coded] == [len(step.y) for step in tile]


@pytest.mark.parametrize("parity", [2, -1, 1000, -100_000])
def test_a_parity_is_0_or_1(gaussian: Dependent, backend: str, parity: int) -> None:
    """In a stream that is sound but for that."""
    c = 4 * (40 - 26) + 4 // 2
    row = 632 + 4 * c + parity
    writer = Writer()
    writer.code(0, Z_ROWS, gaussian.tables, Z, last=True)
    writer.code(1, np.array([480 + c]), gaussian.tables, np.array([parity]), last=False)
    writer.code(1, np.array([row if 632 <= row < len(gaussian.tables) else 632]), gaussian.tables, Z[:1], last=True)
    step = Step(*(np.array([number]) for number in (0, 40, 4, 1)))
    with pytest.raises(CorruptError):
        code_steps(gaussian, Reader(tuple(writer.streams)), [step], None, False)


# Tables and trellises


@pytest.mark.parametrize(("h0", "h1"), [(0o5, 0o2), (0o13, 0o4), (0o155, 0o42), (0o515, 0o362), (0o13465, 0o7506)])
def test_parities_and_quantisers_satisfy_the_parity_check(gaussian: Dependent, h0: int, h1: int) -> None:
    trellis = trellis_of(h0, h1)
    assert len(trellis) == 2 ** (h0.bit_length() - 1)
    quantiser = replace(gaussian, trellis=trellis)
    parities = np.random.default_rng(h0).integers(0, 2, 500)
    quantisers, _ = quantiser.quantisers(parities)
    check = sum(
        np.convolve([h >> i & 1 for i in range(h.bit_length())], bits)[:500]
        for h, bits in ((h0, quantisers), (h1, parities))
    )
    assert not np.any(check & 1) and 0.3 < quantisers.mean() < 0.7
    assert polynomials_of(trellis) == (h0, h1)


@pytest.mark.parametrize(("h0", "h1"), [(0o12, 0o4), (0o13, 0o5), (0o13, 0o10), (0o13, 0), (1, 0)])
def test_polynomials_of_no_trellis(h0: int, h1: int) -> None:
    with pytest.raises(ValueError, match="no parity-check polynomials"):
        trellis_of(h0, h1)


def test_too_many_states_are_refused() -> None:
    with pytest.raises(ValueError, match="too many states"):
        trellis_of(0o20001, 0o2)


def test_a_trellis_without_polynomials() -> None:
    with pytest.raises(ValueError, match="polynomials"):
        polynomials_of(np.roll(EIGHT_STATES, 1, axis=0))


def test_what_is_no_trellis_is_refused(gaussian: Dependent) -> None:
    one_way = EIGHT_STATES.copy()
    one_way[3] = 0
    for trellis in (EIGHT_STATES[:, :1], EIGHT_STATES + 1, EIGHT_STATES - 1, one_way, np.zeros((0, 2), int)):
        with pytest.raises(ValueError, match="trellis"):
            replace(gaussian, trellis=trellis)


def test_more_states_cost_less(gaussian: Dependent) -> None:
    random = np.random.default_rng(6)
    step = step_of(random, random.integers(17, 30, 20_000))
    step = step._replace(weight=np.full(len(step.y), 2.0, np.float32))
    costs = []
    for trellis in (EIGHT_STATES, trellis_of(0o155, 0o42), TRELLIS):
        quantiser = replace(gaussian, trellis=trellis)
        coded = quantiser.code(Forgetful(), step.scale_index, step.eighths, quantiser.choose(*step))
        error = step.y - coded.distances - coded.offsets
        costs.append(coded.bits + float(step.weight @ error**2))
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.99 * costs[0]


def test_tables_of_other_quantisers_are_refused(gaussian: Dependent) -> None:
    with pytest.raises(ValueError, match="another quantiser"):
        Dependent(GAUSSIAN, gaussian.offsets, TRELLIS, CHAINS)
    with pytest.raises(ValueError, match="another quantiser"):
        Dependent(gaussian.tables, gaussian.offsets[:, :1], TRELLIS, CHAINS)
    certain = {name: array.copy() for name, array in gaussian.tables.to_arrays().items()}
    certain["cdf"][208], certain["size"][208], certain["offset"][208] = 65535, 2, 0
    certain["cdf"][208, :2] = 0, 65534
    raw = {name: array.copy() for name, array in gaussian.tables.to_arrays().items()}
    raw["raw_bits"][279] = 1
    for arrays in (certain, raw):
        with pytest.raises(ValueError, match="skips symbols or has raw bits"):
            Dependent(Tables.from_arrays(arrays), gaussian.offsets, TRELLIS, CHAINS)


# Models


@pytest.fixture(scope="module")
def photo(demo: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(demo[200:328, 300:428])


def written(net: CodecModel, path: Path, shared_from: ModelInfo | None = None) -> LoadedModel:
    """The model that is written and loaded again."""
    store.write_model(path, net, {"rate_range": (0.1, 2.0), "provenance": {"data": "demo.png"}}, shared_from)
    return store.load_file(store.read_info(path))


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model with the weights that a file holds today: its own file has more bits."""
    net = store.load_file(store.read_info(TINY)).net
    return written(net, tmp_path_factory.mktemp("scalar") / TINY.name)


class Fitted(NamedTuple):
    """What :func:`fit` gave the tiny model, and the model as it was written and loaded again."""

    quantiser: Dependent
    model: LoadedModel


@pytest.fixture(scope="module")
def fitted(demo: np.ndarray, scalar: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    random = np.random.default_rng(7)
    net = store.load_file(scalar.info).net
    net.quantise(None)
    latents = []
    for code in range(0, MAX_CODE, MAX_CODE // 4):
        top, left = (int(random.integers(n - 128)) for n in demo.shape[:2])
        crop = torch.from_numpy(demo[top : top + 128, left : left + 128].copy()).float() / 255 - 0.5
        latents.append(ToQuantise.of(net, crop[None], torch.tensor([float(code)])))
    found = fit(net, latents)
    assert net.dependent is found
    return Fitted(found, written(net, tmp_path_factory.mktemp("fitted") / TINY.name))


@pytest.fixture(scope="module")
def coded(fitted: Fitted, photo: np.ndarray) -> dict[int, Encoded]:
    """The photo at several qualities."""
    return {code: encode_rgb(fitted.model, photo, code) for code in CODES}


def cost(model: LoadedModel, encoded: Encoded, rgb: np.ndarray) -> float:
    """Bits + λ·error."""
    bits = 8 * sum(len(stream) for streams in encoded.container.tiles for stream in streams)
    bits += 8 * sum(len(section.data) for section in encoded.container.sections)
    error = windows.error_between(model.net, encoded.reconstruction, rgb, DISTORTIONS["psnr"])
    return bits + lambda_of(encoded.container.header.quality) * error


def test_a_weights_file_keeps_the_quantiser(fitted: Fitted, scalar: LoadedModel) -> None:
    loaded = fitted.model.net.dependent
    assert loaded is not None
    for name, array in fitted.quantiser.tables.to_arrays().items():
        assert np.array_equal(loaded.tables.to_arrays()[name], array)
    assert np.array_equal(loaded.offsets, fitted.quantiser.offsets.astype(np.float16))
    assert np.array_equal(loaded.trellis, fitted.quantiser.trellis) and loaded.chains == CHAINS
    assert loaded.offsets.any()
    assert fitted.model.y_tables.to_arrays().keys() == loaded.tables.to_arrays().keys()
    theirs, ours = scalar.info, fitted.model.info
    assert theirs.entropy_id != ours.entropy_id and theirs.synthesis_id != ours.synthesis_id


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("trellis", None, "without a trellis"),
        ("trellis", np.zeros((8, 3), np.uint8), "trellis"),
        ("trellis", np.array([0o13, 0o4], np.uint8), "no known kind"),
        ("trellis", np.array([0o13, 0o4, 0], np.uint16), "no known kind"),
        ("trellis", np.array([0o1001, 0o5], np.uint16), "no parity-check polynomials"),
        ("trellis", np.array([0o20001, 0o2], np.uint16), "too many states"),
        ("trellis", np.array([0o515, 0o362], np.uint16), "no known kind"),
        ("trellis", trellis_of(0o3755, 0o1302).astype(np.uint16), "no known kind"),
        ("trellis", np.array(3, np.uint8), "no known kind"),
        ("chain", np.array([9, 65], np.uint8), "kinds of latents"),
        ("chain", np.array([26, 9], np.uint8), "kinds of latents"),
        ("chain", np.array([9, 27], np.uint8), "tables of another quantiser"),
        ("chain", np.array([9, 26, 6], np.uint8), "no known kind"),
        ("chain", np.array([9.0, 26.0], np.float32), "no known kind"),
        ("chain", np.array(9, np.uint8), "no known kind"),
    ],
)
def test_weights_with_another_quantiser_are_refused(
    tmp_path: Path, name: str, array: np.ndarray | None, reason: str
) -> None:
    source = DATA / "models" / "tiny-chain.safetensors"
    shutil.copy(TINY, tmp_path)
    with safe_open(source, "np") as file:
        information = json.loads(file.metadata()["lic"])
    arrays = load_arrays(source)
    del arrays[name]
    if array is not None:
        arrays[name] = array
    everything = load_arrays(TINY) | arrays
    entropy, synthesis = store.identities(information["config"], information["grids"], everything)
    information |= {"entropy_id": entropy.hex(), "synthesis_id": synthesis.hex()}
    save_file(arrays, tmp_path / source.name, {"lic": json.dumps(information)})
    with pytest.raises(UnsupportedError, match=reason):
        store.load_file(store.read_info(tmp_path / source.name))


def test_what_is_coded_comes_back(fitted: Fitted, coded: dict[int, Encoded], backend: str) -> None:
    for code, encoded in coded.items():
        decoded = decode_rgb(fitted.model, encoded.container)
        assert decoded.symbols_sha256 == encoded.symbols_sha256
        assert np.abs(decoded.rgb.astype(int) - encoded.reconstruction).max() <= 1, code


def test_every_coder_writes_the_same(
    fitted: Fitted, coded: dict[int, Encoded], photo: np.ndarray, backend: str
) -> None:
    assert encode_rgb(fitted.model, photo, CODES[1]).container == coded[CODES[1]].container


def test_estimated_bits_of_pictures(coded: dict[int, Encoded]) -> None:
    for encoded in coded.values():
        streams = [stream for streams in encoded.container.tiles for stream in streams]
        assert (
            abs(8 * sum(map(len, streams)) / encoded.estimated_bits - 1)
            < 0.03 + 8 * len(streams) / encoded.estimated_bits
        )


def test_it_costs_less_than_scalar_quantisation(
    fitted: Fitted, scalar: LoadedModel, coded: dict[int, Encoded], photo: np.ndarray
) -> None:
    ratios = [
        cost(fitted.model, encoded, photo) / cost(scalar, encode_rgb(scalar, photo, code), photo)
        for code, encoded in coded.items()
    ]
    assert max(ratios) < 1.01 and np.mean(ratios) < 0.985


@pytest.mark.parametrize(("effort", "least_gain"), [(1, 0.0), (4, 0.001)])
def test_effort_costs_no_more(
    fitted: Fitted, coded: dict[int, Encoded], photo: np.ndarray, effort: int, least_gain: float
) -> None:
    gains = []
    for code in CODES:
        better = encode_rgb(fitted.model, photo, code, effort=effort)
        assert better.container.header.effort == effort
        assert decode_rgb(fitted.model, better.container).symbols_sha256 == better.symbols_sha256
        gains.append(1 - cost(fitted.model, better, photo) / cost(fitted.model, coded[code], photo))
    # Latents that stay what they were may get another filter, by what is added up in another order: then 1e-5 is lost.
    assert min(gains) >= -1e-4 and max(gains) >= least_gain


def test_errors_weigh_more_at_coarse_qualities(fitted: Fitted, scalar: LoadedModel) -> None:
    """And only with dependent quantisation; for another error than squared error always less."""
    code = torch.tensor([0.0, 5_000.0, 10_500.0, MAX_CODE])
    its, plain, tuned = (
        net.rounding_weight(code, is_squared_error)[:, 0]
        for net, is_squared_error in ((fitted.model.net, True), (scalar.net, True), (fitted.model.net, False))
    )
    times = (its / plain / 1.15).tolist()
    assert 1.2 < times[0] < 1.3 and 1 < times[1] < times[0] and times[2:] == pytest.approx([1, 1])
    assert torch.allclose(tuned, OF_OTHERS * its)


def test_without_dependence_it_is_the_scalar_model(fitted: Fitted, scalar: LoadedModel, photo: np.ndarray) -> None:
    alone = store.without_dependence(store.load_file(fitted.model.info))
    assert alone.net.dependent is None
    ours, theirs = (encode_rgb(model, photo, CODES[1]) for model in (alone, scalar))
    assert ours.container.tiles == theirs.container.tiles
    assert store.without_dependence(scalar) is scalar


def test_previews(fitted: Fitted, coded: dict[int, Encoded], photo: np.ndarray) -> None:
    container = coded[CODES[-1]].container
    groups = container.header.streams - 1
    errors = []
    for n in range(1, groups + 1):
        shown = decode_rgb(fitted.model, container, preview=n)
        assert shown.groups == (n,) and shown.all_symbols == (n == groups)
        errors.append(float(np.mean((shown.rgb.astype(float) - photo) ** 2)))
        cut = replace(container, tiles=tuple(streams[: 1 + n] for streams in container.tiles))
        for preview in (n, "auto"):
            assert np.array_equal(decode_rgb(fitted.model, cut, preview=preview).rgb, shown.rgb)
    assert errors == sorted(errors, reverse=True)
    assert np.array_equal(decode_rgb(fitted.model, container).rgb, shown.rgb)


@pytest.mark.parametrize("region", [Region(0, 0, 128, 128), Region(3, 70, 50, 9), Region(127, 127, 1, 1)])
def test_a_region_is_the_same_as_in_the_whole_picture(
    fitted: Fitted, coded: dict[int, Encoded], region: Region
) -> None:
    container = coded[CODES[2]].container
    whole = decode_rgb(fitted.model, container).rgb
    assert np.array_equal(decode_rgb(fitted.model, container, region=region).rgb, region.of(whole))


def test_pictures_together(fitted: Fitted, coded: dict[int, Encoded], photo: np.ndarray) -> None:
    containers = [encoded.container for encoded in coded.values()]
    decoded = decode_rgbs(fitted.model, containers, [8] * len(containers))
    assert [one.symbols_sha256 for one in decoded] == [encoded.symbols_sha256 for encoded in coded.values()]
    together = encode_rgbs(fitted.model, [photo, photo[::-1]], [CODES[0], CODES[2]])
    for encoded in together:
        assert decode_rgb(fitted.model, encoded.container).symbols_sha256 == encoded.symbols_sha256


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_damaged_files(fitted: Fitted, coded: dict[int, Encoded], seed: int) -> None:
    random = np.random.default_rng(seed)
    encoded = coded[random.choice(CODES)]
    container = encoded.container
    streams = list(container.tiles[0])
    which = int(random.integers(len(streams)))
    streams[which] = mutated(streams[which], random)
    if tuple(streams) == container.tiles[0]:
        return
    try:
        decoded = decode_rgb(fitted.model, replace(container, tiles=(tuple(streams),)))
    except CorruptError:
        return
    assert decoded.symbols_sha256 == encoded.symbols_sha256  # the change was in bits that nobody reads


GEOMETRY = Geometry(2, 8, 12)


def code(model: LoadedModel, known: Latents) -> tuple[CodedTiles, list[list[bytes]]]:
    writers = [Writer(), Writer()]
    coded = code_tiles(model, GEOMETRY, CODES[:2], writers, known)
    return coded, [writer.streams for writer in writers]


def weighed(model: LoadedModel, seed: int) -> Latents:
    """Two tiles of latents to be quantised."""
    z, y = latents(model.net.config, 2, (GEOMETRY.height, GEOMETRY.width), seed)
    random = torch.Generator().manual_seed(seed)
    return Latents(z, y + torch.rand(y.shape, generator=random) - 0.5, 4 * torch.rand(y.shape, generator=random))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_integers_are_coded_as_they_were_chosen(fitted: Fitted, seed: int) -> None:
    """By code_tiles from integers alone, and the same without coding."""
    net, known = fitted.model.net, weighed(fitted.model, seed)
    chosen, streams = code(fitted.model, known)
    again, same = code(fitted.model, chosen.latents)
    assert same == streams
    assert torch.equal(again.dequantised, chosen.dequantised)
    assert known.weight is not None
    with exact_arithmetic():
        found = quantised_in_steps(net, GEOMETRY, known.z, torch.tensor(CODES[:2]), known.y, known.weight)
        z_bits = net.prior.bits(known.z, torch.tensor(CODES[:2])).sum(dim=(1, 2, 3))
    assert torch.equal(found.y, chosen.latents.y)
    assert torch.equal(found.dequantised, chosen.dequantised)
    torch.testing.assert_close(found.bits + z_bits, chosen.estimated_bits)


def test_other_integers_become_those_next_to_them(fitted: Fitted) -> None:
    known = latents(fitted.model.net.config, 2, (GEOMETRY.height, GEOMETRY.width), 1)
    chosen, streams = code(fitted.model, Latents(*known))
    assert torch.equal(chosen.latents.z, known[0])
    assert 0 < (chosen.latents.y - known[1]).abs().max() <= 1
    assert code(fitted.model, chosen.latents)[1] == streams


# The script


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The script sets how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_fit_quantiser(scalar: LoadedModel, tmp_path: Path, picture: np.ndarray, one_thread: None) -> None:
    old, new, pictures = (tmp_path / name for name in ("old", "new", "pictures"))
    for folder in (old, pictures):
        folder.mkdir()
    names = "tiny", "tiny-msp", "tiny-nlaic"
    shutil.copy(scalar.info.path, old)
    for name in names[1:]:
        net = store.load_file(store.read_info(TINY.with_stem(name))).net
        written(net, old / (name + store.SUFFIX), store.read_info(old / TINY.name))
    shutil.copy(TINY, old / "stranger.safetensors")  # which shares nothing
    shutil.copy(DATA / "demo.png", pictures)
    main = runpy.run_path(str(ROOT / "scripts/fit_quantiser.py"))["main"]
    arguments = [old, new, pictures, "--base", "tiny", "--megapixels", 0.3]
    done = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.output.split() == list(names)
    assert sorted(path.stem for path in new.iterdir()) == list(names)
    models = [store.load_file(store.read_info(new / (name + store.SUFFIX))) for name in names]
    for name, model in zip(names, models, strict=True):
        before = store.load_file(store.read_info(old / (name + store.SUFFIX)))
        theirs, ours = before.net.state_dict(), model.net.state_dict()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
        assert model.info.provenance.pop("quantiser").keys() == {"date", "megapixels"}
        assert model.info.provenance == before.info.provenance and model.info.rate_range == before.info.rate_range
        assert model.info.entropy_id != before.info.entropy_id
        assert model.info.shared_from == before.info.shared_from
        assert model.net.dependent is not None
        assert np.array_equal(model.y_tables.cdf, models[0].y_tables.cdf)
        encoded = encode_rgb(model, picture, 20_000)
        assert decode_rgb(model, encoded.container).symbols_sha256 == encoded.symbols_sha256
