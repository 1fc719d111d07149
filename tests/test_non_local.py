"""Non-local attention modules: fresh ones change nothing, windows equal the whole, h_s follows the specification."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import changed, equal, integers, latents, linear_of, one_unit, rows, stepwise
from test_train import SETTINGS, pictures, take_steps, write_pictures

from lic import conformance, pipeline
from lic.errors import LicError, UnsupportedError
from lic.exact import KERNELS, Fixed, Grid, oracle, use_kernel
from lic.model import store
from lic.model.codec import QUANTISERS, CodecModel, quantised
from lic.model.config import CONFIGS, Config
from lic.model.context import Geometry
from lic.model.layers import WIDE
from lic.model.non_local import BLOCK, NonLocal
from lic.model.transforms import SYNTHESIS_LIMIT
from lic.pipeline import windows
from lic.train.cli import command
from lic.train.export import export
from lic.train.trainer import Settings, Trainer

TINY = DATA / "models" / "tiny.safetensors"
SCRIPTS = Path(__file__).parent.parent / "scripts"
NLAIC = {"slices": [2, 7, 3], "filters": 6, "features": 4, "widths": [16, 12]}
CONFIG = replace(CONFIGS["tiny"], name="mixed", non_local_heads=2)
SMALL = replace(CONFIGS["tiny"], name="nlaic", latent=12, system="nlaic", context=NLAIC, non_local_heads=2)
CPU = torch.device("cpu")


def strong(config: Config) -> CodecModel:
    """A network in which everything matters, not calibrated."""
    torch.manual_seed(7)
    net = CodecModel(config).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if name.startswith(("h_s", "context")) or ".non_local." in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for layer in (net.shortcut, net.g_a.last, net.g_s.last):
        torch.nn.init.normal_(layer.weight, std=0.02)
    net.sigma.copy_(torch.rand(config.latent) / 20 + 0.01)
    return net


def written(config: Config, folder: Path) -> Path:
    net = strong(config)
    with net.calibration():
        z, y, code = latents(config, 2, (68, 8))
        net.predict(z, y, code)
    net.freeze()
    path = folder / f"{config.name}.safetensors"
    store.write_model(path, net, {"provenance": {}})
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(CONFIG, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(path: Path) -> store.LoadedModel:
    return store.load_file(store.read_info(path))


@pytest.fixture(scope="module")
def nlaic(tmp_path_factory: pytest.TempPathFactory) -> store.LoadedModel:
    return store.load_file(store.read_info(written(SMALL, tmp_path_factory.mktemp("models"))))


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / 20
    base = 128 + 80 * np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], -1)
    noise = np.random.default_rng(height).normal(0, 12, base.shape)
    return np.clip(base + noise, 0, 255).astype(np.uint8)


# The configuration


def test_configurations_without_modules_keep_their_json() -> None:
    assert "non_local_heads" not in CONFIGS["base"].to_json()
    data = json.loads(json.dumps(CONFIG.to_json()))
    assert data["non_local_heads"] == 2 and Config.from_json(data).non_local_heads == 2
    info = store.read_info(TINY)
    assert Config.from_json(info.config).to_json() == Config.from_json(info.config | {"non_local_heads": 0}).to_json()
    assert json.loads(json.dumps(Config.from_json(info.config).to_json())) == info.config


@pytest.mark.parametrize("wrong", [{"non_local_head": 1}, {"knots": None}])
def test_other_fields_may_neither_be_missing_nor_more(wrong: dict[str, object]) -> None:
    data = {k: v for k, v in (CONFIG.to_json() | wrong).items() if v is not None}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config.from_json(data)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        CodecModel(replace(CONFIG, non_local_heads=3))


# The modules


def test_fresh_modules_change_nothing() -> None:
    torch.manual_seed(1)
    net = CodecModel(CONFIG).eval().requires_grad_(False)
    for layer in (net.shortcut, net.g_a.last, net.g_s.last):
        torch.nn.init.normal_(layer.weight, std=0.02)
    plain = CodecModel(CONFIGS["tiny"]).eval().requires_grad_(False)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if ".non_local." not in k})
    code = torch.tensor([3000.0, 44_000.0])
    x = torch.rand(2, 320, 192, 3) - 0.5
    y = net.analysis(x, code)
    z = net.hyper_analysis(y, code).round()
    assert torch.equal(y, plain.analysis(x, code)) and torch.equal(z, plain.hyper_analysis(y, code).round())
    assert torch.equal(net.synthesis(y, code), plain.synthesis(y, code))
    for exact in (False, True):
        if exact:
            for each in (net, plain):
                with each.calibration():
                    each.predict(z, y.round(), code)
                each.freeze()
        pairs = zip(net.predict(z, y.round(), code), plain.predict(z, y.round(), code), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    net = CodecModel(CONFIG)
    for layer in (net.shortcut, net.g_a.last, net.g_s.last):
        torch.nn.init.normal_(layer.weight, std=0.02)
    for part in (net.g_a, net.g_s, net.h_a, net.h_s):
        torch.nn.init.normal_(part.non_local.outer.weight, std=0.1)
    x = torch.rand(2, 64, 128, 3) - 0.5
    out = net(x, torch.tensor([5000.0, 45_000.0]))
    (out.y_bits.sum() + 1e4 * (out.x_hat - x).square().sum()).backward()
    modules = [(name, p) for name, p in net.named_parameters() if ".non_local." in name]
    # Keys of one bias each: it shifts all logits of a query alike.
    still = {name for name, p in modules if p.grad is None or not (p.grad.abs() > 1e-7).any()}
    assert len(modules) == 4 * 15 and {name for name in still if not name.endswith("attention.k.bias")} == set()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 36), st.integers(1, 36), st.data())
def test_what_a_position_reaches(height: int, width: int, data: st.DataObject) -> None:
    """Its own block, all of it, and through the 3x3 convolution its neighbours."""
    torch.manual_seed(2)
    module = NonLocal(8, 2).double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    x = torch.randn(1, height, width, 8, dtype=torch.float64) / 3
    other = x.clone()
    other[0, row, column] += 1
    a, b = (module(Fixed(v), Grid(WIDE)).x for v in (x, other))
    r, c = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    block = (r // BLOCK == row // BLOCK) & (c // BLOCK == column // BLOCK)
    near = ((r - row).abs() <= 1) & ((c - column).abs() <= 1)
    assert torch.equal((a != b)[0].any(-1), block | near)


# Windows


def test_windows_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture's blocks are cut at its right and lower border."""
    rgb, grid, code = picture(600, 820), Geometry(1, 40, 52), torch.tensor([30_000.0])
    net = strong(CONFIG)
    for name, parameter in net.named_parameters():
        if name.startswith(("g_a.non_local", "g_s.non_local")):
            parameter.mul_(4)
    padded = np.pad(rgb, ((0, 40), (0, 12), (0, 0)), mode="edge")
    x = torch.from_numpy(padded).unsqueeze(0).float() / 255 - 0.5
    expected = net.latents_to_quantise(x, code)
    y = expected.round()
    (pixels,) = windows.synthesis(net, y, code, [windows.Samples()])
    assert torch.equal(pixels, ((net.synthesis(y, code)[0] + 0.5) * 255).round().clamp(0, 255).to(torch.uint8))

    def difference() -> tuple[float, int]:
        found = windows.analysis(net, [rgb], grid, code)
        (cut,) = windows.synthesis(net, y, code, [windows.Samples()])
        return float((found - expected).abs().max() / expected.std()), int((cut.int() - pixels.int()).abs().max())

    for window in (16, 32):
        monkeypatch.setattr(windows, "WINDOW", window)
        latents_differ, pixels_differ = difference()
        assert latents_differ < 1e-5 and pixels_differ <= 1
    monkeypatch.setattr(windows, "BLOCK", 8)  # the halo of other models, which cuts blocks
    latents_differ, pixels_differ = difference()
    assert latents_differ > 1e-3 and pixels_differ > 1


