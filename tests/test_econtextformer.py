"""eContextformer: its groups and its attention, the specification, and files made with a small random model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lic import conformance, pipeline
from lic.exact import KERNELS, Fixed, attend, exact_arithmetic, oracle, use_kernel
from lic.exact.oracle import Activation, Array
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, Config
from lic.model.context import Geometry, make_context
from lic.model.context.econtextformer import BLOCK, CheckerboardSchedule, EContextformer, EContextformerState
from lic.model.store import LoadedModel, load_file, read_arrays, read_info, write_model

ROOT = Path(__file__).parents[1]
OPTIONS = {"segments": [4, 8, 12], "order": "channel", "width": 32, "heads": 4, "layers": 3, "window": 4}


def config_of(**changed: Any) -> Config:
    return replace(CONFIGS["tiny"], name="econ", latent=24, knots=3, system="econtextformer", context=OPTIONS | changed)


def small_model(**changed: Any) -> CodecModel:
    """Strong random weights in the whole entropy path, calibrated and frozen."""
    torch.manual_seed(5)
    config = config_of(**changed)
    net = CodecModel(config).eval().requires_grad_(False)
    for parameter in [*net.context.parameters(), *net.h_s.parameters()]:
        parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.nn.init.normal_(net.shortcut.weight, std=0.02)
    net.sigma.copy_(torch.rand(config.latent) / 100 + 0.01)
    with net.calibration():
        net.predict(*latents(config, 2, (12, 20)))
    net.freeze()
    return net


def latents(config: Config, batch: int, shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """z, y and quality codes."""
    random = np.random.default_rng(seed)
    h, w = shape
    z = np.rint(random.normal(0, 5, (batch, h // 4, w // 4, config.hyper_latent)))
    y = np.rint(random.laplace(0, 1, (batch, h, w, config.latent)) * 2.0 ** random.uniform(-2, 6, (batch, h, w, 1)))
    code = torch.from_numpy(random.integers(0, 50_001, batch))
    return torch.from_numpy(z).float(), torch.from_numpy(y).float(), code


@pytest.fixture(scope="module", params=["channel", "spatial"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The small model, through a weights file."""
    path = tmp_path_factory.mktemp("models") / "econ.safetensors"
    write_model(path, small_model(order=request.param), {"provenance": {}})
    return load_file(read_info(path))


# Options, groups


@pytest.mark.parametrize(
    "changed",
    [
        {"segments": [4, 8]},
        {"order": "raster"},
        {"window": 6},
        {"window": 0},
        {"heads": 5},
        {"heads": 0},
        {"slices": [24]},
    ],
)
def test_options_that_do_not_fit_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        make_context(config_of(**changed))


def test_missing_options_are_refused() -> None:
    with pytest.raises(ValueError, match="econtextformer"):
        make_context(replace(config_of(), context={"segments": [24]}))


def test_orders() -> None:
    assert CheckerboardSchedule([1, 2, 3], "spatial").groups == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert CheckerboardSchedule([1, 2, 3], "channel").groups == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_groups_are_halves_of_a_checkerboard() -> None:
    schedule = CheckerboardSchedule([1, 2], "spatial")
    y = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(3), indexing="ij"), dim=-1)
    for step, (segment, half) in enumerate(schedule.groups):
        for channel in range(segment, 2 * segment + 1):
            numbers = 100 * y[..., 0] + 10 * y[..., 1] + y[..., 2]
            taken = schedule.take(numbers[None], step)[0, :, channel - segment].tolist()
            expected = [
                100 * r + 10 * c + channel for r in range(4) for c in range(8) if (r + c) % 2 == half
            ]  # in raster order
            assert taken == expected


