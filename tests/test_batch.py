"""Batches as a user meets them: worker processes, reports, interruptions, full disks, URLs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lic import batch, cli, decode, engine
from lic.batch import Job
from lic.errors import LicError, UsageError
from lic.inspection import info_of
from lic.outcome import Outcome

Run = Callable[..., subprocess.CompletedProcess[bytes]]
TINY = ("--model", "tiny", "--device", "cpu")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX processes and signals")


def fill(folder: Path, count: int, side: int = 64) -> None:
    """``count`` different pictures, every third one in a subfolder."""
    y, x = np.mgrid[0:side, 0:side]
    for i in range(count):
        path = folder / ("sub" if i % 3 == 0 else "") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([x + i, y, (x + y) // 2], axis=-1).astype(np.uint8)).save(path)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_anybody() -> None:
    """Before a program starts: take from root the right to write everywhere, which makes no test of permissions."""
    if os.geteuid() == 0:
        drop_from_bounding_set, dac_override = 24, 1
        if ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0) != 0:
            raise OSError("cannot drop a capability")


# ----------------------------------------------------------------------------------------------------
# what is done


def test_worker_processes_give_the_same_files(lic: Run, tmp_path: Path) -> None:
    fill(tmp_path / "in", 5)
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    for jobs in (1, 2):
        done = lic("encode", "in", "--output-dir", f"out{jobs}", "-r", "--jobs", jobs, *TINY)
        assert (done.returncode, done.stdout) == (1, b"")
        (line,) = done.stderr.decode().splitlines()
        assert "broken.png: not a picture" in line
    assert len(tree(tmp_path / "out1")) == 5
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")

    done = lic("decode", "out1", "--output-dir", "back", "-r", "--jobs", 2, "--device", "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for name, data in tree(tmp_path / "out1").items():
        found = np.asarray(Image.open(tmp_path / "back" / name.replace(".lic", ".png")))
        assert np.array_equal(found, np.asarray(decode(data, device="cpu")))


def test_report_and_json_have_a_line_per_file(lic: Run, tmp_path: Path) -> None:
    fill(tmp_path / "in", 2)
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    done = lic("encode", "in", "--output-dir", "out", "-r", "--report", "r.jsonl", "--json", *TINY)
    assert done.returncode == 1
    said = [json.loads(line) for line in done.stderr.decode().splitlines() if line.startswith("{")]
    lines = lines_of(tmp_path / "r.jsonl")
    assert said == lines and len(lines) == 3
    (bad,) = (line for line in lines if not line["ok"])
    assert bad["source"] == os.path.join("in", "broken.png") and "not a picture" in bad["error"]
    for line in lines:
        if line["ok"]:
            source, target = (tmp_path / line[key] for key in ("source", "target"))
            assert (line["bytes_in"], line["bytes_out"]) == (source.stat().st_size, target.stat().st_size)
            assert (line["width"], line["height"], line["model"], line["quality"]) == (64, 64, "tiny", 40)
            assert line["bpp"] == pytest.approx(8 * line["bytes_out"] / 64**2, abs=1e-3)
            assert line["psnr"] > 20 and line["seconds"] > 0

    done = lic("decode", "out", "--output-dir", "back", "-r", "--report", "r.jsonl", "--jobs", 2)  # appends
    assert (done.returncode, done.stderr) == (0, b"")
    symbols = {line["target"]: line["symbols_sha256"] for line in lines if line["ok"]}
    decoded = lines_of(tmp_path / "r.jsonl")[3:]
    assert {line["source"]: line["symbols_sha256"] for line in decoded} == symbols
    assert all((line["model"], line["quality"]) == ("tiny", 40) for line in decoded)


def test_a_single_file_is_reported_too(lic: Run, tmp_path: Path) -> None:
    fill(tmp_path, 2)
    assert lic("encode", "001.png", "a.lic", "--report", "r.jsonl", *TINY).returncode == 0
    assert lic("encode", "missing.png", "b.lic", "--report", "r.jsonl", *TINY).returncode == 1
    good, bad = lines_of(tmp_path / "r.jsonl")
    assert good["ok"] and good["target"] == "a.lic"
    assert not bad["ok"] and bad["error"].startswith("No such file")


def test_hidden_files_and_stale_temporaries_are_no_inputs(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    for name in ("._001.png", ".lic-0123456789abcdef.tmp", ".thumbnails/001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    jobs = batch.many([str(tmp_path)], "out", ".lic", (".png",), recursive=True)
    assert [Path(job.target).as_posix() for job in jobs] == ["out/001.lic", "out/sub/000.lic"]


_names = st.text(st.sampled_from("aB.é -"), min_size=1, max_size=4).filter(lambda name: not name.startswith("."))


_files = st.tuples(st.lists(_names, max_size=2), _names, st.sampled_from((".png", ".JPG", ".txt")))


@given(files=st.lists(_files, max_size=8))
def test_every_picture_of_a_tree_has_one_output_of_its_own(
    files: list[tuple[list[str], str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for folders, stem, suffix in files:
        path = root.joinpath(*folders, stem + suffix)
        with contextlib.suppress(OSError):  # a name is a file and a folder
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    pictures = {path for path in root.rglob("*") if path.is_file() and path.suffix in (".png", ".JPG")}
    targets = {path.relative_to(root).with_suffix(".lic") for path in pictures}
    arguments = ([str(root)], "out", ".lic", (".png", ".jpg"))
    if not pictures:
        with pytest.raises(LicError, match="nothing to do"):
            batch.many(*arguments, recursive=True)
    elif len(targets) < len(pictures):
        with pytest.raises(UsageError, match="would both become"):
            batch.many(*arguments, recursive=True)
    else:
        jobs = batch.many(*arguments, recursive=True)
        assert {Path(job.source) for job in jobs} == pictures
        assert {Path(job.target).relative_to("out") for job in jobs} == targets


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "a.png", "a.lic", "--jobs", "2"],
        ["encode", "a.png", "--output-dir", "o", "--jobs", "0"],
        ["encode", "a.png", "--output-dir", "o", "--engine", "dask"],
        ["encode", "a.png", "--output-dir", "o", "--scheduler", "tcp://x:1"],
        ["encode", "a.png", "a.lic", "--engine", "dask", "--scheduler", "tcp://x:1"],
        ["decode", "a.lic", "--output-dir", "o", "--engine", "dask", "--scheduler", "tcp://x:1", "--jobs", "2"],
        ["decode", "a.lic", "--output-dir", "o", "--engine", "spark"],
        ["encode", "", "a.lic"],
        ["encode", "", "--output-dir", "o"],
        ["encode", "a.png", "--output-dir", ""],
        ["decode", "a.lic", ""],
    ],
    ids=" ".join,
)
def test_usage_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.run(arguments) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


@posix
def test_a_progress_bar_on_a_terminal(lic: Run, tmp_path: Path) -> None:
    fill(tmp_path / "in", 3)
    import fcntl
    import struct
    import termios

    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        arguments = ("encode", "in", "--output-dir", "out", "-r", *TINY)
        done = lic(*arguments, capture_output=False, stdout=subprocess.PIPE, stderr=terminal)
    finally:
        os.close(terminal)
    shown = b""
    with open(main, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # at the end
        while part := screen.read(1 << 12):
            shown += part
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"3/3" in shown and b"image" in shown and b" MB -> " in shown


# ----------------------------------------------------------------------------------------------------
# what goes wrong


def test_a_model_that_is_not_there_fails_once(lic: Run, tmp_path: Path) -> None:
    fill(tmp_path / "in", 3)
    for jobs in (1, 2):
        done = lic("encode", "in", "--output-dir", "out", "--jobs", jobs, "--model", "nonsense")
        assert done.returncode == 1
        (line,) = done.stderr.decode().splitlines()
        assert "no model named 'nonsense'" in line


@posix
def test_a_full_disk(lic: Run, tmp_path: Path) -> None:
    import resource

    fill(tmp_path / "in", 2)
    (tmp_path / "out/sub").mkdir(parents=True)
    (tmp_path / "out/sub/000.lic").write_bytes(b"old")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))

    done = lic("encode", "in", "--output-dir", "out", "-r", *TINY, preexec_fn=limit)
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 2 and all("File too large" in line for line in lines)
    assert tree(tmp_path / "out") == {"sub/000.lic": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_report_that_cannot_be_written_ends_the_batch(lic: Run, tmp_path: Path, jobs: int) -> None:
    fill(tmp_path / "in", 3)
    done = lic("encode", "in", "--output-dir", "out", "-r", "--jobs", jobs, "--report", "/dev/full", *TINY)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == ["lic: /dev/full: No space left on device"]


@pytest.mark.parametrize(
    ("folder", "word"),
    [
        ("file", "file: File exists"),
        ("file/out", "file/out: Not a directory"),
        pytest.param("readonly", "readonly: permission denied", marks=posix),
    ],
)
def test_an_output_folder_that_takes_no_files_fails_once(lic: Run, tmp_path: Path, folder: str, word: str) -> None:
    fill(tmp_path / "in", 2)
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "readonly").mkdir(mode=0o555)
    done = lic("encode", "in", "--output-dir", folder, "-r", *TINY, preexec_fn=as_anybody)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [f"lic: {word}"]
    assert (tmp_path / "file").read_bytes() == b"old"


@posix
def test_one_file_into_a_read_only_folder_or_onto_a_full_disk(lic: Run, tmp_path: Path) -> None:
    import resource

    fill(tmp_path, 2)
    (tmp_path / "old").mkdir()
    old = tmp_path / "old/a.lic"
    old.write_bytes(b"old")
    command = ("encode", "001.png", "old/a.lic", *TINY)
    done = lic(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20)))
    assert (done.returncode, done.stderr) == (1, b"lic: 001.png: old/a.lic: File too large\n")
    old.parent.chmod(0o555)
    done = lic(*command, preexec_fn=as_anybody)
    assert (done.returncode, done.stderr) == (1, b"lic: 001.png: old/a.lic: Permission denied\n")
    assert tree(tmp_path / "old") == {"a.lic": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output(lic: Run, tmp_path: Path) -> None:
    fill(tmp_path, 2)
    with open("/dev/full", "wb") as full:
        done = lic("encode", "001.png", "-", *TINY, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"lic: 001.png: No space left on device\n")


@contextlib.contextmanager
def running_batch(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A batch in a process group of its own, after its first output."""
    arguments = ["encode", "in", "--output-dir", "out", "-r", *TINY, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "lic", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "out").rglob("*.lic")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check_and_resume(lic: Run, folder: Path, count: int) -> None:
    before = {name: data for name, data in tree(folder / "out").items() if name.endswith(".lic")}
    assert 0 < len(before) < count
    for data in before.values():
        assert info_of(data).width == 256  # whole
    times = {name: (folder / "out" / name).stat().st_mtime_ns for name in before}
    done = lic("encode", "in", "--output-dir", "out", "-r", "--no-clobber", *TINY)
    assert (done.returncode, done.stderr) == (0, b"")
    assert sum(name.endswith(".lic") for name in tree(folder / "out")) == count
    assert times == {name: (folder / "out" / name).stat().st_mtime_ns for name in before}