# The exact path


@pytest.mark.parametrize(("shape", "seed"), [((4, 4), 0), ((12, 20), 1), ((68, 8), 2), ((8, 136), 3)])
def test_rows_follow_the_specification(model: store.LoadedModel, path: Path, shape: tuple[int, int], seed: int) -> None:
    """Tiles of one position of z, of parts of a block, of a block and one position more."""
    expected_of = oracle.Model(
        store.read_arrays(store.read_info(path)), CONFIG.context, model.info.grids, CONFIG.non_local_heads
    )
    z, y, code = latents(CONFIG, 1, shape, seed)
    expected = expected_of.predict(z[0].long().numpy(), y[0].long().numpy(), int(code))
    for how in (rows, stepwise):
        assert equal(how(model.net, z, y, code)[:, 0], np.stack(expected))


def test_rows_do_not_depend_on_batch_kernel_or_threads(model: store.LoadedModel) -> None:
    z, y, code = latents(CONFIG, 17, (20, 12), seed=4)
    expected = rows(model.net, z, y, code)
    alone = [rows(model.net, z[i : i + 1], y[i : i + 1], code[i : i + 1]) for i in range(17)]
    assert torch.equal(torch.cat(alone, dim=1), expected)
    for kernel in KERNELS:
        with use_kernel(kernel):
            assert torch.equal(rows(model.net, z, y, code), expected), kernel
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(rows(model.net, z, y, code), expected)
    finally:
        torch.set_num_threads(threads)
    with torch.enable_grad():  # as in training
        assert torch.equal(torch.stack(model.net.predict(z, y, code)).detach(), expected)