# Attention


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("keys", [32, 64, 96, 224])
def test_attention_in_blocks_equals_oracle(keys: int, extreme: bool) -> None:
    """Also where the sum over all keys exceeds what float32 holds."""
    random = np.random.default_rng(keys)
    q, k, v = (random.integers(-511, 512, (2, 3, n, 16)) for n in (8, keys, keys))
    if extreme:
        q, v = np.zeros_like(q), np.where(random.random((1, 1, 1, 16)) < 0.5, -511, 511) + 0 * v
        v[:, :, 0] = 510
    bias = random.normal(0, 0.01 if extreme else 2, (3, 8, keys)).astype(np.float32)
    mask = random.random((8, keys)) < 0.9
    expected = oracle.attend(q, k, v, 5, 4, bias, mask)
    parts = [Fixed(torch.from_numpy(x).float(), bits, 511) for x, bits in zip((q, k, v), (5, 4, 3), strict=True)]
    rest = torch.from_numpy(bias), torch.from_numpy(mask), True, BLOCK
    for kernel in KERNELS:
        with use_kernel(kernel), torch.no_grad():
            assert torch.equal(attend(*parts, *rest).x.long(), torch.from_numpy(expected)), kernel
    trained = attend(*(p._replace(x=p.x.requires_grad_()) for p in parts), *rest).x
    assert torch.equal(trained.detach().long(), torch.from_numpy(expected))


def test_attention_refuses_blocks_that_could_overflow() -> None:
    q = Fixed(torch.zeros(1, 128, 16), 5, 511)
    attend(q, q, q, torch.zeros(128, 128), None, True, BLOCK)
    for block in (BLOCK + 1, None):
        with pytest.raises(ValueError, match="certificate"):
            attend(q, q, q, torch.zeros(128, 128), None, True, block)


def changed_positions(net: CodecModel, group: int, position: tuple[int, int]) -> list[set[tuple[int, int]]]:
    """Where the predictions of each group change with the latents of one group at one position, 24 x 24 positions."""
    z, y, code = latents(net.config, 1, (24, 24))
    other = y.clone()
    segment, half = net.context.schedule.groups[group]
    assert sum(position) % 2 == half
    other[:, position[0], position[1], net.context.schedule.channels[segment]] += 40
    with torch.no_grad():
        pairs = zip(net.predict(z, y, code), net.predict(z, other, code), strict=True)
    different = torch.stack([(a != b)[0] for a, b in pairs]).any(dim=0)
    return [
        {(int(r), int(c)) for r, c in different[..., net.context.schedule.channels[s]].any(dim=-1).nonzero()}
        & {(r, c) for r in range(24) for c in range(24) if (r + c) % 2 == half}
        for s, half in net.context.schedule.groups
    ]


def test_windows_bound_the_reach_and_shifting_extends_it() -> None:
    one = changed_positions(small_model(layers=1), 1, (9, 9))
    assert not one[0] and not one[1]
    for later in one[2:]:
        assert later <= {(r, c) for r in range(8, 12) for c in range(8, 12)}
    assert any(one)
    three = changed_positions(small_model(layers=3), 1, (9, 9))
    assert not three[0] and not three[1]
    reached = set().union(*three)  # from window to shifted window to window
    assert reached <= {(r, c) for r in range(4, 16) for c in range(4, 16)}
    assert {min(r for r, _ in reached), min(c for _, c in reached)} == {4}
    assert {max(r for r, _ in reached), max(c for _, c in reached)} == {15}


def test_first_group_comes_from_the_hyperprior_alone() -> None:
    net = small_model()
    z, y, code = latents(net.config, 1, (8, 8))
    schedule = net.context.schedule
    before = net.predict(z, y, code)
    for layer in net.context.layers:
        layer.bias.fill_(3.0)
        for linear in (layer.attention.q, layer.attention.k, layer.attention.v, layer.attention.out):
            linear.bias.add_(0.5)
            linear._prepared = None
    after = net.predict(z, -y, code)
    for step in range(schedule.steps(Geometry(1, 8, 8))):
        same = all(
            torch.equal(schedule.take(a, step), schedule.take(b, step)) for a, b in zip(before, after, strict=True)
        )
        assert same == (step == 0)


