"""The command line in a process of its own that has imported everything already: most of what a test would wait for.

A server imports once and runs nothing; each command is a fork of it. What is looked at when modules are imported
(OMP_NUM_THREADS, PYTHONPATH) is that of the server, whatever the environment of a command is.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from pathlib import Path
from typing import Any

IMPORTED = ("torch", "numpy", "scipy", "PIL.Image", "tqdm", "lic.cli", "lic.engine", "lic.pipeline.codec")
SUPPORTED = sys.platform == "linux"


class Descriptor:
    """A file descriptor that may be sent to a process when it is started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.number)

    def __setstate__(self, sent: Any) -> None:
        self.number = sent.detach()


def _main(streams: list[Descriptor], arguments: list[str], cwd: Path, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(stream.number, number)
        os.close(stream.number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.argv = ["lic", *arguments]
    runpy.run_module("lic", run_name="__main__", alter_sys=True)


def run(
    arguments: list[str], cwd: Path, environment: Mapping[str, str], data: bytes | None, timeout: float
) -> subprocess.CompletedProcess[bytes]:
    """What `python -m lic ARGUMENT...` in that folder and environment comes to, through pipes.

    Without ``data`` its standard input is empty. Raises TimeoutExpired.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    theirs, ours = map(list, zip(*(os.pipe() for _ in range(3)), strict=True))
    theirs[1:], ours[1:] = ours[1:], theirs[1:]  # of the first pipe they read, of the others they write
    streams = [Descriptor(number) for number in theirs]
    process = context.Process(target=_main, args=(streams, arguments, cwd, dict(environment)))
    process.start()
    for number in theirs:
        os.close(number)
    with ThreadPoolExecutor(3) as pool:
        given = pool.submit(_write, ours[0], data or b"")
        out, err = (pool.submit(_read, number) for number in ours[1:])
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        given.result()
    if late:
        raise subprocess.TimeoutExpired(arguments, timeout, out.result(), err.result())
    return subprocess.CompletedProcess(arguments, process.exitcode or 0, out.result(), err.result())


def _write(number: int, data: bytes) -> None:
    try:
        with open(number, "wb", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
    except BrokenPipeError:  # it did not want to read all
        pass


def _read(number: int) -> bytes:
    with open(number, "rb") as file:
        return file.read()
