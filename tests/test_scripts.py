"""The shell scripts, and the recipes of docs/recipes.md as they are written there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
Shell = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX shell")

_TOOLS = ("parallel", "ffmpeg", "jq", "xargs", "python3")
_BLOCK = re.compile(r"^(<!-- not run[^\n]*\n)?```(sh|python)\n(.*?)^```", re.M | re.S)


def recipes(language: str) -> list[str]:
    """The blocks of the page that are meant to be run."""
    blocks = _BLOCK.findall((ROOT / "docs/recipes.md").read_text())
    return [text for mark, kind, text in blocks if kind == language and not mark]


@pytest.fixture
def folder(tmp_path: Path, picture: np.ndarray) -> Path:
    """What the recipes assume, and a `lic` in ``bin`` that encodes with the tiny model."""
    Image.fromarray(picture).save(tmp_path / "photo.png")
    os.utime(tmp_path / "photo.png", (0, 0))
    for name in ("photos/a.png", "photos/b.png", "photos/sub/c.png", "frames/001.png", "frames/002.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[:, ::-1]).save(tmp_path / name, compress_level=0)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "bin").mkdir()
    lic = tmp_path / "bin/lic"
    lic.write_text(
        f'#!/bin/sh\n[ "$1" = encode ] && shift && set -- encode --model tiny "$@"\nexec {sys.executable} -m lic "$@"\n'
    )
    lic.chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def shell(folder: Path) -> Shell:
    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-euc", script, "sh", *arguments],
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", recipes("sh"), ids=lambda text: text.split("\n")[0][:50])
def test_recipes(shell: Shell, folder: Path, script: str) -> None:
    for tool in _TOOLS:
        if re.search(rf"\b{tool}\b", script) and shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    before = set(folder.rglob("*"))
    done = shell(script)
    assert done.returncode == 0, done.stderr
    assert "lic:" not in done.stderr
    made = [path for path in set(folder.rglob("*")) - before if path.is_file()]
    assert made or "rm {}" in script
    assert all(path.stat().st_size > 0 for path in made)


@pytest.mark.parametrize("snippet", recipes("python"), ids=["encode", "lists", "errors"])
def test_python_snippets(folder: Path, snippet: str) -> None:
    assert "import lic" in snippet
    script = snippet.replace('"base"', '"tiny"')
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bytes" in done.stdout or "not a .lic file" in done.stdout


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_completion_scripts(folder: Path, shell: Shell, kind: str) -> None:
    done = shell(f"_LIC_COMPLETE={kind}_source lic")
    assert done.returncode == 0, done.stderr
    assert "_LIC_COMPLETE" in done.stdout


def test_completion_knows_options_and_models(shell: Shell) -> None:
    def complete(words: str) -> str:
        position = len(words.split(" ")) - 1
        return shell(f"COMP_WORDS='{words}' COMP_CWORD={position} _LIC_COMPLETE=bash_complete lic").stdout

    assert "plain,encode" in complete("lic en")
    assert "plain,--no-clobber" in complete("lic encode --no")
    assert "plain,tiny" in complete("lic encode --model ti")
    assert "file," in complete("lic encode ph")


def test_convert_tree(shell: Shell, folder: Path) -> None:
    (folder / "photos/broken.png").write_bytes(b"no picture")
    script = 'scripts/convert_tree.sh "$@"'
    done = shell(script, "photos", "coded", "-q", "20")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("lic: photos/broken.png: ") and lines[1].startswith("photos: ") and len(lines) == 2
    (folder / "photos/broken.png").unlink()
    assert shell(script, "photos", "coded", "-q", "20").returncode == 0
    made = sorted(path.relative_to(folder).as_posix() for path in (folder / "coded").rglob("*.lic"))
    assert made == ["coded/a.lic", "coded/b.lic", "coded/sub/c.lic"]

    (folder / "coded/a.lic").write_bytes(b"damaged")
    done = shell(script, "photos", "coded")
    assert done.returncode == 1 and "coded/a.lic: not a .lic file" in done.stderr
    assert shell(script, "photos").returncode == 2
    assert shell(script, "photos", "coded", "--nonsense").returncode == 2
    (folder / "empty").mkdir()
    done = shell(script, "empty", "new")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "nothing to do" in done.stderr


@pytest.mark.parametrize("inotify", [True, False], ids=["inotifywait", "polling"])
def test_watch_folder(folder: Path, inotify: bool) -> None:
    if inotify and shutil.which("inotifywait") is None:
        pytest.skip("needs inotifywait")
    variables = {**environment(folder), "INTERVAL": "1"}
    if not inotify:
        tools = ("sh", "find", "ls", "sleep")
        for tool in tools:
            (folder / "bin" / tool).symlink_to(str(shutil.which(tool)))
        variables["PATH"] = str(folder / "bin")
    process = subprocess.Popen(
        [str(ROOT / "scripts/watch_folder.sh"), "photos", "coded"],
        cwd=folder,
        env=variables,
        stderr=subprocess.PIPE,
    )

    def wait_for(*names: str) -> None:
        deadline = time.monotonic() + 120
        while not all((folder / "coded" / name).exists() for name in names):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    try:
        wait_for("a.lic", "b.lic", "sub/c.lic")
        first = (folder / "coded/a.lic").stat().st_mtime_ns
        (folder / "photos/broken.png").write_bytes(b"no picture")
        shutil.copy(folder / "photo.png", folder / "photos/sub/new.png")
        wait_for("sub/new.lic")
        assert (folder / "coded/a.lic").stat().st_mtime_ns == first
    finally:
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "broken.png: not a picture" in stderr.decode()


def test_watch_folder_ends_where_the_options_are_wrong(shell: Shell) -> None:
    done = shell('scripts/watch_folder.sh "$@"', "photos", "coded", "--nonsense")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--nonsense" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_scripts_pass_shellcheck() -> None:
    scripts = sorted(map(str, (ROOT / "scripts").glob("*.sh")))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
