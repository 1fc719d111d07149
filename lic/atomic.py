"""Writing a file so that its name never stands for half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def temporary_name() -> str:
    """A file name nobody uses: short, however long the final name may be, hidden, and no picture's."""
    return f".lic-{secrets.token_hex(8)}.tmp"


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Put ``data`` under ``path``: the old file stays whole until the new one is.

    The data goes to a temporary file in the same folder, which then replaces ``path``. A link is followed,
    an existing file's permission bits are kept, and what is no regular file (``/dev/null``, a named pipe) is
    written to directly. Raises OSError, in which case no temporary file is left.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return
    temporary = target.with_name(temporary_name())
    try:
        with open(temporary, "xb") as file:
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o7777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a power cut after the rename must not leave an empty file
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # about the file that was asked for, whose name it may not have at all
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
