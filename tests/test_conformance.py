"""Files decode to the same symbols whatever computes them, and the check can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lic import conformance, pipeline
from lic.exact import layers
from lic.model import store

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "data" / "models"


@pytest.fixture(scope="module")
def model() -> store.LoadedModel:
    return store.load_file(store.read_info(MODELS / "tiny.safetensors"))


def encoded(model: store.LoadedModel, height: int, width: int, code: int) -> conformance.File:
    random = np.random.default_rng(height + width)
    y, x = np.mgrid[0:height, 0:width] / 30
    base = 128 + 80 * np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], -1)
    rgb = np.clip(base + random.normal(0, 12, base.shape), 0, 255).astype(np.uint8)
    return conformance.decoded(model, pipeline.encode_rgb(model, rgb, code).container)


@pytest.mark.parametrize(("height", "width", "code"), [(64, 128, 5_000), (100, 70, 30_000), (64, 64, 50_000)])
def test_every_way_of_computing_gives_the_same_symbols(
    model: store.LoadedModel, height: int, width: int, code: int
) -> None:
    file = encoded(model, height, width, code)
    expected = conformance.measure(model, file)
    assert conformance.differences(model, file, expected, conformance.variants()) == []


def test_tiles_in_any_order(model: store.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.codec, "TILE", 128)
    monkeypatch.setattr(pipeline.codec, "LARGEST_TILE", 128 * 128)
    file = encoded(model, 130, 250, 20_000)
    assert len(file.streams) == 4
    expected = conformance.measure(model, file)
    assert conformance.measure(model, file, backwards=True) == expected
    assert conformance.measure(model, file, batch=8, position=5) == expected


def test_streams_are_those_of_the_file(model: store.LoadedModel) -> None:
    file = encoded(model, 100, 70, 20_000)
    again = conformance.measure(model, file)
    changed = conformance.File(file.quality, file.geometries, file.streams, file.latents)
    changed.latents[0].y[0, 0, 0, 0] += 1
    other = conformance.measure(model, changed)
    assert other.streams != again.streams and other.rows != again.rows


def test_the_check_can_fail(model: store.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(model, 128, 128, 25_000)
    expected = conformance.measure(model, file)
    right = layers.depthwise

    def wrong_in_batches(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return right(x, weight * (1.01 if len(x) == 16 else 1.0))

    monkeypatch.setattr(layers, "depthwise", wrong_in_batches)
    found = conformance.differences(model, file, expected, conformance.variants(short=True))
    assert [phrase.partition(":")[0] for phrase in found] == ["batch 16"]


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/conformance.py", "tests/data/demo.png", "--model", "tiny", "--crop", "64"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "differ" not in run.stdout
    assert "no vector instructions in torch   same" in run.stdout
