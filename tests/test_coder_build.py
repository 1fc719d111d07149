"""How torchac and our own loops get compiled: silently, once, whatever happened to the process that tried before."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lic.coder import build

ROOT = Path(__file__).parent.parent
ROUND_TRIP = """
import sys
import numpy as np
from lic import coder
tables = coder.gaussian_tables([0.5, 50.0])
values, rows = np.array([0, 1, -70, 9]), np.array([3, 4, 12, 9])
data = coder.encode(values, rows, tables)
assert coder.decode(data, rows, tables).tolist() == values.tolist()
print(coder.backend_info(), file=sys.stderr)
"""
needs_torchac = pytest.mark.skipif(importlib.util.find_spec("torchac") is None, reason="torchac is not installed")
NO_PROGRAMS = "/nonexistent"


def start(cache: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("LIC_CODER", "CXX")}
    environment |= {"LIC_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", ROUND_TRIP],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(standard output, last line of standard error) of a process that must succeed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err.strip().splitlines()[-1]


def test_importing_the_coder_does_not_import_torch() -> None:
    code = "import sys, lic.coder; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_without_a_compiler(tmp_path: Path) -> None:
    out, backend = outcome(start(tmp_path, PATH=NO_PROGRAMS))
    assert out == ""
    assert backend.startswith("python (") and ", loops in python (" in backend
    assert backend.count("install") == 2


@needs_torchac
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_first_builds(tmp_path: Path) -> None:
    """A killed build leaves nothing that stops the next; two at once both succeed; nothing goes to stdout."""
    killed = start(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("torchac-*/build-*")):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.05)
    os.killpg(killed.pid, 9)  # with the compiler that it has started
    killed.communicate()

    both = [start(tmp_path), start(tmp_path)]
    compiled = "", "torchac (compiled), loops in C++ (compiled)"
    assert [outcome(process) for process in both] == [compiled] * 2
    assert not list(tmp_path.glob("*/build-*"))
    assert outcome(start(tmp_path, PATH=NO_PROGRAMS)) == compiled


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("LIC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    folder = build.folder_of("key", "name.so")
    assert folder.is_dir()
    assert tmp_path / "tmp" in folder.parents
    assert folder == build.folder_of("key", "name.so")  # found again by the next process

    folder.parent.chmod(0o777)  # a folder where others may put a library
    assert build.folder_of("key", "name.so").parent != folder.parent


def test_read_only_cache_with_a_finished_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIC_CACHE_DIR", str(tmp_path))
    folder = build.folder_of("key", "name.so")
    (folder / "name.so").touch()
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: pytest.fail("written to"))
    assert build.folder_of("key", "name.so") == folder


def test_a_compiler_error_becomes_one_line() -> None:
    told = "a.cpp:1: fatal error: Python.h: No such file"
    output = f"Error building extension 'torchac_backend': [1/2] c++ ...\n{told}\ncompilation terminated."
    assert build.one_line(RuntimeError(output)) == told
    assert build.one_line(RuntimeError("")) == "RuntimeError"
