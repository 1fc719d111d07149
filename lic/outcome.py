"""What became of each file: told to the user, written to the report, counted."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from lic.batch import STDIO, Job
from lic.errors import LicError

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("lic")


@dataclass(frozen=True)
class Failure:
    """An exception in a form that other processes understand: one line, the exit code, the traceback."""

    line: str
    exit_code: int
    trace: str

    def tell(self, name: str = "") -> None:
        """Say on standard error what went wrong with the file ``name``."""
        prefix = {"": "", STDIO: "standard input: "}.get(name, f"{name}: ")
        log.error("%s%s", prefix, self.line.removeprefix(prefix))  # of a URL, what opens it names it too
        if self.trace:
            log.debug("%s", self.trace.rstrip())


@dataclass(frozen=True)
class Outcome:
    """A job that is done or has failed. ``facts`` are those of the report."""

    job: Job
    facts: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


def failure_of(error: BaseException, name: str = "") -> Failure:
    """``error`` for the user; ``name`` is the file that the line will be about anyway."""
    if isinstance(error, LicError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "not enough memory"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename is not None and str(error.filename) != name:
            text = f"{error.filename}: {text}"
    else:
        text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    code = error.exit_code if isinstance(error, LicError) else 1
    return Failure(" ".join(text.split()), code, "".join(traceback.format_exception(error)))


def shows_progress() -> bool:
    """Whether somebody looks at standard error, and has not asked for silence."""
    return sys.stderr is not None and sys.stderr.isatty() and log.isEnabledFor(logging.WARNING)


class Report:
    """Hears the outcome of each of ``jobs``, from any thread, and keeps the exit codes of those that failed.

    ``as_json``: a JSON line per file on standard error. ``path``: the same lines are appended to that file, each
    at once and whole. ``bar``: show progress on a terminal. Raises OSError when the file cannot be opened or written.
    """

    def __init__(self, jobs: Sequence[Job], *, as_json: bool, path: str | None, bar: bool) -> None:
        self.codes: list[int] = []
        self._as_json = as_json
        self._bytes = [0, 0]
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._file: int | None = None
        self._path = path
        self._bar: tqdm[Any] | None = None
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._stack.callback(os.close, self._file)
        if bar and shows_progress():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._bar = self._stack.enter_context(tqdm(total=len(jobs), unit="image"))
            self._stack.enter_context(logging_redirect_tqdm([log]))

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, outcome: Outcome) -> None:
        with self._lock:
            job, failure = outcome.job, outcome.failure
            facts = {"source": job.source, "target": job.target, "ok": failure is None, **outcome.facts}
            if notes := outcome.facts.get("notes"):
                log.warning("%s: %s", job.source, "; ".join(notes))
            if failure is not None:
                self.codes.append(failure.exit_code)
                failure.tell(job.source)
                facts["error"] = failure.line
            elif not self._as_json and log.isEnabledFor(logging.INFO):
                log.info("%s -> %s: %s", job.source, job.target, _summary(outcome.facts))
            line = json.dumps(facts)
            if self._as_json:
                self._print(line)
            if self._file is not None:
                self._append(self._file, f"{line}\n".encode())
            self._advance(facts)

    def _print(self, line: str) -> None:
        if self._bar is None:
            click.echo(line, err=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def _append(self, file: int, line: bytes) -> None:
        try:
            written = os.write(file, line)  # at once: lines of several batches that share a report stay whole
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from None
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)

    def _advance(self, facts: dict[str, Any]) -> None:
        if self._bar is None:
            return
        for i, key in enumerate(("bytes_in", "bytes_out")):
            self._bytes[i] += facts.get(key, 0)
        failed = f", {len(self.codes)} failed" if self.codes else ""
        self._bar.set_postfix_str("{} -> {}{}".format(*map(_megabytes, self._bytes), failed), refresh=False)
        self._bar.update()


def _summary(facts: dict[str, Any]) -> str:
    words = [f"{facts['width']}x{facts['height']} pixels", f"{facts['bytes_in']} -> {facts['bytes_out']} bytes"]
    words.append(f"{facts['bpp']} bpp")
    if facts.get("psnr") is not None:
        words.append(f"{facts['psnr']} dB")
    return ", ".join([*words, f"{facts['seconds']} s on {facts['device']}"])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