def test_state_shapes_are_as_listed() -> None:
    net = small_model()
    context, geometry = net.context, Geometry(2, 12, 20)
    z, y, code = latents(net.config, 2, (12, 20))
    state = context.start(net.h_s(z, code), geometry, code, net.unit(code))
    groups, width, heads, positions = 6, OPTIONS["width"], OPTIONS["heads"], 8
    for step in range(groups):
        context.predict(state, step)
        assert isinstance(state, EContextformerState)
        assert state.tokens.shape == (2, 12, 10, groups, width)
        assert [x.shape for x in state.inputs] == [(2, 12, 10, 1, width)] * 3
        windows = [(3, 5), (4, 6), (3, 5)]
        for cache in (state.keys, state.values):
            assert [t.shape for t in cache] == [
                (2, *n, heads, (groups - 1) * positions, width // heads) for n in windows
            ]
            assert all(not t[..., step * positions :, :].any() for t in cache)
            assert all(t[..., : step * positions, :].any() for t in cache) or step == 0
        state = context.observe(state, step, context.schedule.take(y, step))


# The specification


class Specified(oracle.Model):
    """5.8, on plain (row, column) arrays and token by token, window by window."""

    def predict(self, z: Array, y: Array, code: int) -> tuple[Array, Array]:
        log2, index = (self._at(code, self.arrays[f"units.{name}"]) for name in ("log2", "index"))
        psi, wide = self._hyper_synthesis(z, code), "context.wide"
        sizes, h, w = self.options["segments"], *y.shape[:2]
        segments = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        count = len(sizes)
        row, column = np.indices((h, w))
        past: list[list[tuple[Array, Array, Array, Array]]] = [[] for _ in range(self.options["layers"])]
        eighths, scale_index = np.zeros_like(y), np.zeros_like(y)
        for g in range(2 * count):
            s, half = (g // 2, g % 2) if self.options["order"] == "spatial" else (g % count, g // count)
            here = np.nonzero((row + column) % 2 == half)  # rows and columns, in raster order
            own = self._sum(
                wide,
                self._param(wide, self.arrays["context.group"][g]),
                self._quality("context.quality", wide, code),
            )
            x = self._linear(f"context.psi.{s}", Activation(psi.x[here], psi.bits), wide)
            x = self._sum(wide, x, own)
            known = Activation(oracle.features(y[here][:, segments[s]], log2[segments[s]]), 7)
            e = self._linear(f"context.embed.{s}", known, wide)
            for i in range(self.options["layers"]):
                x = self._layer(i, (s, *here), x, e, past[i])
            answer = self._linear(f"context.head.{s}", self._to("context.narrow", x), "context.answer")
            result = oracle.prediction(answer.x, log2[segments[s]], index[segments[s]])
            for whole, part in zip((eighths, scale_index), result, strict=True):
                whole[here[0][:, None], here[1][:, None], segments[s]] = part
        return eighths, scale_index

    def _layer(self, i: int, place: tuple[Any, ...], x: Activation, e: Activation, past: list[Any]) -> Activation:
        name, wide, side = f"context.layers.{i}", "context.wide", self.options["window"]
        s, row, column = place
        first = side // 2 if i % 2 else 0
        _, k, v = self._project(f"{name}.attention", self._sum(wide, x, e))
        window = (row + first) // side, (column + first) // side
        if past:
            q, _, _ = self._project(f"{name}.attention", x)
            y = np.zeros_like(x.x)
            for number, (r, c) in enumerate(zip(row, column, strict=True)):
                keys, values, biases = [], [], []
                for (s2, row2, column2), window2, k2, v2 in past:
                    near = (window2[0] == window[0][number]) & (window2[1] == window[1][number])
                    keys.append(k2[near])
                    values.append(v2[near])
                    entry = s - s2 + len(self.options["segments"]) - 1
                    for distance in (r - row2[near], c - column2[near]):
                        entry = entry * (2 * side - 1) + distance + side - 1
                    biases.append(self.arrays[f"{name}.bias"][entry])
                heads = self.options["heads"]
                tokens = (q.x[number][None], np.concatenate(keys), np.concatenate(values))
                parts = [self._heads(t, heads) for t in tokens]
                bias = np.concatenate(biases).T[:, None]
                y[number] = oracle.attend(*parts, q.bits, k.bits, bias).swapaxes(0, 1).ravel()
        past.append((place, window, k.x, v.x))
        if len(past) > 1:
            x = self._sum(wide, x, self._linear(f"{name}.attention.out", Activation(y, v.bits), wide))
        return self._feed(f"{name}.feed", x, wide)


@pytest.mark.parametrize("shape", [(4, 4), (8, 12)])
def test_follows_the_specification(loaded: LoadedModel, shape: tuple[int, int]) -> None:
    net, info = loaded.net, loaded.info
    z, y, code = latents(net.config, 1, shape, seed=2)
    model = Specified(read_arrays(info), info.config["context"], info.grids)
    expected = model.predict(z[0].long().numpy(), y[0].long().numpy(), int(code))
    with torch.no_grad(), exact_arithmetic():
        got = net.predict(z, y, code)
    for mine, other in zip(got, expected, strict=True):
        assert np.array_equal(mine[0].long().numpy(), other)
        assert len(np.unique(other)) > 3


# Files


def noisy(height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(height + width)
    y, x = np.mgrid[0:height, 0:width] / 30
    base = 128 + 80 * np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], -1)
    return np.clip(base + random.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "code"), [(1, 1, 50_000), (64, 64, 0), (136, 200, 20_000)])
