"""Integer tables: what they promise to the coder, and to the weights file that holds them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lic.coder import SCALES, Tables, gaussian_tables


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=40), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_pmfs_give_valid_rows(weights: list[list[float]]) -> None:
    pmfs = [np.array(w) / max(1.0, sum(w)) for w in weights]
    tables = Tables.from_pmfs(pmfs, [-3] * len(pmfs))
    for row, size in zip(tables.cdf.astype(int), tables.size, strict=True):
        assert row[0] == 0
        assert np.all(np.diff(row[: size + 1]) > 0)
        assert np.all(row[size:] == 65535)


def test_probabilities_are_those_asked_for() -> None:
    pmf = np.array([0.1, 0.2, 0.3, 0.25])
    tables = Tables.from_pmfs([pmf], [10])
    widths = np.diff(tables.cdf[0].astype(int))[:5]
    assert tables.size.tolist() == [5]
    assert tables.offset.tolist() == [10]
    assert widths / 65536 == pytest.approx([*pmf, 0.15], abs=2 / 65536)


def test_improbable_ends_go_to_the_escape() -> None:
    tables = Tables.from_pmfs([[1e-9, 1e-7, 0.5, 1e-9, 0.5, 1e-8]], [-2])
    assert tables.offset.tolist() == [0]
    assert tables.size.tolist() == [4]


@pytest.mark.parametrize("pmf", [[], [-0.1, 1.1], [0.6, 0.6], [math.nan], [math.inf], [[1.0]], np.ones(20000) / 2e4])
def test_wrong_pmfs(pmf: list[float]) -> None:
    with pytest.raises(ValueError, match="pmf"):
        Tables.from_pmfs([pmf], [0])


def test_numbers_of_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="pmf"):
        Tables.from_pmfs([[1.0]], [0, 1])
    with pytest.raises(ValueError, match="pmf"):
        Tables.from_pmfs([], [])


def test_gaussian_rows_follow_the_gaussian() -> None:
    tables = gaussian_tables()
    assert len(tables) == len(SCALES) * 8
    for index, fraction in [(0, 0), (0, 4), (20, 7), (28, 4), (29, 1)]:
        row = index * 8 + fraction
        assert tables.raw_bits[row] == 0
        sigma, mean = SCALES[index], (fraction - 4) / 8
        for symbol in range(tables.size[row] - 1):
            v = int(tables.offset[row]) + symbol
            ends = [math.erf((v + d - mean) / sigma / math.sqrt(2)) / 2 for d in (-0.5, 0.5)]
            width = int(tables.cdf[row, symbol + 1]) - int(tables.cdf[row, symbol])
            assert width / 65536 == pytest.approx(ends[1] - ends[0], abs=2 / 65536)


def test_large_scales_leave_low_bits_raw() -> None:
    tables = gaussian_tables()
    scale = np.repeat(SCALES, 8) / 2.0 ** tables.raw_bits.astype(int)
    assert np.all(scale <= 5.7)
    assert np.all(scale[tables.raw_bits > 0] > 2.8)
    assert tables.cdf.shape[1] < 50


def test_nearly_certain_rows_are_skipped() -> None:
    tables = Tables.from_pmfs([[1.0], [1 - 1e-5, 1e-5], [0.999, 0.001], [0.0]], [0, 0, 0, 0])
    assert tables.skipped.tolist() == [True, True, False, False]
    assert not Tables.from_pmfs([[1.0]], [0], raw_bits=[2]).skipped.any()


def test_arrays_round_trip() -> None:
    tables = gaussian_tables([0.2, 5.0, 300.0], fractions=2)
    copy = Tables.from_arrays(tables.to_arrays())
    for name, array in tables.to_arrays().items():
        assert np.array_equal(array, copy.to_arrays()[name])
        with pytest.raises(ValueError, match="read-only"):
            copy.to_arrays()[name][0] = 0


def damage(name: str, index: object, value: int) -> dict[str, np.ndarray]:
    arrays = {key: array.copy() for key, array in gaussian_tables([1.0, 9.0]).to_arrays().items()}
    arrays[name][index] = value
    return arrays


@pytest.mark.parametrize(
    "arrays",
    [
        damage("cdf", (0, 0), 1),
        damage("cdf", (0, 3), 0),
        damage("cdf", (0, 2), 65535),
        damage("cdf", (0, -1), 7),
        damage("size", 0, 1),
        damage("size", slice(None), 1000),
        damage("offset", 0, 2**30),
        damage("raw_bits", 0, 60),
        {},
        {**damage("size", 0, 3), "more": np.zeros(1)},
        {**damage("cdf", (0, 0), 0), "cdf": np.zeros((16, 20), dtype=np.int32)},
        {**damage("cdf", (0, 0), 0), "cdf": np.zeros(16, dtype=np.uint16)},
        {**damage("cdf", (0, 0), 0), "offset": np.zeros(3, dtype=np.int32)},
        {key: array[:0] for key, array in gaussian_tables([1.0]).to_arrays().items()},
    ],
)
def test_invalid_arrays(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="coder table"):
        Tables.from_arrays(arrays)


@pytest.mark.parametrize(("scales", "fractions"), [([], 8), ([0.0], 8), ([math.nan], 8), ([1e9], 8), ([1.0], 0)])
def test_wrong_scales(scales: list[float], fractions: int) -> None:
    with pytest.raises(ValueError, match="scales"):
        gaussian_tables(scales, fractions)
