"""Standard input and output as byte streams, at the level of file descriptors."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from lic.errors import LicError, UsageError


def read_stdin() -> bytes:
    """Everything on standard input. Raises UsageError when that is a terminal."""
    if sys.stdin is None:
        raise LicError("standard input is closed")
    if sys.stdin.isatty():
        raise UsageError("standard input is a terminal: redirect a file or a pipe into it")
    return sys.stdin.buffer.read()


def check_stdout() -> None:
    """Raises UsageError when standard output is a terminal, which binary data would garble."""
    if sys.stdout is not None and sys.stdout.isatty():
        raise UsageError(
            "refusing to write binary data to a terminal: redirect standard output or name a file"
        )


@contextlib.contextmanager
def claimed_stdout() -> Iterator[int]:
    """A file descriptor that is standard output, while whatever else writes there goes to standard error.

    Libraries and the compilers that they start print to descriptor 1 behind Python's back; one stray line
    would damage the picture in the pipe. Raises OSError when standard output is closed.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    private = os.dup(1)
    try:
        os.dup2(2, 1)
        try:
            yield private
        finally:
            os.dup2(private, 1)
    finally:
        os.close(private)


def write_all(descriptor: int, data: bytes) -> None:
    """Write ``data`` to a descriptor, however little of it a pipe takes at a time. Raises OSError."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(descriptor, os.O_BINARY)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
