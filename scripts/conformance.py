"""Do files decode to the same symbols, whatever computes them?

Usage: python scripts/conformance.py PICTURE_OR_FILE_OR_DIR... [--model base] [--qualities 10,40,80] [--crop 256]

Pictures are encoded first, on every device there is. Every .lic file is then decoded, and its symbols are coded again,
in all the ways of `lic.conformance`, on every device, and in processes that are limited to other instruction sets.
Prints a table; exit status 1 if anything differs. `--path float` and `--path conv2d` show that the check can fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lic import conformance, container, pipeline
from lic.exact import layers
from lic.images import PICTURE_SUFFIXES
from lic.model import store
from lic.quality import code_of

ENVIRONMENTS = {  # other kernels of the libraries that torch computes with
    "no vector instructions in torch": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2 in torch": {"ATEN_CPU_CAPABILITY": "avx2"},
    "AVX-512 in torch": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN limited to SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN limited to AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "MKL limited to SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL in compatible mode": {"MKL_CBWR": "COMPATIBLE"},
}


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", default="base", show_default=True)
@click.option("--qualities", default="40", show_default=True, help="At which pictures are encoded.")
@click.option("--crop", type=int, help="Use the middle of each picture only, so many pixels a side.")
@click.option("--path", type=click.Choice(["exact", "float", "conv2d"]), default="exact", show_default=True)
@click.option("--expect", type=click.Path(path_type=Path), hidden=True, help="Digests; for the script's own processes.")
def main(
    sources: tuple[Path, ...], model: str, qualities: str, crop: int | None, path: str, expect: Path | None
) -> None:
    loaded = {device: store.load(model, device) for device in (_devices() if expect is None else ["cpu"])}
    if expect is not None:
        _worker(loaded["cpu"], sources, json.loads(expect.read_text()), path)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = _lic_files(loaded, sources, [float(q) for q in qualities.split(",")], crop, Path(folder))
        expected = {}
        failures: Counter[str] = Counter()
        names = [name for name, _, _ in conformance.variants()]
        with click.progressbar(files, label="decoding", file=sys.stderr) as bar:
            for file in bar:
                read = conformance.decoded(loaded["cpu"], container.parse(file.read_bytes()))
                with _path(loaded["cpu"], path):
                    expected[file.name] = conformance.measure(loaded["cpu"], read)
                    chosen = conformance.variants()
                    found = conformance.differences(loaded["cpu"], read, expected[file.name], chosen)
                for device, other in loaded.items():
                    if device != "cpu" and conformance.measure(other, read) != expected[file.name]:
                        found.append(f"{device}: other symbols")
                failures.update(phrase.partition(":")[0] for phrase in found)
        missing = []
        names += [device for device in loaded if device != "cpu"]
        digests = Path(folder) / "expected.json"
        digests.write_text(json.dumps({name: dataclasses.asdict(digest) for name, digest in expected.items()}))
        for name, variables in ENVIRONMENTS.items():
            command = [sys.executable, __file__, *map(str, files), "--model", model, "--path", path]
            run = subprocess.run(
                [*command, "--expect", str(digests)], env=os.environ | variables, capture_output=True, text=True
            )
            if run.returncode < 0:  # killed by an instruction that this processor does not have
                missing.append(name)
                continue
            if run.returncode:
                click.echo(run.stderr, err=True)
                sys.exit(1)
            names.append(name)
            failures[name] = len(json.loads(run.stdout))
    click.echo(
        f"{len(files)} files, model {model}, path {path}, torch {torch.__version__}, devices {', '.join(loaded)}"
    )
    for name in names:
        result = f"{failures[name]} of {len(files)} files differ" if failures[name] else "same"
        click.echo(f"{name:<34}{result}")
    for name in missing:
        click.echo(f"{name:<34}not on this processor")
    sys.exit(1 if failures.total() else 0)


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _lic_files(
    loaded: dict[str, store.LoadedModel], sources: tuple[Path, ...], qualities: list[float], crop: int | None, to: Path
) -> list[Path]:
    """The .lic files among the sources, and the pictures encoded on every device."""
    files = []
    for source in (s for given in sources for s in (sorted(given.iterdir()) if given.is_dir() else [given])):
        if source.suffix == ".lic":
            files.append(source)
        elif source.suffix.lower() in PICTURE_SUFFIXES:
            rgb = np.asarray(Image.open(source).convert("RGB"))
            if crop is not None:
                top, left = (max(0, (n - crop) // 2) for n in rgb.shape[:2])
                rgb = rgb[top : top + crop, left : left + crop]
            for quality in qualities:
                for device, model in loaded.items():
                    data = container.pack(pipeline.encode_rgb(model, rgb, code_of(quality)).container)
                    files.append(to / f"{source.stem}-{quality:g}-{device}.lic")
                    files[-1].write_bytes(data)
    return files


def _worker(model: store.LoadedModel, files: tuple[Path, ...], expected: dict[str, dict[str, str]], path: str) -> None:
    """Print the names of the files that this process computes otherwise."""
    wrong = []
    for file in files:
        with contextlib.suppress(Exception):  # whatever it is, the file does not come out as expected
            read = conformance.decoded(model, container.parse(file.read_bytes()))
            with _path(model, path):
                if dataclasses.asdict(conformance.measure(model, read)) == expected[file.name]:
                    continue
        wrong.append(file.name)
    click.echo(json.dumps(wrong))


@contextlib.contextmanager
def _path(model: store.LoadedModel, path: str):  # type: ignore[no-untyped-def]
    """Break the exact path on request: floating point throughout, or a dense convolution for the depthwise one."""
    exact_depthwise = layers.depthwise
    if path == "float":
        model.net.set_exact(False)
    elif path == "conv2d":
        layers.depthwise = _dense_convolution
    try:
        yield
    finally:
        model.net.set_exact(True)
        layers.depthwise = exact_depthwise


def _dense_convolution(x: Tensor, weight: Tensor) -> Tensor:
    kernel = torch.diag_embed(weight).permute(2, 3, 0, 1)  # (C, C, 3, 3)
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=1).permute(0, 2, 3, 1).contiguous()


if __name__ == "__main__":
    main()
