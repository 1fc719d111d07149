"""Shared by all tests: the tiny model, a picture, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parent / "data"
# Before anything asks for models: the tests code with the tiny one, which never changes.
os.environ["LIC_MODELS"] = str(DATA / "models")
# Threads that wait for each other crawl on a machine with other work, and the tests' networks are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The processes that tests start run this checkout too, wherever they are started and whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

TIMEOUT = 300.0  # seconds
Run = Callable[..., subprocess.CompletedProcess[bytes]]


def pytest_report_header() -> str:
    from lic.coder import backend_info

    return f"coder: {backend_info()}"


@pytest.fixture
def picture() -> np.ndarray:
    """uint8 (44, 70, 3): smooth, no multiple of anything."""
    y, x = np.mgrid[0:44, 0:70]
    return np.stack([3 * x, 5 * y, 60 + x + y], axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def demo() -> np.ndarray:
    """The bundled photo, uint8 (512, 768, 3)."""
    return np.asarray(Image.open(DATA / "demo.png").convert("RGB"))


@pytest.fixture
def lic(tmp_path: Path) -> Run:
    """Run `lic ARGUMENT...` in ``tmp_path``; keyword arguments go to subprocess.run.

    With none but ``input``, ``cwd`` and ``env`` the process is a forked one, which is faster.
    """

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
        if forked.SUPPORTED and options.keys() <= {"input", "cwd", "env"}:
            cwd, environment = options.get("cwd", tmp_path), options.get("env", os.environ)
            return forked.run([*map(str, arguments)], cwd, environment, options.get("input"), TIMEOUT)
        command = [sys.executable, "-m", "lic", *map(str, arguments)]
        if "input" not in options and "stdin" not in options:
            options["stdin"] = subprocess.DEVNULL
        defaults = {"cwd": tmp_path, "capture_output": True, "timeout": TIMEOUT, "check": False}
        return subprocess.run(command, **{**defaults, **options})

    return run
