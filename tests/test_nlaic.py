"""NLAIC: the wavefront, the specification's arithmetic in int64, pictures of all sizes, streams of several steps."""

from __future__ import annotations

import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from lic import coder, conformance, pipeline
from lic.errors import CorruptError
from lic.exact import oracle
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, Config
from lic.model.context import Geometry
from lic.model.context.nlaic import Wavefront
from lic.model.store import LoadedModel, load_file, read_arrays, read_info, write_model
from lic.pipeline.tile import Latents, Reader, Writer, code_tiles

ROOT = Path(__file__).parents[1]
CONTEXT: dict[str, Any] = {"slices": [2, 7, 3], "filters": 6, "features": 4, "widths": [16, 12]}
CONFIG = replace(CONFIGS["tiny"], name="nlaic", latent=12, system="nlaic", context=CONTEXT)
TABLES = coder.gaussian_tables()


def latents(config: Config, batch: int, height: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, height // 4, width // 4, config.hyper_latent, generator=random)
    y = torch.randn(batch, height, width, config.latent, generator=random)
    return torch.round(3 * z), torch.round(4 * y)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with strong weights everywhere, calibrated and frozen."""
    torch.manual_seed(5)
    net = CodecModel(CONFIG).eval().requires_grad_(False)
    for parameter in [*net.context.parameters(), *net.h_s.parameters()]:
        parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.nn.init.normal_(net.shortcut.weight, std=0.02)
    net.sigma.copy_(torch.rand(CONFIG.latent) / 20 + 0.01)
    with net.calibration():
        net.predict(*latents(CONFIG, 2, 12, 20, seed=1), torch.tensor([1000, 40_000]))
    net.freeze()
    target = tmp_path_factory.mktemp("models") / "nlaic.safetensors"
    write_model(target, net, {"provenance": {}})
    return target


@pytest.fixture(scope="module")
def model(path: Path) -> LoadedModel:
    return load_file(read_info(path))


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    random = np.random.default_rng(height + width)
    y, x = np.mgrid[0:height, 0:width] / 20
    base = 128 + 80 * np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)][:channels], -1)
    return np.clip(base + random.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


# The schedule


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 12), (8, 4), (36, 8)])
@pytest.mark.parametrize("slices", [[1], [1, 2], [4, 3, 5]])
def test_wavefronts(height: int, width: int, slices: list[int]) -> None:
    """Every step has latents, and the whole mask of each is in earlier steps."""
    schedule, channels = Wavefront(slices), sum(slices)
    geometry = Geometry(1, height, width)
    step_of = torch.full((1, height, width, channels), -1)
    steps = schedule.steps(geometry)
    assert steps == height + 3 * (channels - 1)
    for step in range(steps):
        values = schedule.take(step_of, step)
        assert values.shape[1] == width and values.numel() and (values == -1).all()
        schedule.put(step_of, step, torch.full_like(values, step))
    step_of = step_of[0, :, 0].T
    for c, r in np.ndindex(channels, height):
        above = step_of[c, max(r - 2, 0) : r]
        before = step_of[max(c - 2, 0) : c, max(r - 2, 0) : r + 3]
        assert (above < step_of[c, r]).all() and (before < step_of[c, r]).all()
    streams = [schedule.stream_of(step) for step in range(steps)]
    assert streams == sorted(streams) and set(streams) == set(range(len(slices)))


def test_steps_of_a_kodak_picture() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "nlaic_steps.py"))
    output = CliRunner().invoke(script["main"], ["--counts"], catch_exceptions=False).output
    assert "M = 192: 294912 steps in raster order, 6144 row by row, 605 wavefronts\n" in output
    assert "M = 320: 491520 steps in raster order, 10240 row by row, 989 wavefronts\n" in output


# The network


def test_state_shapes_are_as_listed(model: LoadedModel) -> None:
    z, y = latents(CONFIG, 2, 8, 12, seed=0)
    code, context = torch.tensor([0, 50_000]), model.net.context
    state = context.start(model.net.h_s(z, code), Geometry(2, 8, 12), code, model.net.unit(code))
    for step in range(3):
        context.predict(state, step)
        state = context.observe(state, step, context.schedule.take(y, step))
        assert state.own.shape == (2, 8, 12, CONFIG.latent, CONTEXT["features"])
        assert [recent.shape for recent in state.recent] == [(2, CONFIG.latent + 2, 2 * (12 + 4))] * 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slices": [2, 7, 4]}, "parts of 13 channels"),
        ({"slices": [0, 9, 3]}, "slices"),
        ({"slices": []}, "parts of 0 channels"),
        ({"widths": [16]}, "2 hidden layers"),
        ({"heads": 4}, "heads"),
    ],
)
def test_options_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodecModel(replace(CONFIG, context=CONTEXT | changed))


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    net = CodecModel(CONFIG)
    torch.nn.init.normal_(net.shortcut.weight, std=0.02)
    out = net(torch.rand(2, 64, 128, 3) - 0.5, torch.tensor([5000.0, 45_000.0]))
    out.y_bits.sum().backward()
    assert [name for name, p in net.context.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("code", [0, 22_500, 50_000])
def test_rows_follow_the_specification(model: LoadedModel, path: Path, code: int) -> None:
    """bitstream_spec.md 5.11 in int64, latent by latent; psi as h_s makes it."""
    arrays = read_arrays(read_info(path))
    grids = {name.removeprefix("context."): bits for name, bits in model.info.grids.items()}
    z, y = latents(CONFIG, 1, 8, 8, seed=code)
    codes = torch.tensor([code])
    got = model.net.predict(z, y, codes)
    psi = model.net.h_s(z, codes)

    def at(table: np.ndarray) -> np.ndarray:
        return oracle.interpolate(table.astype(np.int64), np.array([code]), 50_000 // (CONFIG.knots - 1))[0]

    def linear(name: str, x: np.ndarray, bits: int, grid: str, limit: int = 1023, leaky: bool = False) -> np.ndarray:
        weight, exponent, bias = (arrays[f"context.{name}.{part}"] for part in ("weight", "weight.exponent", "bias"))
        return oracle.linear(x, weight, exponent, bias, bits, grids[grid], limit, leaky)

    log2, index = (at(arrays[f"units.{name}"]) for name in ("log2", "index"))
    features = oracle.features(y[0].numpy().astype(np.int64), log2)
    p, g = np.split(features, 2, axis=-1)
    quality = at(oracle.constant(arrays["context.quality.table"], grids["wide"], 32767))
    own = linear("psi", psi.x[0].numpy().astype(np.int64), psi.bits, "wide", 32767)
    h, w, channels = p.shape
    for r, x, c in np.ndindex(h, w, channels):
        inputs = []
        rows = [(c + i, r + j) for i in (-2, -1) for j in (-2, -1, 0, 1, 2)] + [(c, r - 2), (c, r - 1)]
        for plane, row in rows:
            for column in range(x - 2, x + 3):
                inside = plane >= 0 and 0 <= row < h and 0 <= column < w
                inputs += [p[row, column, plane], abs(g[row, column, plane])] if inside else [0, 0]
        k = CONTEXT["features"]
        mine = oracle.add(own[r, x, c * k : (c + 1) * k], quality, 32767)
        mine = oracle.rescale(mine, grids["wide"], grids["joined"], 1023)
        t = np.concatenate([linear("filters", np.array(inputs), 7, "joined"), mine])
        t = linear("first", t, grids["joined"], "hidden1", leaky=True)
        t = linear("second", t, grids["hidden1"], "hidden2", leaky=True)
        answer = linear("head", t, grids["hidden2"], "answer", 32767)
        eighths, scale_index = oracle.prediction(answer, log2[c : c + 1], index[c : c + 1])
        assert (int(got.eighths[0, r, x, c]), int(got.scale_index[0, r, x, c])) == (eighths[0], scale_index[0])


# Pictures


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 3), (64, 64, 1), (136, 200, 3)])
def test_pictures_come_back(model: LoadedModel, height: int, width: int, channels: int) -> None:
    encoded = pipeline.encode_rgb(model, picture(height, width, channels), 30_000)
    assert encoded.container.header.streams == 4
    decoded = pipeline.decode_rgb(model, encoded.container)
    assert decoded.symbols_sha256 == encoded.symbols_sha256
    assert np.array_equal(decoded.rgb, encoded.reconstruction)


def test_every_way_of_computing_gives_the_same_symbols(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a picture in tiles of unequal heights, therefore with unequal numbers of steps."""
    monkeypatch.setattr(pipeline.codec, "TILE", 128)
    monkeypatch.setattr(pipeline.codec, "LARGEST_TILE", 128 * 64)
    encoded = pipeline.encode_rgb(model, picture(150, 64), 20_000)
    assert pipeline.decode_rgb(model, encoded.container).symbols_sha256 == encoded.symbols_sha256
    file = conformance.decoded(model, encoded.container)
    assert [geometry.height for geometry in file.geometries] == [8, 4]
    assert conformance.streams_of(model, file) == file.streams
    expected = conformance.measure(model, file)
    assert conformance.differences(model, file, expected, conformance.variants(short=True)) == []


def test_damaged_streams_are_seen(model: LoadedModel) -> None:
    encoded = pipeline.encode_rgb(model, picture(64, 64), 30_000)
    container = encoded.container
    for stream in range(1, 4):
        for change in (lambda data: data[:-2], lambda data: data + bytes(8), lambda data: b"\xff" + data[1:]):
            streams = list(container.tiles[0])
            streams[stream] = change(streams[stream])
            with pytest.raises(CorruptError):
                pipeline.decode_rgb(model, replace(container, tiles=(tuple(streams),)))


# Streams of several steps


def test_a_stream_is_that_of_its_steps_in_a_row(model: LoadedModel) -> None:
    z, y = latents(CONFIG, 1, 8, 12, seed=2)
    seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    class Recorder(Writer):
        def code(self, stream: int, rows: np.ndarray, tables: coder.Tables, values: Any, *, last: bool) -> np.ndarray:
            seen.setdefault(stream, []).append((rows, values))
            return super().code(stream, rows, tables, values, last=last)

    writer = Recorder()
    code_tiles(model, Geometry(1, 8, 12), [20_000], [writer], Latents(z, y))
    steps = Counter(model.net.context.schedule.stream_of(step) for step in range(8 + 3 * 11))
    assert [len(seen[stream]) for stream in range(4)] == [1, *(steps[stream] for stream in range(3))]
    for stream in range(1, 4):
        rows, values = (np.concatenate(part) for part in zip(*seen[stream], strict=True))
        assert writer.streams[stream] == coder.encode(values, rows, model.y_tables)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=20), st.integers(0, 2**31))
def test_streams_may_interleave(steps: list[tuple[int, int]], seed: int) -> None:
    """Steps (stream, number of values) in any order, each stream ending at the last step that it has."""
    random = np.random.default_rng(seed)
    last = {stream: i for i, (stream, _) in enumerate(steps)}
    rows = [random.integers(0, len(TABLES), count) for _, count in steps]
    values = [random.integers(-40, 41, count).astype(np.int32) for _, count in steps]
    writer = Writer()
    for i, (stream, _) in enumerate(steps):
        assert writer.code(stream, rows[i], TABLES, values[i], last=i == last[stream]) is values[i]
    streams = dict(zip(sorted(last), writer.streams, strict=True))
    for stream, data in streams.items():
        mine = [i for i, step in enumerate(steps) if step[0] == stream]
        whole = coder.encode(*(np.concatenate([part[i] for i in mine]) for part in (values, rows)), TABLES)
        assert data == whole
    reader = Reader(tuple(streams.get(stream, b"") for stream in range(4)))
    for i, (stream, _) in enumerate(steps):
        assert np.array_equal(reader.code(stream, rows[i], TABLES, None, last=i == last[stream]), values[i])