def test_largest_numbers_stay_exact() -> None:
    """A whole block of keys at the limit, and a trunk and a gate at theirs."""
    random = np.random.default_rng(0)
    module = NonLocal(16, 1).requires_grad_(False)
    grids = {name: grid for name, grid in module.named_modules() if isinstance(grid, Grid)}
    arrays: dict[str, np.ndarray] = {}
    for name, layer in module.named_children():
        for part, child in [(name, layer), *((f"{name}.{k}", v) for k, v in layer.named_children())]:
            if isinstance(child, torch.nn.Linear):
                weight = integers(random, 40, child.out_features, child.in_features, extreme=True)
                exponent, bias = np.zeros(len(weight), np.int8), np.zeros(len(weight), np.float32)
                new = linear_of(weight, exponent.astype(np.int64), bias)
                child.weight.copy_(new.weight)
                child.bias.copy_(new.bias)
                child.exponent = new.exponent
                values = weight.astype(np.int8), exponent, bias
                arrays |= {
                    f"m.{part}.{k}": v for k, v in zip(("weight", "weight.exponent", "bias"), values, strict=True)
                }
    module.spatial.weight.copy_(torch.full_like(module.spatial.weight, 3.0))
    module.spatial.exponent = torch.zeros(16, dtype=torch.int8)
    arrays |= {"m.spatial.weight": np.full((3, 3, 16), 3, np.int8), "m.spatial.weight.exponent": np.zeros(16, np.int8)}
    for grid in grids.values():
        grid.bits, grid.exact = (grid.bits if grid is module.gate else 4), True
    wide = Grid(WIDE, 4)
    wide.exact = True
    x = integers(random, 900, BLOCK, BLOCK, 16, extreme=True)
    bits = {f"m.{name}": grid.bits for name, grid in grids.items()} | {"wide": 4}
    reference = oracle.Model(arrays, {}, bits, 1)
    expected = reference._non_local("m", oracle.Activation(x, 4), "wide")
    got = module(Fixed(torch.from_numpy(x)[None].float(), 4, WIDE), wide)
    assert equal(got.x[0], expected.x)
    assert len(np.unique(expected.x - x)) > 2


def test_other_units_of_the_gate_are_refused(path: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    info = store.read_info(path)
    arrays = store.read_arrays(info)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    meta = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["lic"])
    meta["grids"]["h_s.non_local.gate"] = 16
    meta["deflated"] = {}
    ids = store.identities(info.config, meta["grids"], arrays)
    meta |= dict(zip(("entropy_id", "synthesis_id"), (i.hex() for i in ids), strict=True))
    save_file(arrays, tmp_path / "x.safetensors", {"lic": json.dumps(meta)})
    with pytest.raises(UnsupportedError, match="units"):
        store.load_file(store.read_info(tmp_path / "x.safetensors"))


