"""The trainer: learns, resumes exactly, takes new shards, survives bad input. On the tiny configuration."""

from __future__ import annotations

import io
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA
from PIL import Image
from safetensors import safe_open
from scipy.special import ndtr

import lic
from lic.errors import LicError, UnsupportedError
from lic.model import store
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, REFINEMENT
from lic.model.dependent import SPACING, Forgetful
from lic.model.layers import Matrix
from lic.train.chroma import soften_chroma
from lic.train.cli import command
from lic.train.data import Pictures, Pool, sample
from lic.train.dependent import ToQuantise, chosen_steps, quantised
from lic.train.export import export
from lic.train.latents import StoredLatents, store_latents
from lic.train.patterns import draw_patterns
from lic.train.trainer import MAX_COST, Settings, Trainer, _weighted, averaged_model
from lic.work import Encode

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).parent.parent / "scripts"
SETTINGS = Settings(
    model="tiny", schedule_minutes=60, batch=2, crop=64, late_crop=64, warm_up_steps=5, frozen_part=0, refine_part=0
)


def write_pictures(folder: Path, count: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for i in range(count):
        y, x = np.mgrid[0:400, 0:380] / random.uniform(10, 60)
        base = np.stack([np.sin(x + random.uniform(-2, 2) * y + c) for c in range(3)], -1)
        pixels = 128 + 80 * base + random.normal(0, 5, base.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 4)
    return folder


def pictures(photos: Path) -> Pictures:
    return Pictures([photos], CPU, seed=1, watch=False)


def prepared(photos: Path) -> Pictures:
    source = pictures(photos)
    source.wait_for_all(128)
    return source


def fresh_trainer(source: Pictures, settings: Settings = SETTINGS) -> Trainer:
    trainer = Trainer(settings, CPU)
    trainer.fit_shortcut(source)
    return trainer


def take_steps(trainer: Trainer, source: Pictures | StoredLatents, count: int) -> list[list[float]]:
    return [trainer.train_step(source, trainer.objective()).tolist() for _ in range(count)]


def test_loss_falls(photos: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    trainer = fresh_trainer(source, replace(SETTINGS, chroma_part=0, pattern_part=0))
    losses = [m[0] for m in take_steps(trainer, source, 40)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def changed_crops(source: Pictures, **parts: float) -> int:
    """How many of 200 crops are others than without any change."""
    none = {"chroma_part": 0.0, "pattern_part": 0.0}
    plain, changed = (draw_crops(source, none | extra) for extra in ({}, parts))
    return int((plain != changed).flatten(1).any(1).sum())


def draw_crops(source: Pictures, parts: dict[str, float]) -> torch.Tensor:
    torch.manual_seed(2)
    return sample(source, 200, 64, torch.Generator().manual_seed(3), **parts)[0]


def test_patterns_are_drawn_over_a_share_of_the_crops(photos: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    plain = pictures(photos)
    plain.wait(64)
    crops = torch.cat([pool.crops(200, 64, generator) for pool in plain.pools])
    drawn = draw_patterns(crops, generator)
    assert drawn.shape == crops.shape and drawn.dtype == torch.uint8
    changed = (drawn != crops).any(-1)
    assert changed.any(2).any(1).float().mean() > 0.9  # a rectangle may be too narrow for a pixel
    assert 0.3 < (changed.float().mean(dim=(1, 2)) > 0.95).float().mean() < 0.7  # the whole crop, or a rectangle
    steps = (drawn[:, 1:].int() - drawn[:, :-1].int()).abs().float().mean(dim=(1, 2, 3))
    assert steps.quantile(0.9) > 3 * (crops[:, 1:].int() - crops[:, :-1].int()).abs().float().mean()
    assert 20 < changed_crops(plain, pattern_part=0.2) < 60


def test_chroma_of_a_share_of_the_crops_is_soft(photos: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(80, 170, (20, 64, 64, 3), dtype=torch.uint8, generator=generator)
    soft = soften_chroma(noise, generator)
    assert soft.shape == noise.shape and soft.dtype == torch.uint8
    weights = torch.tensor([0.299, 0.587, 0.114])
    luma, soft_luma = ((x.float() * weights).sum(-1) for x in (noise, soft))
    assert (soft_luma - luma).abs().max() <= 0.5  # rounding
    chroma, soft_chroma = (x[..., 0].float() - y for x, y in ((noise, luma), (soft, soft_luma)))
    assert soft_chroma.var() < 0.2 * chroma.var()
    flat = torch.full((50, 64, 64, 3), 100, dtype=torch.uint8)
    flat[..., 0] = 200
    red, _, blue = soften_chroma(flat, generator).float().unbind(-1)
    strength = (red - blue) / 100
    assert 0.38 < strength.min() < 0.5 and 0.9 < strength.max() <= 1
    gray = noise[..., :1].expand(-1, -1, -1, 3)
    assert torch.equal(soften_chroma(gray, generator), gray)
    plain = pictures(photos)
    plain.wait(64)
    assert 20 < changed_crops(plain, chroma_part=0.2) < 60


def test_spectrum_of_chroma(photos: Path) -> None:
    main = runpy.run_path(str(SCRIPTS / "chroma_spectrum.py"))["main"]
    result = CliRunner().invoke(main, [str(photos), "--pictures", "2"])
    assert result.exit_code == 0, result.output
    plain, soft = ([float(x) for x in re.findall(r"(-?[0-9.]+) dB", row)] for row in result.output.splitlines()[2:])
    assert len(plain) == len(soft) == 4 and all(b < a - 2 for a, b in zip(plain, soft, strict=True))


def test_no_crop_costs_more_than_the_limit() -> None:
    bits = torch.tensor([1e3, 1e3, 1e9], requires_grad=True)
    code = torch.full((3,), 25_000.0)
    loss, _ = _weighted(bits, torch.zeros(3), torch.zeros(3), code, 64 * 64)
    gradient = torch.autograd.grad(loss, bits)[0] * bits
    assert loss < 2 * MAX_COST / 10 / 3
    assert torch.isclose(gradient[2], torch.tensor(MAX_COST / 10 / 3))
    assert gradient[0] == gradient[1] < gradient[2]


@pytest.mark.parametrize(
    "optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow), pytest.param("soap", marks=pytest.mark.slow)]
)
def test_resumes_exactly(optimizer: str, photos: Path, tmp_path: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    straight = fresh_trainer(source, replace(SETTINGS, optimizer=optimizer, pattern_part=0.5))
    first = take_steps(straight, source, 3)
    straight.save(tmp_path / "state.pt")
    second = take_steps(straight, source, 3)
    resumed = Trainer.restore(tmp_path / "state.pt", CPU)
    assert resumed.step == 3
    assert take_steps(resumed, source, 3) == second != first


@pytest.mark.slow
def test_continues_on_another_kind_of_device(photos: Path, tmp_path: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    trainer = fresh_trainer(source)
    take_steps(trainer, source, 2)
    trainer.save(tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state |= {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}  # as a GPU writes them
    torch.save(state, tmp_path / "state.pt")
    moved = Trainer.restore(tmp_path / "state.pt", CPU)
    assert moved.step == 2
    assert all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in moved.model.state_dict().items())
    assert np.isfinite(take_steps(moved, source, 2)).all()


@pytest.mark.slow
def test_precision_of_products(photos: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    single, half = (
        take_steps(fresh_trainer(source, replace(SETTINGS, precision=precision)), source, 2)
        for precision in ("float32", "bfloat16")
    )
    assert single != half and np.allclose(single, half, rtol=0.05)


def test_frozen_part_keeps_the_linear_analysis(photos: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    trainer = fresh_trainer(source, Settings(model="tiny", batch=2, crop=64, frozen_part=1.0))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    take_steps(trainer, source, 2)
    changed = {k.partition(".")[0] for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"g_s", "h_a", "h_s", "prior", "context", "log_igain", "centroids"}


def test_refinement_keeps_the_analysis_and_rounds_for_rate(photos: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    trainer = fresh_trainer(source, Settings(model="tiny", batch=2, crop=64, refine_part=1.0))
    torch.nn.init.normal_(trainer.model.g_a.last.weight, std=0.01)
    x, code = sample(source, 2, 64, trainer.generator, pattern_part=0)
    with torch.no_grad():
        before = trainer.model.analysis(x, code)
        plain = trainer.model(x, code, frozen_latents=True).y_bits
        rounded = trainer.model(x, code, frozen_latents=True, optimised_rounding=True).y_bits
        assert bool((rounded <= plain).all()) and rounded.sum() < plain.sum()
    take_steps(trainer, source, 2)
    assert torch.equal(trainer.model.analysis(x, code), before)


def test_command_trains_resumes_and_exports(photos: Path, tmp_path: Path) -> None:
    arguments = [str(photos), "--state", str(tmp_path / "run"), "--minutes", "0.02", "--schedule-minutes", "60",
                 "--model", "tiny", "--batch", "2", "--crop", "64", "--late-crop", "64", "--device", "cpu"]  # fmt: skip
    for _ in range(2):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout == ""
    other = CliRunner().invoke(command, [*arguments, "--batch", "4"])
    assert "made with batch 2" in str(other.exception)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) >= 2 and log[-1]["step"] > log[0]["step"]
    state = tmp_path / "run" / "state.pt"
    export(
        state,
        tmp_path / "x.safetensors",
        calibration=[photos],
        shared_from=None,
        name="x",
        data="test",
        rate_range=(0.1, 2.0),
    )
    info = store.read_info(tmp_path / "x.safetensors")
    assert info.name == "x" and info.provenance["steps"] == log[-1]["step"] and info.rate_range == (0.1, 2.0)
    weights = store.load_file(info).net.state_dict()
    trainer = Trainer(SETTINGS, CPU)
    trainer.start_from(weights)
    average, _ = averaged_model(state)
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_integers_in_the_loop(photos: Path, tmp_path: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    trainer = fresh_trainer(source, Settings(**asdict(SETTINGS) | {"exact_part": 1.0, "refine_part": 1.0}))
    torch.nn.init.normal_(trainer.model.h_a.last.weight, std=0.1)
    trainer.make_exact(source)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    losses = take_steps(trainer, source, 2)
    assert np.isfinite(losses).all()
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {f"{name}.weight" for name in trainer.model.exact_layers()} <= changed
    trainer.save(tmp_path / "state.pt")
    resumed = Trainer.restore(tmp_path / "state.pt", CPU)
    assert resumed.model.exact and resumed.model.grid_bits() == trainer.model.grid_bits()
    target = tmp_path / "x.safetensors"
    export(tmp_path / "state.pt", target, calibration=[], shared_from=None, name="x", data="test", rate_range=None)
    loaded = store.load_file(store.read_info(tmp_path / "x.safetensors"))
    assert loaded.net.grid_bits() == trainer.model.grid_bits()


def test_context_model_alone(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pictures(photos)
    source.wait(64)
    parent = tmp_path / "tiny.safetensors"
    shutil.copy(DATA / "models" / "tiny.safetensors", parent)
    whole = store.load_file(store.read_info(parent)).net
    smaller = dict(CONFIGS["tiny"].context) | {"slices": [8, 8, 32], "mixers": 2}
    monkeypatch.setitem(CONFIGS, "other", replace(CONFIGS["tiny"], name="other", context=smaller))
    trainer = Trainer(replace(SETTINGS, model="other", part="context"), CPU)
    trainer.start_from(whole.state_dict())
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    x, code = sample(source, 8, 64, trainer.generator, pattern_part=0)
    latents = trainer.model.latents(x, code)
    with torch.no_grad():
        bits = trainer.model.rate(*latents, code)[0].sum()
    take_steps(trainer, source, 20)
    changed = {k.partition(".")[0] for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"context"}
    with torch.no_grad():
        assert trainer.model.rate(*latents, code)[0].sum() < bits
    again = Trainer(replace(SETTINGS, model="other", part="context"), CPU)
    again.start_from(trainer.model.state_dict())
    assert torch.equal(again.model.state_dict()["context.group"], trainer.model.state_dict()["context.group"])
    trainer.save(tmp_path / "state.pt")
    target = tmp_path / "other.safetensors"
    export(tmp_path / "state.pt", target, calibration=[photos], shared_from=parent, name=None, data="", rate_range=None)
    assert target.stat().st_size < parent.stat().st_size / 2
    loaded = store.load_file(store.read_info(target))
    assert torch.equal(loaded.net.h_s.last.weight, whole.h_s.last.weight)
    assert loaded.net.grid_bits()["h_s.psi"] == whole.grid_bits()["h_s.psi"]
    parent.unlink()
    with pytest.raises(UnsupportedError):
        store.load_file(store.read_info(target))
    with pytest.raises(RuntimeError):
        Trainer(replace(SETTINGS, model="other"), CPU).start_from(whole.state_dict())


def test_a_model_of_which_all_was_trained_shares_nothing(tmp_path: Path) -> None:
    Trainer(SETTINGS, CPU).save(tmp_path / "state.pt")
    parent = DATA / "models" / "tiny.safetensors"
    options: dict[str, Any] = {"calibration": [], "shared_from": parent, "name": "x", "data": "", "rate_range": None}
    with pytest.raises(ValueError, match="shares nothing"):
        export(tmp_path / "state.pt", tmp_path / "x.safetensors", **options)


def test_context_model_alone_on_stored_latents(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors")).net
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(files):
        store_latents(model, prepared(photos), path, count=3, side=128, seed=seed)
    source = StoredLatents(files, CPU)
    assert (source.count, source.side) == (6, 128)
    generator = torch.Generator().manual_seed(0)
    y, z, code, halves = source.batch(50, generator)
    assert source.spacing == 1 and halves.shape == (2, *y.shape) and bool((halves == 1).all())
    assert y.shape == (50, 8, 8, 48) and z.shape == (50, 2, 2, 16)
    assert len({(float(c), float(a.abs().sum())) for c, a in zip(code, y, strict=True)}) == 6
    bits, _ = model.rate(y, z, code)  # what goes together is drawn together
    assert bits.sum() < model.rate(y.roll(1, 0), z, code)[0].sum()

    monkeypatch.setitem(
        CONFIGS, "other", replace(CONFIGS["tiny"], name="other", system="hyperprior", context={"width": 8})
    )
    settings = replace(SETTINGS, model="other", part="context", steps=20, learning_rate=1e-2)
    trainer = Trainer(settings, CPU)
    trainer.start_from(model.state_dict())
    entries: list[dict[str, float]] = []
    trainer.run(source, 1.0, tmp_path / "state.pt", entries.append)
    assert trainer.step == 20 and trainer.progress() == 1 and entries[-1]["mpx"] == round(40 * 128**2 / 1e6, 1)
    fresh = Trainer(settings, CPU)
    fresh.start_from(model.state_dict())
    with torch.no_grad():
        assert trainer.model.rate(y, z, code)[0].sum() < fresh.model.rate(y, z, code)[0].sum()
    with pytest.raises(LicError, match="--part context"):
        Trainer(SETTINGS, CPU).run(source, 1.0, tmp_path / "other.pt", entries.append)
    with pytest.raises(LicError, match="one size"):
        StoredLatents([], CPU)
    dependent = store.load_file(store.read_info(DATA / "models" / "tiny-dependent.safetensors")).net
    store_latents(dependent, prepared(photos), tmp_path / "dependent.safetensors", count=3, side=128, seed=1)
    with pytest.raises(LicError, match="one size"):
        StoredLatents([*files, tmp_path / "dependent.safetensors"], CPU)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(LicError, match="bad"):
        StoredLatents([tmp_path / "bad.safetensors"], CPU)


def test_context_model_alone_on_dependently_quantised_latents(photos: Path, tmp_path: Path) -> None:
    """The bits are those of values as far apart as the quantiser of each latent has them, in the finer integers."""
    net = store.load_file(store.read_info(DATA / "models" / "tiny-dependent.safetensors")).net
    store_latents(net, prepared(photos), tmp_path / "1.safetensors", count=4, side=128, seed=1)
    source = StoredLatents([tmp_path / "1.safetensors"], CPU)
    assert source.spacing == SPACING
    y, z, code, halves = source.batch(4, torch.Generator().manual_seed(0))
    assert set(halves.unique().tolist()) == {1, 2}
    trainer = Trainer(replace(SETTINGS, part="context", steps=20, learning_rate=1e-3), CPU)
    trainer.start_from(net.state_dict())
    trainer.run(source, 1.0, tmp_path / "state.pt", lambda entry: None)
    fresh = Trainer(SETTINGS, CPU)
    fresh.start_from(net.state_dict())
    fresh.model.spacing = SPACING
    with torch.no_grad():
        before, after = (t.model.rate(y, z, code, halves)[0].sum() for t in (fresh, trainer))
        with net.in_floating_point():
            p = net.predict(z, y, code)
    below, above = 0.5 * halves.double().numpy()
    low, high = (
        (y.double().numpy() + side - p.mean.double().numpy()) / p.scale.double().numpy() for side in (-below, above)
    )
    mass = ndtr(np.where(low > 0, -low, high)) - ndtr(np.where(low > 0, -high, low))
    assert float(before) == pytest.approx(-np.log2(mass.clip(1e-9)).sum(), rel=1e-3)
    assert after < before


def dequantised(net: CodecModel, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return quantised(net, *ToQuantise.of(net, x, code), None)[1]


@pytest.mark.parametrize(
    ("part", "name"),
    [("synthesis", "tiny-dependent"), ("synthesis", "tiny-chain"), ("synthesis-adapters", "tiny-chain")],
)
def test_synthesis_alone_on_dependently_quantised_latents(photos: Path, tmp_path: Path, part: str, name: str) -> None:
    net = store.load_file(store.read_info(DATA / "models" / f"{name}.safetensors")).net
    source = prepared(photos)
    trainer = Trainer(replace(SETTINGS, part=part, learning_rate=3e-4, warm_up_steps=1), CPU)
    trainer.start_from(net.state_dict(), net.dependent)
    encoder = trainer.encoder
    assert encoder is not None and encoder.dependent is net.dependent
    x, code = sample(source, 8, 64, trainer.generator, pattern_part=0)
    latents = dequantised(encoder, x, code)
    exact = dequantised(net, x, code)  # which rounds a little otherwise on the way
    assert (latents - exact).abs().mean() < 0.1 * exact.abs().mean()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with torch.no_grad():
        loss = trainer.error_loss(x, latents, code)[0]
    take_steps(trainer, source, 20)
    with torch.no_grad():
        assert trainer.error_loss(x, latents, code)[0] < loss
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"g_s"} <= {k.partition(".")[0] for k in changed} <= {"g_s", "log_igain"}
    matrices = {"g_s." + k for k, m in trainer.model.g_s.named_modules() if isinstance(m, Matrix)}
    assert {k.removesuffix(".weight") for k in changed} & matrices == (matrices if part == "synthesis" else set())
    if part == "synthesis-adapters":
        assert {m + ".left" for m in matrices} <= changed
    assert torch.equal(dequantised(encoder, x, code), latents)
    trainer.save(tmp_path / "state.pt")
    following = take_steps(trainer, source, 2)
    restored = Trainer.restore(tmp_path / "state.pt", CPU)
    assert restored.encoder is not None and restored.encoder.dependent is not None
    assert restored.encoder.dependent.chains == net.dependent.chains
    assert take_steps(restored, source, 2) == following


def test_a_refinement_alone(photos: Path, tmp_path: Path) -> None:
    """It begins anew, learns on latents that stay as they are, resumes, is exported and trained further."""
    old = store.load_file(store.read_info(DATA / "models/tiny-chain.safetensors")).net
    store.write_model(tmp_path / "whole.safetensors", old, {"provenance": {}})
    info = store.read_info(tmp_path / "whole.safetensors")
    net = store.load_file(info).net
    source = prepared(photos)
    trainer = Trainer(replace(SETTINGS, part="refinement", learning_rate=1e-2, warm_up_steps=1), CPU)
    trainer.start_from(net.state_dict(), net.dependent)
    assert trainer.model.config.refinement == REFINEMENT and trainer.encoder is not None
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    x, code = sample(source, 8, 64, trainer.generator, pattern_part=0)
    latents = dequantised(trainer.encoder, x, code)
    with torch.no_grad():
        loss = trainer.refinement_loss(x, latents, code)[0]
    take_steps(trainer, source, 30)
    with torch.no_grad():
        assert trainer.refinement_loss(x, latents, code)[0] < loss
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"refinement." + k for k, _ in trainer.model.refinement.named_parameters()}
    trainer.save(tmp_path / "state.pt")
    following = take_steps(trainer, source, 2)
    assert take_steps(Trainer.restore(tmp_path / "state.pt", CPU), source, 2) == following
    target = tmp_path / "refined.safetensors"
    options = {"calibration": [], "name": "refined", "data": "tests", "rate_range": None}
    export(tmp_path / "state.pt", target, shared_from=info.path, **options)
    found = store.read_info(target)
    assert found.plain_synthesis_id == info.synthesis_id and found.entropy_id == info.entropy_id
    with pytest.raises(LicError, match="dependent quantisation"):
        Trainer(replace(SETTINGS, part="refinement"), CPU).start_from(net.state_dict())
    refined = store.load_file(found).net
    for part, keeps_it in (("gains", True), ("synthesis", False), ("refinement", True)):
        further = Trainer(replace(SETTINGS, part=part), CPU, refinement=refined.config.refinement)
        further.start_from(refined.state_dict(), refined.dependent)
        assert (further.model.refinement is not None) == keeps_it
        assert np.isfinite(take_steps(further, source, 2)).all()


@pytest.mark.parametrize(
    ("part", "quantiser"), [("transforms", "neighbours"), ("adapters", "chain"), ("gains", "chain")]
)
def test_parts_for_an_entropy_model_that_quantises_dependently(
    photos: Path, tmp_path: Path, part: str, quantiser: str
) -> None:
    net = store.load_file(store.read_info(DATA / "models" / f"tiny-{quantiser}.safetensors")).net
    source = prepared(photos)
    trainer = Trainer(replace(SETTINGS, part=part, learning_rate=1e-3, warm_up_steps=1), CPU)
    trainer.start_from(net.state_dict(), net.dependent)
    x, code = sample(source, 8, 64, trainer.generator, pattern_part=0)

    def loss() -> tuple[float, float]:
        """And bits of y."""
        with torch.no_grad():
            weighted, metrics = trainer.loss(x, code, False, True)
        return float(weighted), float(metrics[1] - metrics[2])

    # About as many bits as in the codec, where its tables count and not the Gaussians that they are made of, and but
    # for the first step, whose pieces are not told apart here.
    coded = list(chosen_steps(net, *ToQuantise.of(net, x, code)))
    assert net.dependent is not None
    in_codec = sum(
        net.dependent.code(Forgetful(), chosen.scale_index[b], chosen.eighths[b], chosen.symbols[b]).bits
        for chosen in coded[1:]
        for b in range(len(x))
    )
    before, bits = loss()
    assert 0.5 < bits / (in_codec / x[..., 0].numel()) < 2
    held = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    take_steps(trainer, source, 60 if part == "transforms" else 5)
    if part == "transforms":  # the others take longer
        assert loss()[0] < before
    changed = {k.partition(".")[0] for k, v in trainer.model.state_dict().items() if not torch.equal(v, held[k])}
    assert ({"log_gain", "log_igain"} if part == "gains" else {"g_a", "g_s"}) <= changed
    assert not changed & {"h_s", "context", "prior", "shortcut"}
    trainer.save(tmp_path / "state.pt")
    following = take_steps(trainer, source, 2)
    restored = Trainer.restore(tmp_path / "state.pt", CPU)
    assert take_steps(restored, source, 2) == following
    averaged, _ = averaged_model(tmp_path / "state.pt")
    assert averaged.dependent is not None and averaged.spacing == SPACING
    neighbours = averaged.dependent.neighbours
    assert (neighbours is None) == (quantiser == "chain")
    if neighbours is not None and net.dependent.neighbours is not None:
        assert np.array_equal(neighbours.weight, net.dependent.neighbours.weight)


def test_encoded_batches_serve_several_steps(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lic.train.trainer.ENCODED", 4)
    monkeypatch.setattr("lic.train.trainer.ENCODED_USES", 3)
    net = store.load_file(store.read_info(DATA / "models" / "tiny-chain.safetensors")).net
    source = prepared(photos)
    trainer = Trainer(replace(SETTINGS, part="synthesis"), CPU)
    trainer.start_from(net.state_dict(), net.dependent)
    seen: list[bytes] = []
    loss_of = trainer.error_loss

    def recorded(x: torch.Tensor, latents: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(latents.numpy().tobytes())
        return loss_of(x, latents, code)

    for _ in range(24):
        trainer.train_step(source, recorded)
    assert len(seen) == 24 and 8 <= len(set(seen)) <= 12  # not all have had three turns when it ends
    for batch in set(seen):
        steps = [step for step, other in enumerate(seen) if other == batch]
        assert len(steps) <= 3 and all(b - a == 4 for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=pytest.mark.slow) for part in ("tables", "vectors", "adapters")],
)
def test_tuned_for_ms_ssim(part: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(DATA / "models" / "tiny.safetensors", tmp_path)
    parent, target = tmp_path / "tiny.safetensors", tmp_path / "tiny-ms-ssim.safetensors"
    arguments = [photos, "--state", tmp_path, "--minutes", 5, "--steps", 40, "--part", part, "--tune", "ms-ssim",
                 "--model", "tiny", "--batch", 2, "--crop", 128, "--late-batch", 2, "--late-crop", 128,
                 "--init", parent, "--learning-rate", "4e-3", "--refine-part", 0, "--device", "cpu",
                 "--rank", 3]  # fmt: skip
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    options: dict[str, Any] = {"calibration": [], "shared_from": parent, "data": "", "rate_range": None}
    export(tmp_path / "state.pt", target, name="tiny-ms-ssim", **options)
    with safe_open(target, "np") as file:
        names = set(file.keys())
    vectors = {name for name in names if name.endswith((".bias", ".spatial.weight"))}
    assert bool(vectors) == (part != "tables")
    assert (store.LIMIT in names) == (part != "tables")
    with safe_open(parent, "np") as file:
        scales = {name for name in set(file.keys()) if name.startswith(("g_a.", "g_s.")) and name.endswith(store.SCALE)}
    halves = {name.replace(".weight" + store.SCALE, half) for name in scales for half in (".left", ".right")}
    adapters = halves | {name + store.SCALE for name in halves}
    assert adapters & names == (adapters if part == "adapters" else set())
    if part == "adapters":
        weights = store.load_file(store.read_info(target)).net.state_dict()
        Trainer(replace(SETTINGS, part=part, rank=3), CPU).start_from(weights)
        deeper = Trainer(replace(SETTINGS, part="synthesis-adapters", rank=5), CPU)
        deeper.start_from(weights)  # with more that does nothing yet, and never will where nothing is trained
        grown = deeper.model.state_dict()
        for name, rows in ((k, v) for k, v in weights.items() if k.endswith((".left", ".right"))):
            assert torch.equal(grown[name][:3], rows) and len(grown[name]) == 5
            assert bool(grown[name][3:].any()) == (name.startswith("g_s.") and name.endswith(".right"))
        for other in (replace(SETTINGS, part=part, rank=2), replace(SETTINGS, part="vectors")):
            with pytest.raises(LicError, match="--rank 3"):
                Trainer(other, CPU).start_from(weights)
    others = names - vectors - adapters - {store.LIMIT}
    assert all(".quality." in name or name.startswith(("log_", "units.", "centroids")) for name in others)
    monkeypatch.setenv("LIC_MODELS", str(tmp_path))
    rgb = np.asarray(Image.open(photos / "0.png").crop((0, 0, 200, 190)))
    codec = lic.Codec("tiny")
    tuned, plain = codec.encode(rgb, 40, tune="ms-ssim"), codec.encode(rgb, 40)
    assert (lic.info(tuned).model, lic.info(plain).model, lic.info(tuned).effort) == ("tiny-ms-ssim", "tiny", 0)
    options: dict[str, Any] = {"target": None, "effort_seconds": None, "strip": False, "device": "cpu", "threads": 1}
    encode = Encode(quality=40, tune="ms-ssim", effort=0, model="tiny", max_pixels=10**6, measure=False, **options)
    picture = encode.load("0.png", (photos / "0.png").read_bytes())
    assert encode.save(picture, encode.code(codec, picture))[1]["model"] == "tiny-ms-ssim"  # what its file asks for
    assert np.asarray(codec.decode(tuned)).shape == rgb.shape
    searched = codec.encode(rgb, 40, tune="ms-ssim", effort=3)
    assert (lic.info(searched).model, lic.info(searched).effort) == ("tiny-ms-ssim", 3)
    assert [lic.info(data).model for data in codec.encode([rgb, rgb], 40, tune="ms-ssim")] == ["tiny-ms-ssim"] * 2


def test_a_network_that_is_not_frozen_is_not_written(tmp_path: Path) -> None:
    net = CodecModel(CONFIGS["tiny"])
    with pytest.raises(ValueError, match="not frozen"):
        store.write_model(tmp_path / "x.safetensors", net, {"provenance": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_train_one_model(photos: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(photos), "--state", str(tmp_path), "--minutes", "0.1", "--model", "tiny", "--batch", "2",
                 "--crop", "64", "--late-crop", "64", "--device", "cpu", "--threads", "1"]  # fmt: skip
    run = subprocess.run([*torchrun, "-m", "lic", "train", *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["mpx"] == pytest.approx(last["step"] * 2 * 2 * 64 * 64 / 1e6, abs=0.06)
    assert averaged_model(tmp_path / "state.pt")[1]["step"] == last["step"]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"model": "none"}, "tiny"),
        ({"batch": 1}, "two crops"),
        ({"late_crop": 100}, "multiples"),
        ({"optimizer": "sgd"}, "optimiser"),
        ({"precision": "float16"}, "precision"),
        ({"tune": "ssim"}, "tune"),
        ({"part": "gains", "quantiser": "noise"}, "quantises as the encoder"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object], word: str) -> None:
    with pytest.raises(LicError, match=word):
        Trainer(Settings(**{"model": "tiny", **wrong}), CPU)


def test_pictures_without_colour_are_fine(tmp_path: Path) -> None:
    for i in range(2):
        Image.effect_noise((300, 280), 40 + i).convert("RGB").save(tmp_path / f"{i}.png")
    source = pictures(tmp_path)
    source.wait(64)
    assert np.isfinite(take_steps(fresh_trainer(source), source, 2)).all()


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({"version": 0}, tmp_path / "state.pt")
    with pytest.raises(LicError, match="version"):
        Trainer.restore(tmp_path / "state.pt", CPU)


def test_not_finite_loss_stops_and_keeps_the_last_state(photos: Path, tmp_path: Path) -> None:
    source = pictures(photos)
    source.wait(64)
    trainer = fresh_trainer(source)
    trainer.save(tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        trainer.model.h_s.last.bias.fill_(float("nan"))
    with pytest.raises(LicError, match="not finite"):
        trainer.run(source, 0.01, tmp_path / "state.pt", lambda entry: None)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_bad_and_small_pictures_are_left_out(photos: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    archive = tmp_path / "archives" / "broken.tar"
    archive.parent.mkdir()
    archive.write_bytes(b"no archive")
    (tmp_path / "notes.txt").write_text("no picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    source = Pictures([archive, tmp_path], CPU, seed=1, watch=False)
    source.wait(144)
    assert source.count == 2
    crops = source.pools[0].crops(50, 144, torch.Generator().manual_seed(0))
    assert bool(crops.flatten(1).any(1).all())  # none is from the small black one
    with pytest.raises(LicError, match="512 pixels"):
        source.wait(512)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LicError, match="no pictures"):
        Pictures([empty], CPU, seed=1, watch=False).wait(64)


def test_shards_that_arrive_are_read(tmp_path: Path) -> None:
    def shard(name: str, count: int) -> None:
        with tarfile.open(tmp_path / (name + ".part"), "w") as tar:
            for i in range(count):
                file = io.BytesIO()
                Image.effect_noise((300, 280), 40).convert("RGB").save(file, "PNG")
                member = tarfile.TarInfo(f"{i}.png")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
        (tmp_path / (name + ".part")).rename(tmp_path / name)

    shard("a.tar", 2)
    source = Pictures([tmp_path], CPU, seed=1)
    source.wait(64)
    assert source.count == 2
    shard("b.tar", 3)
    for _ in range(100):
        source.refresh()
        if source.count == 5:
            break
        time.sleep(0.1)
    assert source.count == 5


def test_crops_come_from_the_pictures() -> None:
    pool = Pool(CPU)
    pool.add([np.full((20, 30, 3), value, np.uint8) for value in (10, 200)])
    gradient = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((1, 40, 3), np.uint8)
    pool.add([gradient, np.zeros((4, 4, 3), np.uint8)])
    crops = pool.crops(64, 8, torch.Generator().manual_seed(0))
    assert crops.shape == (64, 8, 8, 3)
    for crop in crops.int():
        flat = bool((crop == crop[0, 0, 0]).all())
        steps = torch.cat([crop.diff(dim=0).flatten(), crop.diff(dim=1).flatten()]).abs()
        assert (flat and int(crop[0, 0, 0]) in (10, 200)) or set(steps.tolist()) == {0, 1}


def test_the_mean_of_two_runs(photos: Path, tmp_path: Path) -> None:
    source, states = prepared(photos), [tmp_path / name for name in ("one.pt", "two.pt", "another.pt")]
    weights = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors")).net.state_dict()
    for seed, (path, part) in enumerate(zip(states, ["synthesis", "synthesis", "transforms"], strict=True)):
        trainer = Trainer(replace(SETTINGS, part=part, seed=seed), CPU)
        trainer.start_from(weights)
        take_steps(trainer, source, 3)
        trainer.save(path)
    main = runpy.run_path(str(SCRIPTS / "average_states.py"))["main"]
    both = tmp_path / "both.pt"
    assert CliRunner().invoke(main, [*map(str, states[:2]), str(both)]).exit_code == 0
    (one, facts), (two, _), (mean, sums) = (averaged_model(path) for path in (*states[:2], both))
    assert sums["step"] == 6 and sums["pixels"] == 2 * facts["pixels"]
    different = 0
    for a, b, c in zip(one.parameters(), two.parameters(), mean.parameters(), strict=True):
        assert torch.allclose((a + b) / 2, c, atol=1e-6)
        different += not torch.equal(a, b)
    assert different > 0
    again = CliRunner().invoke(main, [*map(str, states[:2]), str(both)])
    mixed = CliRunner().invoke(main, [*map(str, states[1:]), str(tmp_path / "mixed.pt")])
    assert again.exit_code == 2 and isinstance(mixed.exception, LicError)
