"""The exact entropy path: layers equal their int64 oracles, and whatever computes them, the table rows are the same."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lic import encode
from lic.coder import SCALES
from lic.container import pack, parse
from lic.errors import LicError, UnsupportedError
from lic.exact import (
    ACCUMULATOR,
    KERNELS,
    MAX_BITS,
    Depthwise,
    Fixed,
    Grid,
    Linear,
    QualityTable,
    arithmetic,
    attend,
    exact_arithmetic,
    freeze,
    known_answer,
    oracle,
    round_ste,
    tables,
    use_kernel,
)
from lic.exact.layers import divide, interpolate
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, Config
from lic.model.context import Geometry, Prediction, Unit
from lic.model.context.base import INDEX_FACTOR
from lic.model.layers import NARROW, WIDE
from lic.model.store import LoadedModel, identities, load_file, read_arrays, read_info, write_model
from lic.quality import MAX_CODE

TINY = DATA / "models" / "tiny.safetensors"
BATCHES = (1, 8, 16, 33)

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None, derandomize=True)


def exact_grid(limit: int, bits: int) -> Grid:
    grid = Grid(limit, bits)
    grid.exact = True
    return grid


def integers(random: np.random.Generator, limit: int, *shape: int, extreme: bool = False) -> np.ndarray:
    """Random integers up to a limit, or only +-limit."""
    if extreme:
        return random.choice([-limit, limit], shape)
    return random.integers(-limit, limit + 1, shape)


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x)).float()


def equal(x: torch.Tensor, expected: np.ndarray) -> bool:
    """Exactly, and x holds nothing but integers."""
    return torch.equal(x.detach().double(), torch.from_numpy(expected).double())


def linear_of(weight: np.ndarray, exponent: np.ndarray, bias: np.ndarray) -> Linear:
    """A frozen layer with these integers as weights, and this bias as it is."""
    layer = Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.weight.copy_(tensor(np.ldexp(weight.astype(np.float64), -exponent[:, None])))
    layer.bias.copy_(tensor(bias))
    layer.exponent = torch.from_numpy(exponent.astype(np.int8))
    return layer


# Rounding


@few
@given(seeds, st.integers(-20, 40))
def test_oracle_rounds_to_nearest_halves_to_even(seed: int, bits: int) -> None:
    a = integers(np.random.default_rng(seed), 1 << 30, 50) >> np.arange(50) % 31
    ties = (2 * np.arange(-9, 10) + 1) << max(bits - 1, 0)  # odd halves, if bits > 0
    for values in (a, ties[np.abs(ties) < 1 << 38]):
        expected = np.rint(np.ldexp(values.astype(np.float64), -bits))  # float64 holds all of these
        assert np.array_equal(oracle.rounded(values, bits), expected)


@few
@given(seeds, st.integers(-12, 20), st.integers(-12, 20), st.sampled_from([NARROW, WIDE, 511]), st.booleans())
def test_grid_equals_oracle(seed: int, bits_in: int, bits: int, limit: int, extreme: bool) -> None:
    random = np.random.default_rng(seed)
    x, y = integers(random, WIDE, 2, 7, 33, extreme=extreme)
    grid = exact_grid(limit, bits)
    got = grid(Fixed(tensor(x), bits_in, WIDE))
    assert (got.bits, got.limit) == (bits, limit)
    assert equal(got.x, oracle.rescale(x, bits_in, bits, limit))
    a, b = np.clip(x, -limit, limit), np.clip(y, -limit, limit)
    assert equal(grid.add(grid.wrap(tensor(a)), grid.wrap(tensor(b))).x, oracle.add(a, b, limit))
    parameter = random.normal(0, 10, 99).astype(np.float32)
    assert equal(grid.constant(torch.from_numpy(parameter)).x, oracle.constant(parameter, bits, limit))


def test_grid_rounds_halves_to_even() -> None:
    assert exact_grid(WIDE, 0)(Fixed(torch.arange(-5.0, 6.0), 1, WIDE)).x.tolist() == [
        -2,
        -2,
        -2,
        -1,
        0,
        0,
        0,
        1,
        2,
        2,
        2,
    ]


def test_straight_through_rounding_passes_the_gradient() -> None:
    x = torch.tensor([0.4, 0.5, 1.5, -2.6], requires_grad=True)
    y = round_ste(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 2, -3]
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("limit", [NARROW, WIDE])
@pytest.mark.parametrize("largest", [0.6, 0.9, 1.0, 1.1, 31.7, 600.0])
def test_calibration_takes_the_finest_unit_that_fits(limit: int, largest: float) -> None:
    grid = Grid(limit)
    grid.observing = True
    for x in (torch.tensor([0.3 * largest, -largest]), torch.zeros(3), torch.zeros(0)):
        assert grid(Fixed(x)).x is x
    grid.fit()
    seen = float(torch.tensor(largest))
    assert seen * 2.0**grid.bits <= limit < seen * 2.0 ** (grid.bits + 1)
    for extreme, bits in ((1e-6, MAX_BITS), (1e9, 0)):
        grid.largest = extreme
        grid.fit()
        assert grid.bits == bits
    given_unit = Grid(limit, bits=10)
    given_unit.observing = True
    given_unit(Fixed(torch.full((1,), 1e6)))
    given_unit.fit()
    assert given_unit.bits == 10


# Linear


@few
@given(
    seeds,
    st.sampled_from(BATCHES),
    st.sampled_from([(1, 1), (3, 5), (16, 8), (33, 17), (64, 64), (128, 24)]),
    st.integers(-4, 12),
    st.integers(-10, 14),
    st.booleans(),
    st.booleans(),
)
def test_linear_equals_oracle_with_every_kernel(
    seed: int, batch: int, size: tuple[int, int], bits_in: int, bits: int, leaky: bool, extreme: bool
) -> None:
    random = np.random.default_rng(seed)
    inputs, outputs = size
    x = integers(random, NARROW, batch, 3, inputs, extreme=extreme)
    weight = integers(random, 127, outputs, inputs, extreme=extreme)
    exponent = random.integers(-3, 15, outputs)
    room = ACCUMULATOR - 1 - NARROW * np.abs(weight).sum(axis=1)
    bias = np.ldexp(random.choice([-1, 1], outputs) * room, -(exponent + bits_in)).astype(np.float32)  # just certified
    layer = linear_of(weight, exponent, bias)
    # A limit that hides nothing, and a usual one.
    for limit in (ACCUMULATOR - 1, NARROW):
        expected = oracle.linear(x, weight, exponent, bias, bits_in, bits, limit, leaky)
        for kernel in KERNELS:
            with use_kernel(kernel), torch.no_grad():
                got = layer(Fixed(tensor(x), bits_in, NARROW), exact_grid(limit, bits), leaky)
            assert got.bits == bits and got.limit == limit
            assert equal(got.x, expected), kernel
        assert equal(layer(Fixed(tensor(x), bits_in, NARROW), exact_grid(limit, bits), leaky).x, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("inputs", [1, 64, 129])
def test_sums_may_reach_the_certificate(kernel: str, batch: int, inputs: int) -> None:
    """All inputs at the limit and of the weights' sign: every sum is +-(2**24 - 1), an odd number."""
    random = np.random.default_rng(inputs)
    weight = integers(random, 127, 8, inputs, extreme=True)
    room = ACCUMULATOR - 1 - NARROW * np.abs(weight).sum(axis=1)
    x = np.repeat(np.sign(weight[:1]) * NARROW, batch, axis=0)
    layer = linear_of(weight, np.zeros(8, np.int64), room.astype(np.float32))
    with use_kernel(kernel), torch.no_grad():
        y = layer(Fixed(tensor(x), 0, NARROW), exact_grid(ACCUMULATOR - 1, 0)).x
    assert (y[:, 0] == ACCUMULATOR - 1).all()
    assert equal(y, oracle.linear(x, weight, np.zeros(8, int), room.astype(np.float32), 0, 0, ACCUMULATOR - 1))


