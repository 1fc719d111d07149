"""Pictures to containers and back with the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lic.container import pack, parse
from lic.errors import CorruptError, LicError, UnsupportedError
from lic.model import store
from lic.model.context import Geometry
from lic.pipeline import codec, decode_rgb, encode_rgb, windows

MODELS = Path(__file__).parent / "data" / "models"


@pytest.fixture(scope="module")
def model() -> store.LoadedModel:
    return store.load_file(store.read_info(MODELS / "tiny.safetensors"))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some texture."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 40
    base = 128 + 70 * np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], -1)
    return np.clip(base + random.normal(0, 6, base.shape), 0, 255).astype(np.uint8)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 140), st.integers(1, 140), st.integers(0, 50_000))
def test_any_size_and_quality_comes_back_as_the_encoder_saw_it(height: int, width: int, code: int) -> None:
    model = store.load_file(store.read_info(MODELS / "tiny.safetensors"))
    encoded = encode_rgb(model, picture(height, width), code)
    container = parse(pack(encoded.container))
    decoded = decode_rgb(model, container)
    assert decoded.rgb.shape == (height, width, 3)
    assert np.array_equal(decoded.rgb, encoded.reconstruction)
    assert decoded.symbols_sha256 == encoded.symbols_sha256


def test_file_bytes_are_close_to_the_estimate(model: store.LoadedModel) -> None:
    for code in (2_500, 22_500, 47_500):
        encoded = encode_rgb(model, picture(256, 384), code)
        streams = encoded.container.tiles[0]
        assert 8 * sum(map(len, streams)) <= encoded.estimated_bits * 1.01 + 16 * len(streams)


def test_rate_and_quality_rise_together(model: store.LoadedModel) -> None:
    rgb = picture(192, 192)
    sizes, errors = [], []
    for code in (0, 15_000, 30_000, 45_000):
        encoded = encode_rgb(model, rgb, code)
        sizes.append(len(pack(encoded.container)))
        errors.append(float(np.square(encoded.reconstruction.astype(float) - rgb).mean()))
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)


def test_tiles_come_back_without_seams(model: store.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "TILE", 128)
    monkeypatch.setattr(codec, "LARGEST_TILE", 128 * 128)
    rgb = picture(200, 300)
    done: list[tuple[int, int]] = []
    encoded = encode_rgb(model, rgb, 30_000, progress=lambda a, b: done.append((a, b)))
    assert encoded.container.header.tile == 128
    assert done == [(i + 1, 6) for i in range(6)]
    assert np.array_equal(decode_rgb(model, parse(pack(encoded.container))).rgb, encoded.reconstruction)


def test_transforms_do_not_depend_on_their_windows(model: store.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb, grid = picture(310, 420), Geometry(1, 20, 28)
    code = torch.tensor([30_000.0])
    whole = windows.analysis(model.net, [rgb], grid, code)
    padded = np.pad(rgb, ((0, 10), (0, 28), (0, 0)), mode="edge")
    x = torch.from_numpy(padded).unsqueeze(0).float() / 255 - 0.5
    expected = model.net.latents_to_quantise(x, code)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    (pixels,) = windows.synthesis(model.net, whole.round(), code, [windows.Samples()])
    monkeypatch.setattr(windows, "WINDOW", 5)
    torch.testing.assert_close(windows.analysis(model.net, [rgb], grid, code), whole, atol=1e-4, rtol=1e-4)
    (cut,) = windows.synthesis(model.net, whole.round(), code, [windows.Samples()])
    assert (cut.int() - pixels.int()).abs().max() <= 1


def test_wrong_symbols_are_refused(model: store.LoadedModel) -> None:
    container = encode_rgb(model, picture(64, 64), 20_000).container
    wrong = replace(container, header=replace(container.header, symbols_crc=container.header.symbols_crc ^ 1))
    with pytest.raises(CorruptError, match="checksum"):
        decode_rgb(model, wrong)
    streams = list(container.tiles[0])
    streams[1] = bytes(len(streams[1]))
    with pytest.raises(CorruptError):
        decode_rgb(model, replace(container, tiles=(tuple(streams),)))


def test_other_weights_are_refused_by_name(model: store.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    container = encode_rgb(model, picture(64, 64), 20_000).container
    other = replace(container.header, entropy_id=b"\0\1\2\3")
    with pytest.raises(UnsupportedError, match="tiny"):
        decode_rgb(model, replace(container, header=other))
    monkeypatch.setenv("LIC_MODELS", str(MODELS))
    assert store.find_for(container.header).name == "tiny"
    with pytest.raises(UnsupportedError, match="other weights"):
        store.find_for(other)
    with pytest.raises(UnsupportedError, match="nowhere"):
        store.find_for(replace(other, model="nowhere"))


def test_stream_count_that_does_not_fit_is_refused(model: store.LoadedModel) -> None:
    container = encode_rgb(model, picture(64, 64), 20_000).container
    header = replace(container.header, streams=container.header.streams - 1)
    with pytest.raises(CorruptError, match="streams"):
        decode_rgb(model, replace(container, header=header, tiles=(container.tiles[0][:-1],)))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    data = bytearray((MODELS / "tiny.safetensors").read_bytes())
    data[-5000] ^= 1
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="damaged"):
        store.load_file(store.read_info(path))
    path.write_bytes(b"not weights at all")
    with pytest.raises(LicError, match="not a lic weights file"):
        store.read_info(path)


def test_a_model_survives_its_weights_file(model: store.LoadedModel, tmp_path: Path) -> None:
    infos, net = [], store.load_file(model.info).net  # of a file that keeps more bits than are written now
    for name in ("once", "again"):
        path = tmp_path / f"{name}.safetensors"
        store.write_model(path, net, {"provenance": model.info.provenance})
        infos.append(store.read_info(path))
        net = store.load_file(infos[-1]).net
    assert len({(info.entropy_id, info.synthesis_id) for info in infos}) == 1