# Pictures


@pytest.mark.parametrize(("height", "width"), [(1, 1), (70, 300)])
def test_pictures_come_back(nlaic: store.LoadedModel, height: int, width: int) -> None:
    encoded = pipeline.encode_rgb(nlaic, picture(height, width), 30_000)
    decoded = pipeline.decode_rgb(nlaic, encoded.container)
    assert decoded.symbols_sha256 == encoded.symbols_sha256
    assert np.array_equal(decoded.rgb, encoded.reconstruction)


def test_every_way_of_computing_gives_the_same_symbols(
    nlaic: store.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.codec, "TILE", 128)
    monkeypatch.setattr(pipeline.codec, "LARGEST_TILE", 128 * 64)
    encoded = pipeline.encode_rgb(nlaic, picture(150, 64), 20_000)
    file = conformance.decoded(nlaic, encoded.container)
    assert (
        conformance.differences(nlaic, file, conformance.measure(nlaic, file), conformance.variants(short=True)) == []
    )


# Training


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 4)
    return folder


def trained(photos: Path, chosen: Settings, weights: dict[str, torch.Tensor], steps: int) -> tuple[Trainer, set[str]]:
    """A trainer after some steps, and the parameters that these changed."""
    source = pictures(photos)
    source.wait(64)
    trainer = Trainer(chosen, CPU)
    trainer.start_from(weights)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert np.isfinite(take_steps(trainer, source, steps)).all()
    return trainer, {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}


def copy_of_tiny(tmp_path: Path) -> tuple[Path, CodecModel]:
    """With a unit that this machine would round otherwise."""
    parent = changed(tmp_path / "tiny.safetensors", one_unit)
    return parent, store.load_file(store.read_info(parent)).net


@pytest.mark.slow
def test_modules_are_trained_and_the_rest_is_shared(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, whole = copy_of_tiny(tmp_path)
    context = {**NLAIC, "slices": [20, 28]}
    config = replace(CONFIGS["tiny"], name="fine", system="nlaic", context=context, non_local_heads=2)
    monkeypatch.setitem(CONFIGS, "fine", config)
    fine = replace(SETTINGS, model="fine", part="nonlocal", frozen_part=1.0)
    trainer, moved = trained(photos, fine, whole.state_dict(), 3)
    modules = {k for k in trainer.model.state_dict() if ".non_local." in k or k.startswith("context.")}
    assert moved <= modules
    for part in ("g_a", "g_s", "h_a", "h_s", "context"):
        assert any(name.startswith(f"{part}.") for name in moved)
    trainer.save(tmp_path / "state.pt")
    monkeypatch.setitem(CONFIGS, "fine", replace(config, non_local_heads=4))
    assert Trainer.restore(tmp_path / "state.pt", CPU).model.config == config

    target = tmp_path / "fine.safetensors"
    arguments = {"calibration": [photos], "shared_from": parent, "name": None, "data": "", "rate_range": None}
    export(tmp_path / "state.pt", target, **arguments)
    info, theirs = store.read_info(target), store.read_arrays(store.read_info(parent))
    assert set(info.shared) == {re.sub(r"\..*", ".", name) for name in theirs if not name.startswith("context.")}
    assert all(
        ".non_local." in name or name.startswith("context.") for name in store.read_arrays(store.read_info(target))
    )
    loaded = store.load_file(info).net
    assert loaded.h_s.non_local is not None and loaded.grid_bits()["h_s.psi"] == whole.grid_bits()["h_s.psi"]
    for name in ("g_s.non_local.outer.weight", "h_s.non_local.outer.weight"):
        torch.testing.assert_close(loaded.state_dict()[name], trainer.average[name], atol=1e-3, rtol=2e-2)

    # From there on: the context alone keeps the modules, the modules go on from where they are.
    again = Trainer(replace(fine, part="context"), CPU, config)
    again.start_from(loaded.state_dict())
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in again.model.state_dict().items())
    assert {k for k, p in again.model.named_parameters() if p.requires_grad} < modules