@pytest.mark.parametrize("excess", [0, 1])
def test_certificate_holds_up_to_the_last_integer(excess: int) -> None:
    weight = np.full((2, 64), 127)
    room = ACCUMULATOR - 1 - NARROW * 127 * 64 + excess
    layer = linear_of(weight, np.zeros(2, np.int64), np.array([0, -room], np.float32))
    v, grid = Fixed(torch.zeros(1, 64), 0, NARROW), exact_grid(WIDE, 0)
    if not excess:
        layer(v, grid)
        return
    with pytest.raises(ValueError, match="certificate"):
        layer(v, grid)


def test_weights_too_large_for_the_limit_are_refused() -> None:
    layer = linear_of(np.full((4, 256), 127), np.zeros(4, np.int64), np.zeros(4))
    layer(Fixed(torch.zeros(1, 256), 0, 511), exact_grid(WIDE, 0))
    with pytest.raises(ValueError, match="certificate"):
        layer(Fixed(torch.zeros(1, 256), 0, NARROW), exact_grid(WIDE, 0))
    with pytest.raises(ValueError, match="certificate"):  # the grid does not matter, nor what was checked before
        layer(Fixed(torch.zeros(1, 256), 0, NARROW), exact_grid(NARROW, 3))


@few
@given(seeds, st.sampled_from([(5, 3), (256, 12), (700, 4)]), st.floats(-12, 3), st.floats(-3, 8), st.booleans())
def test_freezing_changes_no_number(
    seed: int, size: tuple[int, int], weight_scale: float, bias_scale: float, leaky: bool
) -> None:
    """Also where the certificate, not the largest weight, decides the exponent."""
    random = np.random.default_rng(seed)
    layer = Linear(*size).requires_grad_(False)
    layer.weight.copy_(tensor(random.normal(0, 2.0**weight_scale, layer.weight.shape)))
    layer.bias.copy_(tensor(random.normal(0, 2.0 ** (weight_scale + bias_scale), size[1])))
    x = integers(random, NARROW, 9, size[0])
    v, grid = Fixed(tensor(x), 4, NARROW), exact_grid(WIDE, 4 - round(weight_scale))
    before = layer(v, grid, leaky).x
    for _ in range(2):
        with freeze():
            assert torch.equal(layer(v, grid, leaky).x, before)
        frozen = layer.weight.clone(), layer.exponent
        assert torch.equal(layer(v, grid, leaky).x, before)
    assert torch.equal(frozen[0], layer.weight) and frozen[1] is layer.exponent
    assert layer.exponent is not None
    weight = np.ldexp(layer.weight.double().numpy(), layer.exponent.numpy().astype(int)[:, None])
    assert np.array_equal(weight, np.rint(weight)) and np.abs(weight).max() <= 127
    expected = oracle.linear(
        x, weight.astype(np.int64), layer.exponent.numpy(), layer.bias.numpy(), 4, grid.bits, WIDE, leaky
    )
    assert equal(before, expected)