@posix
@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_interrupt_stops_and_leaves_whole_files(lic: Run, tmp_path: Path, jobs: str) -> None:
    fill(tmp_path / "in", 30, side=256)
    with running_batch(tmp_path, "--jobs", jobs) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == b"lic: interrupted\n"
    assert all(name.endswith(".lic") for name in tree(tmp_path / "out"))  # no temporary file
    check_and_resume(lic, tmp_path, 30)


@posix
@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_kill_leaves_whole_files_and_the_rest_is_resumed(lic: Run, tmp_path: Path, jobs: str) -> None:
    fill(tmp_path / "in", 30, side=256)
    with running_batch(tmp_path, "--jobs", jobs) as process:
        process.kill()
        _, stderr = process.communicate(timeout=60)  # ends when the workers have ended too
    assert stderr == b""
    check_and_resume(lic, tmp_path, 30)


class _Device:
    device = "cpu"


@dataclass(frozen=True)
class Suicidal:
    """An operation that copies, and kills its process where the data says so."""

    threads: int | None = None

    def codec(self) -> _Device:
        return _Device()

    def load(self, name: str, data: bytes) -> bytes:
        return data

    def code(self, codec: _Device, data: bytes, progress: object = None) -> bytes:
        if data == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return data

    def save(self, loaded: bytes, result: bytes) -> tuple[bytes, dict[str, Any]]:
        return result, {}


