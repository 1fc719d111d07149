"""The context models msp and hyperprior: the specification, files of any size, training, options."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from lic import conformance, pipeline
from lic.exact import exact_arithmetic, oracle
from lic.exact.oracle import Activation, Array
from lic.model import store
from lic.model.codec import CodecModel
from lic.model.complexity import kmac_per_pixel
from lic.model.config import CONFIGS, Config
from lic.model.context import Geometry, Prediction, make_context
from lic.model.context.msp import LatticeSchedule
from lic.quality import MAX_CODE

NEW_PHASES = ((1, 1), (0, 1), (1, 0))
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "hyperprior": ("hyperprior", {"width": 24}),
    "one-slice": ("msp", {"levels": 1, "slices": [48], "width": 24, "depth": 1}),
    "two-levels": ("msp", {"levels": 2, "slices": [8, 16, 24], "width": 24, "depth": 2}),
}


def config_of(name: str) -> Config:
    system, options = SMALL[name]
    return replace(CONFIGS["tiny"], name=name, system=system, context=options)


def base_config(system: str, options: dict[str, Any]) -> Config:
    return replace(CONFIGS["base"], system=system, context=options)


def latents(config: Config, batch: int, shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, ...]:
    """z, y and quality codes; some latents are far beyond any picture's."""
    random = np.random.default_rng(seed)
    h, w = shape
    z = np.clip(np.rint(random.normal(0, 5, (batch, h // 4, w // 4, config.hyper_latent))), -63, 63)
    y = np.rint(random.laplace(0, 1, (batch, h, w, config.latent)) * 2.0 ** random.uniform(-2, 6, (batch, h, w, 1)))
    y.flat[::97] *= 1000
    code = torch.from_numpy(random.integers(0, MAX_CODE + 1, batch))
    return torch.from_numpy(z).float(), torch.from_numpy(y).float(), code


@pytest.fixture(scope="module", params=SMALL)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> store.LoadedModel:
    """A small model with strong weights in all layers of its entropy path, through a weights file."""
    torch.manual_seed(5)
    config = config_of(request.param)
    net = CodecModel(config).eval().requires_grad_(False)
    for parameter in [*net.context.parameters(), *net.h_s.parameters()]:
        parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.nn.init.normal_(net.shortcut.weight, std=0.02)
    net.sigma.copy_(torch.rand(config.latent) / 2 + 0.05)
    with net.calibration():
        net.predict(*latents(config, 2, (12, 20), seed=0))
    net.freeze()
    path = tmp_path_factory.mktemp("models") / f"{config.name}.safetensors"
    store.write_model(path, net, {"provenance": {}})
    loaded = store.load_file(store.read_info(path))
    given = latents(config, 2, (8, 12), seed=1)
    with torch.no_grad(), exact_arithmetic():
        for before, after in zip(net.predict(*given), loaded.net.predict(*given), strict=True):
            assert torch.equal(before, after)
    return loaded


class Specified(oracle.Model):
    """Sections 5.9 and 5.10 of the specification in int64, step by step, without batches or caches."""

    def predict(self, z: Array, y: Array, code: int) -> tuple[Array, Array]:
        self.code = code
        self.log2, self.index = (self._at(code, self.arrays[f"units.{name}"]) for name in ("log2", "index"))
        self.eighths, self.scale_index = np.zeros_like(y), np.zeros_like(y)
        self.psi = self._hyper_synthesis(z, code)
        everything = slice(0, y.shape[-1])
        if "levels" not in self.options:
            self.answer(slice(None), slice(None), everything, self.psi_head("context.head", self.psi))
            return self.eighths, self.scale_index
        step = 2 ** self.options["levels"]
        coarsest = self.at(self.psi, slice(None, None, step), slice(None, None, step))
        self.answer(
            slice(None, None, step), slice(None, None, step), everything, self.psi_head("context.coarsest", coarsest)
        )
        self.known = np.zeros((*y.shape[:2], self.options["width"]), np.int64)
        self.channels = [slice(a, b) for a, b in pairwise(np.cumsum([0, *self.options["slices"]]))]
        for s in range(len(self.channels)):
            self.learn(y, slice(None, None, step), slice(None, None, step), s)
        n = 0
        for scale in range(self.options["levels"]):
            spacing = 2 ** (self.options["levels"] - 1 - scale)
            for number, (i, j) in enumerate(NEW_PHASES):
                rows, columns = slice(i * spacing, None, 2 * spacing), slice(j * spacing, None, 2 * spacing)
                for s in range(len(self.channels)):
                    self.step(n, scale, number, s, spacing)
                    self.learn(y, rows, columns, s)
                    n += 1
        return self.eighths, self.scale_index

    def step(self, n: int, scale: int, number: int, s: int, spacing: int) -> None:
        wide, cells = "context.wide", ((0, 0), *NEW_PHASES)
        i, j = cells[number + 1]
        rows, columns = slice(i * spacing, None, 2 * spacing), slice(j * spacing, None, 2 * spacing)
        own = self._param(wide, self.arrays["context.step"][n])
        own = self._sum(wide, own, self._quality("context.quality", wide, self.code))
        x = self._linear(f"context.psi.{s}", self.at(self.psi, rows, columns), wide)
        x = self._sum(wide, x, own)
        count = len(self.channels)
        place, places = number * count + s, 3 * count
        for p, (i, j) in enumerate(cells):
            first = 0 if p == 0 else 1 + (p - 1) * count
            if place < first:
                continue
            known = Activation(self.known[i * spacing :: 2 * spacing, j * spacing :: 2 * spacing], self.bits)
            kernel = scale * (places - first) + place - first
            x = self._sum(
                wide, x, self._depthwise(f"context.around.{p}", self._to("context.known", known), wide, kernel)
            )
        for b in range(self.options["depth"]):
            name = f"context.blocks.{b}"
            t = self._linear(f"{name}.inner", self._to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
            t = self._depthwise(f"{name}.spatial", t, f"{name}.mixed", n)
            x = self._feed(f"{name}.feed", self._sum(wide, x, self._linear(f"{name}.outer", t, wide)), wide)
        answer = self._linear(f"context.head.{s}", self._to("context.narrow", x), "context.answer")
        self.answer(rows, columns, self.channels[s], answer)

    @property
    def bits(self) -> int:
        return self.grids["context.wide_known"]

    @staticmethod
    def at(a: Activation, rows: slice, columns: slice) -> Activation:
        return Activation(a.x[rows, columns], a.bits)

    def learn(self, y: Array, rows: slice, columns: slice, s: int) -> None:
        features = oracle.features(y[rows, columns, self.channels[s]], self.log2[self.channels[s]])
        embedded = self._linear(f"context.embed.{s}", Activation(features, 7), "context.wide_known")
        before = Activation(self.known[rows, columns], self.bits)
        self.known[rows, columns] = self._sum("context.wide_known", before, embedded).x

    def psi_head(self, name: str, psi: Activation) -> Activation:
        wide = f"{name}.wide"
        x = self._sum(wide, self._to(wide, psi), self._quality(f"{name}.quality", wide, self.code))
        x = self._linear(f"{name}.first", self._to(f"{name}.narrow", x), f"{name}.hidden", leaky=True)
        return self._linear(f"{name}.last", x, "context.answer")

    def answer(self, rows: slice, columns: slice, channels: slice, answer: Activation) -> None:
        e, i = oracle.prediction(answer.x, self.log2[channels], self.index[channels])
        self.eighths[rows, columns, channels], self.scale_index[rows, columns, channels] = e, i


@pytest.mark.parametrize(("shape", "seed"), [((4, 4), 2), ((12, 20), 3)])
def test_model_follows_the_specification(model: store.LoadedModel, shape: tuple[int, int], seed: int) -> None:
    z, y, code = latents(model.net.config, 1, shape, seed)
    specified = Specified(store.read_arrays(model.info), model.net.config.context, model.info.grids)
    expected = specified.predict(z[0].long().numpy(), y[0].long().numpy(), int(code))
    with torch.no_grad(), exact_arithmetic():
        got = model.net.predict(z, y, code)
    for g, e in zip(got, expected, strict=True):
        assert np.array_equal(g[0].long().numpy(), e) and len(np.unique(e)) > 1


def picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / 30
    base = 128 + 80 * np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], -1)
    noise = np.random.default_rng(height + width).normal(0, 12, base.shape)
    return np.clip(base + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (64, 64), (200, 136)])
@pytest.mark.parametrize("code", [0, 30_000])
def test_pictures_of_any_size(model: store.LoadedModel, height: int, width: int, code: int) -> None:
    encoded = pipeline.encode_rgb(model, picture(height, width), code)
    assert encoded.container.header.streams == 1 + model.net.context.schedule.steps(Geometry(1, 4, 4))
    decoded = pipeline.decode_rgb(model, encoded.container)
    assert decoded.symbols_sha256 == encoded.symbols_sha256
    assert np.array_equal(decoded.rgb, encoded.reconstruction)


def test_tiles(model: store.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.codec, "TILE", 128)
    monkeypatch.setattr(pipeline.codec, "LARGEST_TILE", 128 * 128)
    encoded = pipeline.encode_rgb(model, picture(130, 250), 20_000)
    assert len(encoded.container.tiles) == 4
    assert pipeline.decode_rgb(model, encoded.container).symbols_sha256 == encoded.symbols_sha256


def test_every_way_of_computing_gives_the_same_symbols(model: store.LoadedModel) -> None:
    file = conformance.decoded(model, pipeline.encode_rgb(model, picture(60, 100), 20_000).container)
    expected = conformance.measure(model, file)
    assert conformance.differences(model, file, expected, conformance.variants(short=True)) == []


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("exact", [False, True])
def test_every_parameter_learns(name: str, exact: bool) -> None:
    torch.manual_seed(0)
    config = config_of(name)
    net = CodecModel(config)
    torch.nn.init.normal_(net.shortcut.weight, std=0.02)
    net.sigma.fill_(0.3)
    if exact:
        with net.calibration(), torch.no_grad():
            net.predict(*latents(config, 2, (4, 8), seed=0))
        net.set_exact(True)
    out = net(torch.rand(2, 64, 128, 3) - 0.5, torch.tensor([5000.0, 45000.0]))
    out.y_bits.sum().backward()
    entropy_path = [("context", net.context), ("h_s", net.h_s)]
    parameters = [(f"{part}.{n}", p) for part, module in entropy_path for n, p in module.named_parameters()]
    assert [n for n, p in parameters if p.grad is None or not p.grad.any()] == []


def everything(context: torch.nn.Module, *given: Any) -> Prediction:
    with torch.no_grad():
        return context.teacher(*given)


def test_what_psi_alone_predicts(model: store.LoadedModel) -> None:
    """All of them in one system, those of the coarsest lattice in the other."""
    net = model.net
    z, y, code = latents(net.config, 1, (8, 12), seed=4)
    psi, unit = net.h_s(z, code), net.unit(code)
    before, after = (everything(net.context, psi, other, code, unit) for other in (y, torch.zeros_like(y)))
    spacing = 2 ** net.config.context.get("levels", 0)
    unchanged = (before.eighths == after.eighths).all(dim=(0, 3))
    assert unchanged[::spacing, ::spacing].all()
    assert unchanged.sum() == -(-8 // spacing) * -(-12 // spacing)


def test_coarse_to_fine() -> None:
    """Each scale halves the spacing of the known positions, the diagonal phase first."""
    schedule = LatticeSchedule(2, [3, 5])
    known = torch.zeros(1, 8, 12, 8)
    pictures = []
    for step in range(schedule.steps(Geometry(1, 8, 12))):
        assert schedule.stream_of(step) == step
        assert not schedule.take(known, step).any()
        schedule.put(known, step, torch.ones_like(schedule.take(known, step)))
        pictures.append(known[0, :, :, [0, 7]].bool())
    assert len(pictures) == 1 + 2 * 3 * 2
    for step, spacing in ((0, 4), (6, 2), (12, 1)):
        lattice = torch.zeros(8, 12, dtype=torch.bool)
        lattice[::spacing, ::spacing] = True
        assert all(torch.equal(pictures[step][..., c], lattice) for c in range(2))
    for level, spacing in enumerate((2, 1)):
        first, second = pictures[1 + 6 * level], pictures[2 + 6 * level]
        assert first[spacing, spacing].tolist() == [True, False]
        assert second[spacing, spacing].tolist() == [True, True]
        assert not second[0, spacing].any() and not second[spacing, 0].any()


@pytest.mark.parametrize("geometry", [Geometry(1, 4, 4), Geometry(2, 12, 20)])
def test_state_shapes_are_as_listed(geometry: Geometry) -> None:
    for name, (system, options) in SMALL.items():
        config = config_of(name)
        net = CodecModel(config).requires_grad_(False)
        shape = (geometry.batch, geometry.height, geometry.width)
        z = torch.zeros(shape[0], shape[1] // 4, shape[2] // 4, config.hyper_latent)
        code = torch.zeros(geometry.batch)
        psi, unit = net.h_s(z, code), net.unit(code)
        state = net.context.start(psi, geometry, code, unit)
        if system == "hyperprior":
            assert {p.shape for p in state.prediction} == {(shape[0], shape[1] * shape[2], config.latent)}
            continue
        for step in range(net.context.schedule.steps(geometry)):
            taken = net.context.schedule.take(torch.ones(*shape, config.latent), step)
            assert {p.shape for p in net.context.predict(state, step)} == {taken.shape}
            state = net.context.observe(state, step, taken)
        assert state.known.shape == (*shape, options["width"])
        assert state.psi is psi and state.code is code and state.unit is unit


def test_profiles_trade_work_for_rate() -> None:
    work = []
    for name in ("msp-light", "msp-fast", "msp", "msp-full"):
        config = CONFIGS[name]
        with torch.device("meta"):
            context = make_context(config)
        assert sum(p.numel() for p in context.parameters()) <= 2_500_000, name
        steps = {context.schedule.steps(Geometry(1, h, w)) for h, w in ((4, 4), (32, 48), (64, 64))}
        assert steps == {1 + 3 * config.context["levels"] * len(config.context["slices"])}
        work.append(kmac_per_pixel(CodecModel(config).eval(), 64, 64)["context"])
    assert work == sorted(work) and work[-2] <= 15


MSP: dict[str, Any] = {"levels": 2, "slices": [16, 32], "width": 24, "depth": 1}


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("hyperprior", {}),
        ("hyperprior", {"width": 0}),
        ("hyperprior", {"width": 24.0}),
        ("hyperprior", {"width": 24, "depth": 1}),
        ("msp", {}),
        ("msp", MSP | {"heads": 2}),
        ("msp", MSP | {"levels": 0}),
        ("msp", MSP | {"levels": 3}),
        ("msp", MSP | {"slices": [16, 16]}),
        ("msp", MSP | {"slices": [64, -16]}),
        ("msp", MSP | {"slices": []}),
        ("msp", MSP | {"slices": 48}),
        ("msp", MSP | {"width": True}),
        ("msp", MSP | {"depth": 0}),
    ],
)
def test_options_that_do_not_fit(system: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"options of|parts of|levels"):
        make_context(replace(CONFIGS["tiny"], system=system, context=options))