def test_scaling_factors_alone(photos: Path, tmp_path: Path) -> None:
    parent, whole = copy_of_tiny(tmp_path)
    arguments = [photos, "--state", tmp_path, "--minutes", 1, "--steps", 2, "--part", "gains", "--model", "tiny",
                 "--batch", 2, "--crop", 64, "--device", "cpu"]  # fmt: skip
    without = CliRunner().invoke(command, list(map(str, arguments)))
    assert "give --init" in str(without.exception)
    result = CliRunner().invoke(command, [*map(str, arguments), "--init", str(parent)])
    assert result.exit_code == 0, result.output
    target = tmp_path / "gains.safetensors"
    export(tmp_path / "state.pt", target, calibration=[], shared_from=parent, name="gains", data="", rate_range=None)
    assert not torch.equal(store.load_file(store.read_info(target)).net.log_gain.table, whole.log_gain.table)
    info = store.read_info(target)
    assert set(store.read_arrays(store.read_info(target))) == {
        "log_gain.table",
        "log_igain.table",
        "units.log2",
        "units.index",
    }
    loaded = store.load_file(info)
    assert loaded.net.grid_bits() == whole.grid_bits()
    encoded = pipeline.encode_rgb(loaded, picture(64, 64), 20_000)
    assert np.array_equal(pipeline.decode_rgb(loaded, encoded.container).rgb, encoded.reconstruction)


def test_a_part_keeps_the_units_of_gains_that_the_weights_had_already(tmp_path: Path) -> None:
    """The synthesis of a model whose gains are others than those of the file that it shares with."""
    parent, whole = copy_of_tiny(tmp_path)
    trainer = Trainer(replace(SETTINGS, part="synthesis"), torch.device("cpu"))
    with torch.no_grad():
        whole.log_gain.table += 0.5
    trainer.start_from(whole.state_dict())
    trainer.save(tmp_path / "state.pt")
    target = tmp_path / "tuned.safetensors"
    export(tmp_path / "state.pt", target, calibration=[], shared_from=parent, name="tuned", data="", rate_range=None)
    net = store.load_file(store.read_info(target)).net
    assert net.unit_tables is not None
    for stored, made in zip(net.unit_tables, net.make_unit_tables(), strict=True):
        assert (stored - made).abs().max() <= 1