@posix
def test_a_worker_that_dies_costs_one_file(tmp_path: Path) -> None:
    jobs = []
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"kill" if i in (2, 5) else b"%d" % i)
        jobs.append(Job(str(tmp_path / f"{i}.png"), str(tmp_path / f"out/{i}.lic")))
    outcomes: list[Outcome] = []
    engine.run(Suicidal(), jobs, 2, outcomes.append)  # type: ignore[arg-type]
    assert sorted(Path(outcome.job.source).name for outcome in outcomes) == [f"{i}.png" for i in range(8)]
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    assert len(failed) == 2
    assert all("worker process" in outcome.failure.line for outcome in failed if outcome.failure)
    made = sorted(name for name in tree(tmp_path / "out") if name.endswith(".lic"))
    assert made == [f"{i}.lic" for i in range(8) if i not in (2, 5)]


# ----------------------------------------------------------------------------------------------------
# URLs


def test_urls(tmp_path: Path, picture: np.ndarray, capfd: pytest.CaptureFixture[str]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    fill(tmp_path / "in", 3)
    memory.put(f"{tmp_path}/in", "/pictures", recursive=True)
    memory.pipe("/pictures/.hidden.png", b"")
    try:
        arguments = ["encode", "memory://pictures", "--output-dir", "memory://coded", "-r", *TINY]
        assert cli.run(arguments) == 0
        assert cli.run(["encode", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out"), "-r", *TINY]) == 0
        names = memory.find("/coded")
        assert {name.removeprefix("/coded/"): memory.cat(name) for name in names} == tree(tmp_path / "out")

        memory.pipe("/coded/001.lic", b"done before")
        assert cli.run([*arguments, "--no-clobber"]) == 0
        assert memory.cat("/coded/001.lic") == b"done before"

        local = (tmp_path / "url").as_uri()
        assert cli.run(["decode", "memory://coded/sub", "--output-dir", local, "--device", "cpu"]) == 0
        assert list(tree(tmp_path / "url")) == ["000.png"]
        assert cli.run(["decode", "memory://coded/002.lic", f"{local}/002.ppm", "--device", "cpu"]) == 0
        assert (tmp_path / "url/002.ppm").exists()
        capfd.readouterr()
        assert cli.run(["decode", "memory://coded/missing.lic", "--output-dir", local]) == 1
        assert capfd.readouterr().err == "lic: memory://coded/missing.lic: No such file or directory\n"
        assert cli.run(["info", "nonsense://a.lic"]) == 1
        assert "Protocol not known: nonsense" in capfd.readouterr().err
    finally:
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
        logging.getLogger("lic").handlers.clear()


def test_a_file_system_without_atomic_writes_gets_a_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    from lic import files

    calls = []

    class Remote(MemoryFileSystem):  # type: ignore[misc]
        protocol = "remote"
        store: dict[str, Any] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("remote://").strip("/")

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
            calls.append(path)
            super().pipe_file(path, value, mode, **options)

        def mv(self, path1: str, path2: str, **options: Any) -> None:
            if path2.endswith("full.lic"):
                raise OSError(28, "No space left on device")
            super().mv(path1, path2, **options)

    import fsspec

    fsspec.register_implementation("remote", Remote, clobber=True)
    files.write("remote://folder/a.lic", b"data")
    assert files.read("remote://folder/a.lic") == b"data"
    assert calls and calls[0] != "/folder/a.lic"
    with pytest.raises(OSError):
        files.write("remote://folder/full.lic", b"data")
    assert Remote().find("/folder") == ["/folder/a.lic"]
