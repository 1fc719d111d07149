"""The table of all context models: scripts/systems.py on the tiny model and small models on its transforms."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA
from PIL import Image

import lic
from lic.bench.bdrate import Curve, bd_rate
from lic.bench.metrics import psnr
from lic.exact import exact_arithmetic
from lic.model import store
from lic.model.codec import CodecModel
from lic.quality import code_of

SCRIPT = Path(__file__).parent.parent / "scripts" / "systems.py"
SMALL = ("tiny", "tiny-econtextformer", "tiny-hyperprior", "tiny-msp", "tiny-nlaic")
QUALITIES = (10, 60)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models that share transforms, and with one whose decoder scales latents by other factors."""
    folder = tmp_path_factory.mktemp("models")
    for name in SMALL:
        shutil.copy(DATA / "models" / f"{name}.safetensors", folder)
    net = store.load_file(store.read_info(folder / "tiny-hyperprior.safetensors")).net
    net.config = replace(net.config, name="moved")
    net.log_igain.table += 0.02
    provenance = {"steps": 1234, "megapixels": 56, "settings": {"part": "gains"}}
    store.write_model(folder / "moved.safetensors", net, {"provenance": provenance})
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[0:90, 0:120]
    for i in range(2):
        rgb = np.stack([2 * x, 2 * y, 60 + x + y], axis=-1) + 40 * np.sin(x / (3 + i) + y / 9)[:, :, None]
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> click.Command:
    """The command, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def page(models: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all sections; its numbers lie in results/page.json."""
    target = tmp_path_factory.mktemp("docs") / "page.md"
    options = {"base": "tiny", "reference": "tiny-hyperprior", "qualities": ",".join(map(str, QUALITIES)), "crop": 64,
               "large": "192x128", "coded-slow": 1, "repeat": 1, "raster-steps": 2, "threads": 1}  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(pictures), "--output", str(target), *given],
        env={**os.environ, "LIC_MODELS": str(models)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def kept(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / "results" / "page.json").read_text(encoding="utf-8"))


def pixels_of(picture: Path) -> np.ndarray:
    return np.asarray(Image.open(picture))


def bits_by_hand(model: CodecModel, base: CodecModel, rgb: np.ndarray, quality: float) -> float:
    """Of y and z, with the whole picture padded at once and the masses in float64."""
    padded = np.pad(rgb, [(0, -n % 64) for n in rgb.shape[:2]] + [(0, 0)], mode="edge")
    code = torch.tensor([float(code_of(quality))])
    with torch.no_grad(), exact_arithmetic():
        y, z = base.latents(torch.from_numpy(padded)[None].float() / 255 - 0.5, code)
        prediction = model.predict(z, y, code)
        total = float(model.prior.bits(z, code).sum())
    for value, mean, scale in zip(*(t.double().flatten() for t in (y, prediction.mean, prediction.scale)), strict=True):
        near, far = ((abs(float(value - mean)) + side) / float(scale) / math.sqrt(2) for side in (-0.5, 0.5))
        mass = (math.erfc(near) - math.erfc(far)) / 2
        total -= math.log2(max(mass, 1e-9))
    return total


@pytest.mark.slow
def test_bits_are_those_of_the_same_integers(models: Path, pictures: Path, page: Path, kept: dict[str, Any]) -> None:
    loaded = {name: store.load_file(store.read_info(models / f"{name}.safetensors")).net for name in SMALL}
    found = kept["bits"]
    assert tuple(found["models"]) == SMALL
    assert (found["pictures"], found["pixels"], found["qualities"]) == (2, 2 * 90 * 120, list(QUALITIES))
    totals = {
        name: np.array([
            sum(bits_by_hand(net, loaded["tiny"], pixels_of(path), quality) for path in pictures.iterdir())
            for quality in QUALITIES
        ])
        for name, net in loaded.items()
    }  # fmt: skip
    text = page.read_text(encoding="utf-8")
    for name, total in totals.items():
        entry = found["models"][name]
        np.testing.assert_allclose(np.add(entry["y"], entry["z"]), total, rtol=1e-3)
        percent = 100 * ((total / totals["tiny-hyperprior"]).mean() - 1)
        shown = [float(n) for n in re.findall(rf"^\| `{name}` \|.* ([+-]\d+\.\d) %", text, re.M)]
        assert shown and all(abs(n - percent) < 0.2 for n in shown)
    for entry in found["models"].values():
        assert abs(entry["bytes"] / entry["estimate"] - 1) < 0.05  # streams of a few bytes