@pytest.mark.parametrize(
    ("part", "changed_parts"),
    [("synthesis", {"g_s", "log_igain", "centroids"}), ("transforms", {"g_a", "h_a", "g_s", "log_igain", "centroids"})],
)
def test_transforms_for_an_entropy_model_that_stays(
    part: str, changed_parts: set[str], photos: Path, tmp_path: Path
) -> None:
    parent, _ = copy_of_tiny(tmp_path)
    arguments = [photos, "--state", tmp_path, "--minutes", 1, "--steps", 2, "--part", part, "--model", "tiny",
                 "--batch", 2, "--crop", 64, "--init", parent, "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    target = tmp_path / "fine.safetensors"
    options: dict[str, Any] = {"calibration": [], "name": "fine", "data": "", "rate_range": None}
    export(tmp_path / "state.pt", target, shared_from=parent, **options)
    assert {name.split(".")[0] for name in store.read_arrays(store.read_info(target))} == changed_parts

    # In the place of the parent: whole, with everything else as it was.
    shutil.copy(parent, tmp_path / "whole.safetensors")
    export(tmp_path / "state.pt", tmp_path / "whole.safetensors", shared_from=tmp_path / "whole.safetensors", **options)
    own, theirs = (store.read_arrays(store.read_info(path)) for path in (tmp_path / "whole.safetensors", parent))
    info = store.read_info(target)
    assert {k.split(".")[0] for k in theirs if not np.array_equal(own[k], theirs[k])} == changed_parts - {"centroids"}
    assert set(own) == {*theirs, store.LIMIT, store.CENTROIDS}
    assert store.read_info(tmp_path / "whole.safetensors").entropy_id == info.entropy_id
    assert store.read_info(parent).entropy_id == info.entropy_id

    loaded = store.load_file(store.read_info(target))
    assert loaded.net.g_s.limit == SYNTHESIS_LIMIT
    fine, plain = (pipeline.encode_rgb(model, picture(64, 64), 20_000)
                   for model in (loaded, store.load_file(store.read_info(parent))))  # fmt: skip
    assert np.array_equal(pipeline.decode_rgb(loaded, fine.container).rgb, fine.reconstruction)
    assert not np.array_equal(fine.reconstruction, plain.reconstruction)


def test_parts_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(LicError, match="no non-local"):
        Trainer(replace(SETTINGS, part="nonlocal"), CPU)
    with pytest.raises(LicError, match="gains"):
        Trainer(replace(SETTINGS, part="decoder"), CPU)
    with pytest.raises(LicError, match="universal"):
        Trainer(replace(SETTINGS, quantiser="floor"), CPU)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_quantisers(photos: Path, quantiser: str) -> None:
    y = (torch.randn(3, 8, 8, 5) * 4).requires_grad_()
    y_hat = quantised(y, quantiser)
    y_hat.sum().backward()
    assert y.grad is not None and bool((y.grad == 1).all())
    error = (y_hat - y).detach()
    assert error.abs().max() <= 0.5 + 1e-5 and error.var() == pytest.approx(1 / 12, rel=0.15)
    fractions = [len((crop.detach() % 1).mul(1000).round().remainder(1000).unique()) for crop in y_hat]
    assert {"ste": max(fractions) == 1, "universal": max(fractions) <= 2, "noise": min(fractions) > 100}[quantiser]
    if quantiser == "universal":  # each crop has its own
        offsets = (y_hat.detach() % 1)[:, 0, 0, 0]
        assert len(offsets.mul(1000).round().unique()) == 3
    source = pictures(photos)
    source.wait(64)
    trainer = Trainer(replace(SETTINGS, quantiser=quantiser), CPU)
    trainer.fit_shortcut(source)
    assert np.isfinite(take_steps(trainer, source, 3)).all()


def test_other_models_follow_new_transforms(tmp_path: Path) -> None:
    """One that shares them gets them, one whose own are others moves as far as they; an old file can still be told."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        shutil.copy(TINY, folder)
    parent = store.read_info(old / TINY.name)
    record: dict[str, Any] = {"provenance": {"steps": 3}, "rate_range": (0.1, 2.0)}
    for name, change in (("same", 0.0), ("other", 0.5)):
        net = store.load_file(parent).net
        net.config = replace(net.config, name=name)
        net.g_s.first.bias += change
        store.write_model(old / f"{name}.safetensors", net, record, parent)
    net = store.load_file(parent).net
    net.g_s.first.bias += 0.25
    net.g_a.stage8.quality.table -= 0.125
    net.g_s.limit = 5.0
    net.centroids[3, 1] = 0.125
    store.write_model(new / TINY.name, net, record, store.read_info(new / TINY.name))
    main = runpy.run_path(str(SCRIPTS / "follow_transforms.py"))["main"]
    result = CliRunner().invoke(main, [str(old), str(new), "--base", "tiny"])
    assert result.exit_code == 0, result.output
    whole = store.load_file(parent).net
    for name, moved in (("same", 0.25), ("other", 0.75)):
        before, after = (store.read_info(folder / f"{name}.safetensors") for folder in (old, new))
        assert after.entropy_id == before.entropy_id == parent.entropy_id and after.provenance == {"steps": 3}
        assert after.synthesis_id != before.synthesis_id
        theirs = store.load_file(after).net
        torch.testing.assert_close(theirs.g_s.first.bias, whole.g_s.first.bias + moved, atol=1e-3, rtol=1e-3)
        assert torch.equal(theirs.g_a.stage8.quality.table, net.g_a.stage8.quality.table)
        assert theirs.g_s.limit == 5.0 and torch.equal(theirs.centroids, net.centroids)

    net.log_gain.table += 0.1
    net.unit_tables = None
    store.write_model(new / TINY.name, net, record)
    result = CliRunner().invoke(main, [str(old), str(new), "--base", "tiny"])
    assert isinstance(result.exception, LicError) and "more than its transforms" in str(result.exception)
