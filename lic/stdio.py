"""Standard input and output as byte streams, at the level of file descriptors."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from lic.errors import LicError, UsageError

# A program may spell its own standard streams as files: opening those again would go round the checks here.
INPUT_NAMES = frozenset(("-", "/dev/stdin", "/dev/fd/0"))
OUTPUT_NAMES = frozenset(("-", "/dev/stdout", "/dev/fd/1"))


def reserve_descriptors() -> None:
    """Open the null device as each standard stream that was closed when the program started (``>&-``).

    Otherwise the next file that is opened would be that descriptor, and take what is meant for the stream.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one


def read_stdin() -> bytes:
    """Everything on standard input. Raises UsageError when that is a terminal."""
    if sys.stdin is None:
        raise LicError("standard input is closed")
    if sys.stdin.isatty():
        raise UsageError("it is a terminal: redirect a file or a pipe into it")
    return sys.stdin.buffer.read()


def check_stdout() -> None:
    """Raises UsageError when standard output is a terminal, which binary data would garble, LicError when closed."""
    if sys.stdout is None:
        raise LicError("standard output is closed")
    if sys.stdout.isatty():
        raise UsageError("refusing to write binary data to a terminal: redirect standard output or name a file")


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