def test_pictures_of_any_size(loaded: LoadedModel, height: int, width: int, code: int) -> None:
    encoded = pipeline.encode_rgb(loaded, noisy(height, width), code)
    assert encoded.container.header.streams == 7
    decoded = pipeline.decode_rgb(loaded, encoded.container)
    assert decoded.symbols_sha256 == encoded.symbols_sha256
    assert np.array_equal(decoded.rgb, encoded.reconstruction)


def test_tiles(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.codec, "TILE", 64)
    monkeypatch.setattr(pipeline.codec, "LARGEST_TILE", 64 * 64)
    encoded = pipeline.encode_rgb(loaded, noisy(70, 130), 30_000)
    assert len(encoded.container.tiles) == 6
    assert pipeline.decode_rgb(loaded, encoded.container).symbols_sha256 == encoded.symbols_sha256


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_every_way_of_computing_gives_the_same_symbols(loaded: LoadedModel) -> None:
    file = conformance.decoded(loaded, pipeline.encode_rgb(loaded, noisy(100, 70), 25_000).container)
    expected = conformance.measure(loaded, file)
    assert conformance.differences(loaded, file, expected, conformance.variants(short=True)) == []


# Training


@pytest.mark.parametrize("exact", [True, False])
def test_every_parameter_of_the_context_learns(exact: bool) -> None:
    torch.manual_seed(0)
    net = CodecModel(config_of())
    assert isinstance(net.context, EContextformer)
    for linear in (*net.context.head, *(layer.attention.out for layer in net.context.layers)):
        torch.nn.init.normal_(linear.weight, std=0.1)
    z, y, code = latents(net.config, 2, (8, 12))
    if exact:
        with net.calibration(), torch.no_grad():
            net.predict(z, y, code)
        net.set_exact(True)
    p = net.predict(z, y, code)
    (p.mean / net.unit(code).steps[:, None, None] + torch.log(p.scale)).square().sum().backward()
    still = [n for n, p in net.context.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.context.parameters())


def test_training_lowers_the_rate() -> None:
    """Each segment repeats the one before, and each position its left neighbour: the context model finds out."""
    torch.manual_seed(0)
    net = CodecModel(config_of(layers=2))
    net.sigma.fill_(1 / float(net.gain(torch.zeros(1)).detach()[0, 0]))
    optimiser = torch.optim.Adam(net.context.parameters(), lr=3e-3)
    code = torch.zeros(2)
    bits = []
    for _ in range(60):
        y = torch.round(torch.randn(2, 8, 4, 1) * 5).repeat_interleave(2, dim=2).expand(-1, -1, -1, 24)
        p = net.predict(torch.zeros(2, 2, 2, net.config.hyper_latent), y, code)
        loss = (torch.log(p.scale) + ((y - p.mean) / p.scale).square() / 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bits.append(float(loss.detach()))
    assert np.mean(bits[-5:]) < np.mean(bits[:5]) - 0.5


@pytest.mark.slow
def test_the_script_counts_and_compares() -> None:
    command = [sys.executable, "scripts/econtextformer_ops.py", "--size", "64", "--width", "16", "--window", "4"]
    command += ["--segments", "4,8", "--layers", "2", "--repeat", "1", "--raster-steps", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    numbers = [[float(n) for n in line.split()[-4:]] for line in run.stdout.splitlines()[2:7]]
    steps, attention, linear, _ = zip(*numbers, strict=True)
    assert steps == (32, 4, 4, 4, 4)
    assert list(attention) == sorted(attention, reverse=True) and list(linear) == sorted(linear, reverse=True)
    # Windows times squares of groups: 4·4² at first, then 1² + 2² + 3² + 4², 1² + 2² + 3², and 1 + 2 + 3.
    np.testing.assert_allclose(np.array(attention[1:]) / attention[4], np.array([64, 30, 14, 6]) / 6, rtol=0.01)
