"""Batches on a Dask cluster: two worker processes that the test starts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lic import cli

Run = Callable[..., subprocess.CompletedProcess[bytes]]
TINY = ("--model", "tiny", "--device", "cpu")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    distributed = pytest.importorskip("distributed", reason="needs lic[cluster]")
    options = {"n_workers": 2, "processes": True, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def folder(tmp_path: Path, picture: np.ndarray) -> Path:
    for i in range(6):
        path = tmp_path / "in" / ("sub" if i % 2 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(picture, 5 * i, axis=1)).save(path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_cluster_writes_the_bytes_of_a_local_run(lic: Run, folder: Path, scheduler: str) -> None:
    dask = ("--engine", "dask", "--scheduler", scheduler)
    assert lic("encode", "in", "--output-dir", "local", "-r", *TINY).returncode == 0
    (folder / "in/broken.png").write_bytes(b"no picture")
    done = lic("encode", "in", "--output-dir", "out", "-r", "--report", "r.jsonl", *TINY, *dask)
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"lic: {os.path.join('in', 'broken.png')}: not a picture")
    assert len(tree(folder / "local")) == 6
    assert tree(folder / "out") == tree(folder / "local")
    report = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    assert sorted(line["target"] for line in report if line["ok"]) == [
        os.path.join("out", name) for name in sorted(tree(folder / "out"))
    ]

    source, target = (folder / "out").as_uri(), (folder / "back").as_uri()
    done = lic("decode", source, "--output-dir", target, "-r", "--device", "cpu", *dask)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert lic("decode", "local", "--output-dir", "back-local", "-r", "--device", "cpu").returncode == 0
    assert tree(folder / "back") == tree(folder / "back-local")

    (folder / "out/0.lic").write_bytes(b"done before")
    (folder / "out/2.lic").unlink()
    done = lic("encode", "in/0.png", "in/2.png", "--output-dir", "out", "--no-clobber", *TINY, *dask)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (folder / "out/0.lic").read_bytes() == b"done before"
    assert (folder / "out/2.lic").read_bytes() == (folder / "local/2.lic").read_bytes()


@pytest.mark.slow
def test_what_no_worker_can_do_fails_once(lic: Run, folder: Path, scheduler: str) -> None:
    dask = ("--engine", "dask", "--scheduler", scheduler)
    done = lic("encode", "in", "--output-dir", "out", "--model", "nonsense", *dask)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert "no model named 'nonsense'" in line


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer(lic: Run, folder: Path) -> None:
    pytest.importorskip("distributed", reason="needs lic[cluster]")
    done = lic("encode", "in", "--output-dir", "out", *TINY, "--engine", "dask", "--scheduler", "tcp://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == ["lic: no Dask scheduler answers at tcp://127.0.0.1:9"]


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.run(["encode", "in", "--output-dir", "out", "--engine", "dask", "--scheduler", "tcp://x:1"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "pip install 'lic[cluster]'" in line
    assert not (folder / "out").exists()