# Depthwise


@few
@given(
    seeds,
    st.sampled_from([1, 8, 33]),
    st.sampled_from([(1, 1), (1, 7), (3, 5), (4, 4)]),
    st.integers(-3, 12),
    st.integers(-10, 12),
    st.booleans(),
)
def test_depthwise_equals_oracle(
    seed: int, batch: int, shape: tuple[int, int], bits_in: int, bits: int, extreme: bool
) -> None:
    random = np.random.default_rng(seed)
    width, groups, chosen = 6, 4, slice(1, 3)
    weight = integers(random, 127, groups, 3, 3, width, extreme=extreme)
    exponent = random.integers(-3, 12, (groups, width))
    real = np.ldexp(weight.astype(np.float64), -exponent[:, None, None, :])
    x = integers(random, NARROW, batch, *shape, 2, width, extreme=extreme)
    v = Fixed(tensor(x), bits_in, NARROW)
    grouped, single = Depthwise(width, groups), Depthwise(width)
    grouped.weight.data.copy_(tensor(real))
    single.weight.data.copy_(tensor(real[1]))
    grouped.exponent = torch.from_numpy(exponent.astype(np.int8))
    single.exponent = grouped.exponent[1]
    for limit in (ACCUMULATOR - 1, WIDE):
        grid = exact_grid(limit, bits)
        expected = [
            oracle.depthwise(x[..., n, :], weight[1 + n], exponent[1 + n], bits_in, bits, limit) for n in range(2)
        ]
        for grad in (False, True):  # products or a convolution
            with torch.set_grad_enabled(grad):
                got = grouped(v, grid, chosen).x
                assert equal(got, np.stack(expected, axis=3))
                got = single(v._replace(x=v.x[..., 0, :].contiguous()), grid).x
                assert equal(got, expected[0])


