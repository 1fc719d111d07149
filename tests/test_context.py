"""The contract that every context model keeps: steps with cached state equal all at once, and nothing looks ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lic.exact import Fixed
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, Config
from lic.model.context import SYSTEMS, Geometry, Unit, make_context

GEOMETRY = Geometry(2, 12, 20)  # 6 x 10 cells: more than one window each way, and not a multiple of it


OPTIONS: dict[str, dict[str, Any]] = {  # of a small model of each system
    "groupedmixer": dict(CONFIGS["tiny"].context),
    "econtextformer": {"segments": [8, 16, 24], "order": "spatial", "width": 32, "heads": 2, "layers": 2, "window": 4},
    "hyperprior": {"width": 24},
    "msp": {"levels": 2, "slices": [16, 32], "width": 24, "depth": 1},
    "nlaic": {"slices": [16, 32], "filters": 8, "features": 8, "widths": [16, 24]},
}


def config_of(system: str) -> Config:
    return replace(CONFIGS["tiny"], system=system, context=OPTIONS[system])


def random_context(system: str, exact: bool):
    """A context model with random weights in all its layers, and inputs for it; in float64 unless exact."""
    torch.manual_seed(3)
    config = config_of(system)
    net = CodecModel(config).eval().requires_grad_(False)
    for parameter in [*net.context.parameters(), *net.h_s.parameters()]:
        parameter.add_(torch.randn_like(parameter) * 0.1)
    net.sigma.copy_(torch.rand(config.latent) / 100 + 0.01)
    shape = (GEOMETRY.batch, GEOMETRY.height, GEOMETRY.width)
    z = torch.round(torch.randn(shape[0], shape[1] // 4, shape[2] // 4, config.hyper_latent) * 3)
    y_hat = torch.round(torch.randn(*shape, config.latent) * 3)
    code = torch.tensor([1000, 40000])
    if exact:
        with net.calibration():
            net.predict(z, y_hat, code)
        net.freeze()
        return net.context, net.h_s(z, code), y_hat, code, net.unit(code)
    psi = Fixed(torch.randn(*shape, config.psi, dtype=torch.float64))
    unit = Unit.real(torch.rand(GEOMETRY.batch, config.latent, dtype=torch.float64) + 0.5)
    return net.context.double(), psi, y_hat.double(), code, unit


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("system", SYSTEMS)
def test_steps_with_cache_equal_teacher(system: str, exact: bool) -> None:
    context, psi, y_hat, code, unit = random_context(system, exact)
    whole = context.teacher(psi, y_hat, code, unit)
    state = context.start(psi, GEOMETRY, code, unit)
    for step in range(context.schedule.steps(GEOMETRY)):
        for got, all_of_it in zip(context.predict(state, step), whole, strict=True):
            expected = context.schedule.take(all_of_it, step)
            if exact:
                assert torch.equal(got, expected)
            else:  # in floating point the order of sums differs with the shapes
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        state = context.observe(state, step, context.schedule.take(y_hat, step))


@pytest.mark.parametrize("system", SYSTEMS)
def test_later_symbols_never_reach_earlier_parameters(system: str) -> None:
    context, psi, y_hat, code, unit = random_context(system, exact=True)
    before = context.teacher(psi, y_hat, code, unit)
    steps = context.schedule.steps(GEOMETRY)
    step_of = torch.empty_like(y_hat)
    for step in range(steps):
        context.schedule.put(step_of, step, torch.full_like(context.schedule.take(y_hat, step), step))
    for first_changed in range(steps):
        changed = torch.where(step_of >= first_changed, y_hat + torch.randint_like(y_hat, -5, 6), y_hat)
        after = context.teacher(psi, changed, code, unit)
        differs = (after.eighths != before.eighths) | (after.scale_index != before.scale_index)
        reached = set(step_of[differs].unique().int().tolist())
        assert reached == set(range(first_changed + 1, steps))  # nothing earlier, and every later step sees it


@pytest.mark.parametrize("system", SYSTEMS)
def test_schedule_covers_every_latent_once(system: str) -> None:
    schedule = make_context(config_of(system)).schedule
    shape = (1, 8, 12, CONFIGS["tiny"].latent)
    seen = torch.zeros(shape)
    y = torch.randn(shape)
    copy = torch.zeros(shape)
    for step in range(schedule.steps(Geometry(1, 8, 12))):
        schedule.put(seen, step, schedule.take(seen, step) + 1)
        schedule.put(copy, step, schedule.take(y, step))
    assert torch.equal(seen, torch.ones(shape))
    assert torch.equal(copy, y)


def test_state_shapes_are_as_listed() -> None:
    context, psi, _, code, unit = random_context("groupedmixer", exact=True)
    options = CONFIGS["tiny"].context
    state = context.start(psi, GEOMETRY, code, unit)
    context.predict(state, 0)
    groups = 4 * len(options["slices"])
    cells = (GEOMETRY.batch, GEOMETRY.height // 2, GEOMETRY.width // 2, groups)
    assert state.tokens.shape == (*cells, options["width"])
    for cache in (state.keys, state.values):
        assert [c.shape for c in cache] == [(*cells, options["width"])] * options["mixers"]