@pytest.mark.slow
def test_other_transforms_are_compared_at_equal_psnr(
    models: Path, pictures: Path, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIC_MODELS", str(models))
    curves = []
    for name in ("tiny", "moved"):
        codec, points = lic.Codec(name, "cpu"), []
        for quality in QUALITIES:
            each = []
            for path in pictures.iterdir():
                rgb = pixels_of(path)
                data = codec.encode(rgb, quality)
                each.append((8 * len(data) / (90 * 120), psnr(rgb, codec.decode_array(data))))
            points.append(np.mean(each, axis=0))
        curves.append(Curve(name, *zip(*points, strict=True)))
    found = kept["bits"]["own_transforms"]
    assert list(found) == ["moved"]
    assert found["moved"]["bpp"] == pytest.approx(curves[1].bpp)
    assert found["moved"]["bd_rate"] == pytest.approx(bd_rate(*curves), abs=1e-6)


@pytest.mark.slow
def test_costs(models: Path, page: Path, kept: dict[str, Any]) -> None:
    found = kept["costs"]["models"]
    assert set(found) == {"moved", *SMALL}
    assert {name: (entry["steps"], entry["streams"]) for name, entry in found.items()} == {
        "tiny": (8, 8), "tiny-econtextformer": (6, 6), "tiny-hyperprior": (1, 1), "tiny-msp": (13, 13),
        "tiny-nlaic": (8 + 3 * 47, 3), "moved": (1, 1),
    }  # fmt: skip
    for name, entry in found.items():
        info = store.read_info(models / f"{name}.safetensors")
        assert entry["kmac"] == info.kmac["context"] and entry["decoder_kmac"] == info.kmac["decoder"]
        assert 0 < entry["parameters"] < info.parameters
        assert entry["times"]["encode"] > 0 and entry["times"]["decode"] > 0
        assert os.name == "nt" or entry["memory_mb"] > 50
    text = page.read_text(encoding="utf-8")
    assert "`tiny-nlaic`: no weights come with lic" in text
    row = re.search(r"^\| `moved` \|.*", text, re.M)
    assert row is not None and row[0].endswith("| 1,234 steps, 56 Mpixel (gains) |")


@pytest.mark.slow
def test_claims(page: Path, kept: dict[str, Any]) -> None:
    cache = kept["groupedmixer"]["models"]["tiny"]
    assert cache["difference"] == 0 and cache["kmac"]["recomputed"] > 6 * cache["kmac"]["cached"]
    rows = kept["econtextformer"]["models"]["tiny-econtextformer"]
    assert [row["steps"] for row in rows["crop"]] == [48, 6, 6, 6, 6]
    assert [row["steps"] for row in rows["whole"]] == [192, 6, 6, 6, 6]
    counts = kept["nlaic"]["models"]["tiny-nlaic"]["counts"]
    assert counts == {"raster order": 8 * 8 * 48, "row by row": 8 * 48, "wavefronts": 8 + 3 * 47}
    assert kept["nlaic"]["paper_counts"]["wavefronts"] == 8 + 3 * 191
    assert kept["msp"]["models"]["tiny-msp"]["steps"] == [13, 13, 13]
    positions = 12 * 8
    assert {name: entry["steps"] for name, entry in kept["msp"]["raster"].items()} == {
        "tiny-econtextformer": positions * 3, "tiny-nlaic": positions * 48, "tiny-msp": positions * 2,
    }  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert (
        text.count("\n## ") == 7 and "DIFFER" not in text.replace("DIFFER by more than 1 %", "") and "nan" not in text
    )


@pytest.mark.slow
def test_the_page_names_no_folder_and_is_written_again_from_the_numbers(
    page: Path, models: Path, main: click.Command
) -> None:
    text = page.read_text(encoding="utf-8")
    for written in (text, (page.parent / "results" / "page.json").read_text(encoding="utf-8")):
        assert str(page.parent) not in written and str(models) not in written
    page.write_text("")
    CliRunner().invoke(main, ["--sections", "", "--output", str(page)], catch_exceptions=False)
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "arguments", [[], ["--sections", "none", "."], ["--qualities", "101", "."], ["--large", "x", "."]]
)
def test_what_cannot_be_measured_is_a_usage_error(main: click.Command, tmp_path: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "page.md")])
    assert done.exit_code == 2 and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_that_of_the_process_itself() -> None:
    script = (
        "import subprocess, sys\n"
        "held = b'1' * 500_000_000\n"
        "child = 'from lic.bench.measure import peak_memory_mb; print(peak_memory_mb())'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, check=True).stdout.decode())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 400