@few
@given(seeds, st.floats(-12, 6))
def test_freezing_depthwise_changes_no_number(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    layer = Depthwise(5, 3).requires_grad_(False)
    layer.weight.copy_(tensor(random.normal(0, 2.0**scale, layer.weight.shape)))
    v, grid = Fixed(tensor(integers(random, NARROW, 2, 4, 3, 3, 5)), 3, NARROW), exact_grid(WIDE, 3 - round(scale))
    before = layer(v, grid, slice(0, 3)).x
    with freeze():
        assert torch.equal(layer(v, grid, slice(0, 3)).x, before)
    frozen = layer.weight.clone()
    with freeze():
        assert torch.equal(layer(v, grid, slice(0, 3)).x, before)
    assert torch.equal(layer.weight, frozen)


# Quality, division


@few
@given(seeds, st.sampled_from([2, 5, 17]), st.sampled_from([WIDE, 1 << 30]), st.booleans())
def test_interpolation_equals_oracle(seed: int, knots: int, limit: int, extreme: bool) -> None:
    """Integers of activations, and those of the units' tables."""
    random = np.random.default_rng(seed)
    spacing = MAX_CODE // (knots - 1)
    table = integers(random, limit, knots, 7, extreme=extreme)
    code = np.concatenate([random.integers(0, MAX_CODE + 1, 20), np.arange(knots) * spacing, [1, MAX_CODE - 1]])
    expected = oracle.interpolate(table, code, spacing)
    assert equal(interpolate(torch.from_numpy(table), torch.from_numpy(code), spacing), expected)
    if limit == WIDE:
        layer = QualityTable(knots, 7).requires_grad_(False)
        layer.table.copy_(tensor(table / 2**6))
        got = layer.fixed(torch.from_numpy(code), exact_grid(WIDE, 6))
        assert got.bits == 6 and equal(got.x, expected)


@few
@given(st.lists(st.tuples(st.integers(1 - ACCUMULATOR, ACCUMULATOR - 1), st.integers(1, 1 << 15)), min_size=1))
def test_division_equals_oracle(pairs: list[tuple[int, int]]) -> None:
    n, d = np.array(pairs).T
    n = np.concatenate([n, d * 7, d * 3 + d // 2, d * 3 - d // 2, -d * 3 + (d + 1) // 2])
    d = np.resize(d, n.shape)
    got = divide(torch.from_numpy(n).double(), torch.from_numpy(d).double())
    assert equal(got, oracle.divide(n, d))


# Attention


@few
@given(
    seeds,
    st.sampled_from(BATCHES),
    st.sampled_from([(1, 1, 8), (5, 3, 16), (16, 16, 32), (1, 64, 32)]),
    st.integers(4, 9),
    st.booleans(),
    st.booleans(),
)
def test_attention_equals_oracle_with_every_kernel(
    seed: int, batch: int, size: tuple[int, int, int], bits: int, masked: bool, extreme: bool
) -> None:
    random = np.random.default_rng(seed)
    queries, keys, width = size
    q = integers(random, 511, batch, 2, queries, width, extreme=extreme)
    k = integers(random, 511 if extreme else 90, batch, 2, keys, width, extreme=extreme)
    v = integers(random, 511, batch, 2, keys, width, extreme=extreme)
    bias = random.normal(0, 2, (2, queries, keys)).astype(np.float32)
    mask = random.random((queries, keys)) < 0.6 if masked else None
    if mask is not None:
        mask[:, random.integers(keys)] = True
    expected = oracle.attend(q, k, v, bits, bits - 1, bias, mask)
    parts = Fixed(tensor(q), bits, 511), Fixed(tensor(k), bits - 1, 511), Fixed(tensor(v), 3, 511)
    rest = torch.from_numpy(bias), None if mask is None else torch.from_numpy(mask), True
    for kernel in KERNELS:
        with use_kernel(kernel), torch.no_grad():
            got = attend(*parts, *rest)
        assert (got.bits, got.limit) == (3, 511)
        assert equal(got.x, expected), kernel
    assert equal(attend(*parts, *rest).x, expected)
    assert np.abs(expected).max() <= 511


def test_masked_keys_have_no_weight() -> None:
    """Not even where their logits are by far the largest."""
    ones = torch.ones(1, 8)
    q, k = Fixed(511 * ones, 4, 511), Fixed(torch.cat([-511 * ones, 511 * ones, -511 * ones]), 4, 511)
    v = Fixed(torch.tensor([[40.0], [-500.0], [60.0]]).expand(3, 8), 3, 511)
    mask, bias = torch.tensor([True, False, True]), torch.tensor([[0.0, 90.0, 0.0]])
    assert attend(q, k, v, bias, None, True).x.unique().tolist() == [-500]
    assert attend(q, k, v, bias, mask, True).x.unique().tolist() == [50]


@pytest.mark.parametrize("exact", [True, False])
def test_attention_refuses_sums_that_could_overflow(exact: bool) -> None:
    def limits(width: int, keys: int) -> None:
        q, k = Fixed(torch.zeros(1, 1, width), 5, 511), Fixed(torch.zeros(1, keys, width), 5, 511)
        attend(q, k, k, torch.zeros(1, keys), None, exact)

    limits(64, 64)  # 511² · 64 and 512 · 511 · 64 are just below 2**24
    for width, keys in ((65, 64), (64, 65)):
        if exact:
            with pytest.raises(ValueError, match="certificate"):
                limits(width, keys)
        else:
            limits(width, keys)


# Units


@few
@given(seeds, st.booleans())
def test_units_equal_oracle(seed: int, extreme: bool) -> None:
    random = np.random.default_rng(seed)
    m = 50
    log2 = integers(random, 12 << 12, 2, m)  # 2**-12 to 2**12 quantiser steps
    index = integers(random, 200 << 24, 2, m)
    unit = Unit.integer(torch.from_numpy(log2), torch.from_numpy(index))
    for got, power in ((unit.steps, oracle.power(log2)), (unit.inverse, oracle.power(-log2))):
        assert equal(got, np.ldexp(power.mantissa.astype(np.float64), power.exponent))
    y = integers(random, 1 << 17, 2, 9, m, extreme=extreme) >> random.integers(0, 18, (2, 9, m))
    features = unit.of(slice(0, m)).features(tensor(y))
    assert (features.bits, features.limit) == (7, NARROW)
    assert equal(features.x, oracle.features(y, log2[:, None]))
    assert np.abs(oracle.features(y, log2[:, None])).max() <= NARROW
    answer = integers(random, WIDE, 2, 9, 2 * m, extreme=extreme)
    answer[0] >>= 8
    got = unit.of(slice(0, m)).prediction(Fixed(tensor(answer), 10, WIDE))
    for mine, expected in zip(got, oracle.prediction(answer, log2[:, None], index[:, None]), strict=True):
        assert mine.dtype == torch.float32
        assert equal(mine, expected)


def test_extreme_answers_stay_in_the_tables() -> None:
    unit = Unit.integer(torch.tensor([[20 << 12]]), torch.tensor([[1 << 30]])).of(slice(0, 1))
    for sign in (1, -1):
        p = unit.prediction(Fixed(sign * torch.full((1, 1, 2), float(WIDE)), 10, WIDE))
        assert p.eighths.item() == sign * (1 << 20)
        assert p.scale_index.item() == (len(SCALES) - 1 if sign > 0 else 0)


def test_constants_of_the_specification() -> None:
    assert INDEX_FACTOR == oracle.INDEX_FACTOR == 133144
    np.testing.assert_allclose(SCALES, 0.11 * (256 / 0.11) ** (np.arange(64) / 63), rtol=1e-12)


def test_tables_are_far_from_ties_and_never_change() -> None:
    """Floating point that errs by less than 1e-5, a million times what it does, rounds every entry alike."""
    values = oracle.table_values()
    for name, margin, total, digest in (
        ("EXP", "0.00148", 16629, "b78b5697d2ef7a2a020d25fd89461a1b597d36668204936ebb3498ad4e295d90"),
        ("LOG", "0.0000144", 8174545, "8cbe68c794a7f3ed8822655df14dde305593599fc8adf4128e4649a5fc6e2c7e"),
        ("EXP2", "0.0000759", 96809401, "ca201d233fd6ac4e97de88d1a2b391daa8a6baa9e7cd2518f1ec10f9d573e821"),
    ):
        table = getattr(tables, name)
        assert [int(v.to_integral_value()) for v in values[name]] == table.tolist()
        assert min(abs(abs(v - v.to_integral_value()) - Decimal("0.5")) for v in values[name]) > Decimal(margin)
        assert table.sum() == total
        assert hashlib.sha256(table.astype("<i8").tobytes()).hexdigest() == digest


# Gradients


def grads(loss: Callable[[], torch.Tensor], *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Of a random projection, with respect to leaves."""
    for p in parameters:
        p.grad = None
    y = loss()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [p.grad for p in parameters if p.grad is not None]


def assert_learns(
    layer: Callable[[], torch.Tensor], real: Callable[[], torch.Tensor], *parameters: torch.Tensor
) -> None:
    """With gradients the numbers are the same as without; gradients are close to those in floating point."""
    with torch.no_grad():
        expected = layer()
    assert torch.equal(layer().detach(), expected)
    exact, floating = grads(layer, *parameters), grads(real, *parameters)
    assert len(exact) == len(floating) == len(parameters)
    for mine, other in zip(exact, floating, strict=True):
        assert mine.isfinite().all()
        similarity = torch.cosine_similarity(mine.double().flatten(), other.double().flatten(), dim=0)
        assert mine.abs().sum() > 0 and similarity > 0.98


def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).requires_grad_()


@pytest.mark.parametrize("leaky", [False, True])
def test_linear_learns(leaky: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, 10), leaf(7, 24)
    real, narrow, wide = Grid(WIDE), exact_grid(NARROW, 7), exact_grid(WIDE, 12)
    assert_learns(
        lambda: layer(narrow(Fixed(x)), wide, leaky).x / 2.0**12,
        lambda: layer(Fixed(x), real, leaky).x,
        x,
        layer.weight,
        layer.bias,
    )


def test_depthwise_learns() -> None:
    layer, x = Depthwise(6, 2), leaf(1, 5, 4, 2, 6)
    torch.nn.init.normal_(layer.weight)
    real, narrow, wide = Grid(WIDE), exact_grid(NARROW, 7), exact_grid(WIDE, 10)
    groups = slice(0, 2)
    assert_learns(
        lambda: layer(narrow(Fixed(x)), wide, groups).x / 2.0**10,
        lambda: layer(Fixed(x), real, groups).x,
        x,
        layer.weight,
    )


def test_quality_table_learns() -> None:
    layer, code = QualityTable(5, 6), torch.tensor([0, 100, 30_000, 50_000])
    torch.nn.init.normal_(layer.table)
    assert_learns(lambda: layer.fixed(code, exact_grid(WIDE, 12)).x / 2.0**12, lambda: layer(code), layer.table)


def test_attention_learns() -> None:
    q, k, v, bias = leaf(2, 5, 16), leaf(2, 6, 16), leaf(2, 6, 16), leaf(5, 6)
    grid = exact_grid(511, 7)
    mask = torch.ones(5, 6, dtype=torch.bool).tril(1)

    def run(exact: bool) -> torch.Tensor:
        parts = [grid(Fixed(t)) if exact else Fixed(t) for t in (q, k, v)]
        return attend(*parts, bias, mask, exact).x / (2.0**7 if exact else 1)

    assert_learns(lambda: run(True), lambda: run(False), q, k, v, bias)


def test_features_and_predictions_learn() -> None:
    log2, index = torch.tensor([[5000, -3000, 12000]]), torch.tensor([[20 << 24, 30 << 24, 40 << 24]])
    unit = Unit.integer(log2, index).of(slice(0, 3))
    y = leaf(1, 11, 3, scale=4).round().detach().requires_grad_()
    real = Unit.real(2.0 ** (log2 / 4096)[:, None])
    assert_learns(lambda: unit.features(y).x / 2.0**7, lambda: real.features(y).x, y)
    answer = leaf(1, 11, 6)
    grid = exact_grid(WIDE, 10)

    def run(exact: bool) -> torch.Tensor:
        p = unit.prediction(grid(Fixed(answer))) if exact else Prediction(8 * answer[..., :3] * real.steps, answer)
        scale = p.scale_index if exact else answer[..., 3:] / float(np.log(SCALES[1] / SCALES[0]))
        return torch.cat([p.eighths, scale], dim=-1)

    assert_learns(lambda: run(True), lambda: run(False), answer)


# Arithmetic of the machine


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has older switches")
def test_exact_arithmetic_restores_the_settings() -> None:
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            set_to = [switch.fp32_precision for switch in switches]
            with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), exact_arithmetic():
                assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                raise KeyError
            assert [switch.fp32_precision for switch in switches] == set_to
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process: no device has passed the known-answer test."""
    monkeypatch.setattr(arithmetic, "_fallback", {})
    monkeypatch.delenv("LIC_EXACT_KERNEL", raising=False)
    yield monkeypatch


CPU = torch.device("cpu")


def break_sums(monkeypatch: pytest.MonkeyPatch, *kinds: torch.dtype) -> None:
    """Matrix products of these types come out wrong by one."""
    right = torch.nn.functional.linear

    def wrong(x: torch.Tensor, *arguments: torch.Tensor | None) -> torch.Tensor:
        return right(x, *arguments) + (x.dtype in kinds)

    monkeypatch.setattr(torch.nn.functional, "linear", wrong)


def test_known_answer_passes_here(untested: pytest.MonkeyPatch) -> None:
    known_answer(CPU)
    assert arithmetic.selected_kernel(CPU) == "float32"
    break_sums(untested, torch.float32, torch.float64)
    known_answer(CPU)  # once a process


def test_float64_replaces_broken_float32(untested: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    break_sums(untested, torch.float32)
    with caplog.at_level("INFO", logger="lic"):
        known_answer(CPU)
    assert arithmetic.selected_kernel(CPU) == "float64"
    assert "float64" in caplog.text
    layer = linear_of(np.array([[3, 4]]), np.zeros(1, np.int64), np.array([5]))
    with torch.no_grad():
        assert layer(Fixed(torch.tensor([[10.0, 100.0]]), 0, NARROW), exact_grid(WIDE, 0)).x.item() == 435


def test_a_machine_without_exact_sums_is_refused(untested: pytest.MonkeyPatch) -> None:
    break_sums(untested, torch.float32, torch.float64)
    with pytest.raises(LicError, match="cannot code"):
        known_answer(CPU)


def test_kernel_from_the_environment(untested: pytest.MonkeyPatch) -> None:
    untested.setenv("LIC_EXACT_KERNEL", "int8")
    assert arithmetic.selected_kernel(CPU) == "int8"
    with use_kernel("float64"):
        assert arithmetic.selected_kernel(CPU) == "float64"
    untested.setenv("LIC_EXACT_KERNEL", "float16")
    with pytest.raises(LicError, match="LIC_EXACT_KERNEL"):
        arithmetic.selected_kernel(CPU)


# Whole models


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_file(read_info(TINY))


def latents(config: Config, batch: int, shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """z, y and quality codes: different latents, some far beyond any picture's."""
    random = np.random.default_rng(seed)
    h, w = shape
    z = np.clip(np.rint(random.normal(0, 5, (batch, h // 4, w // 4, config.hyper_latent))), -63, 63)
    spread = 2.0 ** random.uniform(-2, 6, (batch, h, w, 1))
    y = np.rint(random.laplace(0, 1, (batch, h, w, config.latent)) * spread)
    y.flat[::97] *= 1000
    code = random.integers(0, MAX_CODE + 1, batch)
    code[0] = (0, MAX_CODE)[seed % 2]
    return tensor(z), tensor(y), torch.from_numpy(code)


def rows(net: CodecModel, z: torch.Tensor, y: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), exact_arithmetic():
        return torch.stack(net.predict(z, y, code))


def stepwise(net: CodecModel, z: torch.Tensor, y: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """As files are coded: group after group."""
    geometry = Geometry(*y.shape[:3])
    schedule, result = net.context.schedule, torch.empty(2, *y.shape)
    with torch.no_grad(), exact_arithmetic():
        state = net.context.start(net.h_s(z, code), geometry, code, net.unit(code))
        for step in range(schedule.steps(geometry)):
            for whole, part in zip(result, net.context.predict(state, step), strict=True):
                schedule.put(whole, step, part)
            state = net.context.observe(state, step, schedule.take(y, step))
    return result


@pytest.mark.parametrize("how", [rows, stepwise])
def test_rows_do_not_depend_on_the_batch(tiny: LoadedModel, how: Callable[..., torch.Tensor]) -> None:
    z, y, code = latents(tiny.net.config, max(BATCHES), (8, 12))
    alone = torch.cat([how(tiny.net, z[i : i + 1], y[i : i + 1], code[i : i + 1]) for i in range(len(z))], dim=1)
    assert len(alone[0].unique()) > 100 and len(alone[1].unique()) == len(SCALES)
    for batch in BATCHES:
        assert torch.equal(how(tiny.net, z[:batch], y[:batch], code[:batch]), alone[:, :batch])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of mkldnn.flags itself
def test_rows_do_not_depend_on_kernel_threads_or_library(tiny: LoadedModel) -> None:
    given_latents = latents(tiny.net.config, 8, (12, 20), seed=1)
    expected = rows(tiny.net, *given_latents)
    threads = torch.get_num_threads()
    for kernel in KERNELS:
        with use_kernel(kernel):
            assert torch.equal(rows(tiny.net, *given_latents), expected), kernel
            assert torch.equal(stepwise(tiny.net, *given_latents), expected), kernel
    try:
        torch.set_num_threads(2)
        assert torch.equal(rows(tiny.net, *given_latents), expected)
    finally:
        torch.set_num_threads(threads)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(rows(tiny.net, *given_latents), expected)
        assert torch.equal(stepwise(tiny.net, *given_latents), expected)
    with torch.enable_grad():  # as in training
        p = tiny.net.predict(*given_latents)
        assert torch.equal(torch.stack(p).detach(), expected)


def assert_follows_specification(net: CodecModel, path: Path, shape: tuple[int, int], seed: int) -> None:
    """Rows of the network equal those of the oracle, which reads the weights file on its own."""
    info = read_info(path)
    model = oracle.Model(read_arrays(info), net.config.context, info.grids)
    z, y, code = latents(net.config, 1, shape, seed)
    expected = model.predict(z[0].long().numpy(), y[0].long().numpy(), int(code))
    for how in (rows, stepwise):
        assert equal(how(net, z, y, code)[:, 0], np.stack(expected))


@pytest.mark.parametrize("seed", [0, 1])
def test_whole_model_follows_the_specification(tiny: LoadedModel, seed: int) -> None:
    assert_follows_specification(tiny.net, TINY, (12, 20), seed)


def test_other_models_follow_the_specification(tmp_path: Path) -> None:
    """Three slices, several mixers with windows that do not fit, strong weights everywhere; through a weights file."""
    torch.manual_seed(5)
    config = replace(
        CONFIGS["tiny"],
        name="odd",
        latent=24,
        knots=3,
        context={"slices": [4, 8, 12], "width": 32, "heads": 4, "mixers": 3, "window": 4},
    )
    net = CodecModel(config).eval().requires_grad_(False)
    for parameter in [*net.context.parameters(), *net.h_s.parameters()]:
        parameter.add_(torch.randn_like(parameter) * 0.1)
    net.sigma.copy_(torch.rand(config.latent) / 100 + 0.01)
    with net.calibration():
        z, y, code = latents(config, 2, (12, 20))
        net.predict(z, y, code)
    net.freeze()
    path = tmp_path / "odd.safetensors"
    write_model(path, net, {"provenance": {}})
    loaded = load_file(read_info(path)).net
    given_latents = latents(config, 2, (12, 20), seed=3)
    assert torch.equal(rows(loaded, *given_latents), rows(net, *given_latents))
    assert_follows_specification(loaded, path, (20, 12), seed=2)


# Refused weights files


def changed(target: Path, change: Callable[[dict[str, np.ndarray], dict], None], consistent: bool = True) -> Path:
    """Write the tiny model with changed arrays and metadata, its identity made anew if ``consistent``."""
    arrays = read_arrays(read_info(TINY))
    length = int.from_bytes(TINY.read_bytes()[:8], "little")
    meta = json.loads(json.loads(TINY.read_bytes()[8 : 8 + length])["__metadata__"]["lic"])
    change(arrays, meta)
    if consistent:
        entropy_id, synthesis_id = identities(meta["config"], meta["grids"], arrays)
        meta |= {"entropy_id": entropy_id.hex(), "synthesis_id": synthesis_id.hex()}
    save_file(arrays, target, {"lic": json.dumps(meta)})
    return target


def large_exponent(arrays: dict[str, np.ndarray], meta: dict) -> None:
    row = int(np.argmax(np.abs(arrays["h_s.first.bias"])))
    arrays["h_s.first.weight.exponent"][row] = 60


def large_bias(arrays: dict[str, np.ndarray], meta: dict) -> None:
    arrays["context.head.1.bias"][3] = -1e6


def transposed(arrays: dict[str, np.ndarray], meta: dict) -> None:
    arrays["h_s.first.weight"] = np.ascontiguousarray(arrays["h_s.first.weight"].T)


def no_exponents(arrays: dict[str, np.ndarray], meta: dict) -> None:
    del arrays["context.cross.0.attention.q.weight.exponent"]


def no_array(arrays: dict[str, np.ndarray], meta: dict) -> None:
    del arrays["context.group"]


def no_units(arrays: dict[str, np.ndarray], meta: dict) -> None:
    del arrays["units.log2"]


def no_grid(arrays: dict[str, np.ndarray], meta: dict) -> None:
    del meta["grids"]["h_s.psi"]


def too_many_grids(arrays: dict[str, np.ndarray], meta: dict) -> None:
    meta["grids"]["h_s.more"] = 3


def wide_windows(arrays: dict[str, np.ndarray], meta: dict) -> None:
    meta["config"]["window"] = 9  # 81 keys: too many for attention
    arrays["context.inner.0.bias"] = np.zeros((17 * 17, 2), np.float32)


def other_system(arrays: dict[str, np.ndarray], meta: dict) -> None:
    meta["config"]["system"] = "unheard-of"


REFUSED = [
    large_exponent,
    large_bias,
    transposed,
    no_exponents,
    no_array,
    no_units,
    no_grid,
    too_many_grids,
    wide_windows,
    other_system,
]


@pytest.mark.parametrize("change", REFUSED)
def test_weights_that_cannot_be_exact_are_refused(tmp_path: Path, change: Callable[..., None]) -> None:
    path = changed(tmp_path / "tiny.safetensors", change)
    with pytest.raises(UnsupportedError, match="damaged or incompatible weights"):
        load_file(read_info(path))


def test_unchanged_copy_of_weights_is_accepted(tmp_path: Path, tiny: LoadedModel) -> None:
    path = changed(tmp_path / "tiny.safetensors", lambda arrays, meta: None)
    given_latents = latents(tiny.net.config, 1, (4, 4))
    assert torch.equal(rows(load_file(read_info(path)).net, *given_latents), rows(tiny.net, *given_latents))


def one_weight(arrays: dict[str, np.ndarray], meta: dict) -> None:
    arrays["context.head.0.weight"][0, 0] ^= 1


def one_grid(arrays: dict[str, np.ndarray], meta: dict) -> None:
    meta["grids"]["context.wide"] += 1


def one_unit(arrays: dict[str, np.ndarray], meta: dict) -> None:
    arrays["units.index"][0, 0] += 1


@pytest.mark.parametrize("change", [one_weight, one_grid, one_unit])
def test_the_identity_covers_everything_exact(tmp_path: Path, change: Callable[..., None]) -> None:
    path = changed(tmp_path / "tiny.safetensors", change, consistent=False)
    with pytest.raises(UnsupportedError, match="identity"):
        load_file(read_info(path))


def test_refused_weights_are_one_line_and_exit_code_4(
    tmp_path: Path, lic: Run, tiny: LoadedModel, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    info = read_info(changed(models / "tiny.safetensors", large_exponent))
    coded = parse(encode(picture, quality=10, model="tiny"))
    header = replace(coded.header, entropy_id=info.entropy_id, synthesis_id=info.synthesis_id)
    (tmp_path / "in.lic").write_bytes(pack(replace(coded, header=header)))
    monkeypatch.setenv("LIC_MODELS", str(models))
    run = lic("decode", "in.lic", "out.png")
    assert run.returncode == 4
    assert run.stdout == b"" and not (tmp_path / "out.png").exists()
    assert len(run.stderr.splitlines()) == 1 and b"out of range" in run.stderr


@pytest.mark.parametrize("bits", [1000, -1, 1.5, None])
def test_units_of_activations_are_checked(tmp_path: Path, bits: object) -> None:
    path = changed(tmp_path / "tiny.safetensors", lambda arrays, meta: meta["grids"].update({"h_s.psi": bits}))
    with pytest.raises(UnsupportedError, match="units"):
        load_file(read_info(path))


def test_rows_of_zeros_freeze() -> None:
    layer = Linear(4, 2).requires_grad_(False)
    layer.weight.zero_()
    layer.bias.fill_(3.0)
    with freeze():
        assert layer(Fixed(torch.ones(1, 4), 8, NARROW), exact_grid(WIDE, 10)).x.tolist() == [[3072, 3072]]


def test_masked_keys_have_no_weight_below_any_logit() -> None:
    q = Fixed(torch.full((1, 32), 511.0), 1, 511)
    k = Fixed(torch.cat([torch.full((1, 32), -511.0), torch.zeros(1, 32)]), 2, 511)
    v = Fixed(torch.tensor([[100.0], [-100.0]]).expand(2, 32), 3, 511)
    assert attend(q, k, v, torch.zeros(1, 2), torch.tensor([True, False]), True).x.unique().tolist() == [100]
    with pytest.raises(ValueError, match="coarse"):
        attend(q._replace(bits=0), k, v, torch.zeros(1, 2), None, True)


def test_kernel_of_a_device_without_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_fallback", {})
    monkeypatch.setattr(arithmetic, "_sums_are_exact", lambda device: arithmetic._kernel == "float64")
    known_answer(torch.device("cuda"))
    assert arithmetic.selected_kernel(torch.device("cuda:0")) == "float64"


def test_a_program_that_has_set_the_precision_itself() -> None:
    code = (
        "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from lic.exact import exact_arithmetic\n"
        "with exact_arithmetic(): pass\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refusal_of_weights_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as error:
        load_file(read_info(changed(tmp_path / "tiny.safetensors", no_array)))
    assert "\n" not in str(error.value)


def test_frozen_layer_learns_twice() -> None:
    layer = Linear(4, 2)
    v, grid = Fixed(torch.ones(1, 4), 0, NARROW), exact_grid(WIDE, 4)
    with torch.no_grad(), freeze():
        layer(v, grid)
    for _ in range(2):
        layer(v, grid).x.sum().backward()
