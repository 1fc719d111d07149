"""Compiled parts: built quietly at first use, once, in a private folder, whatever happened to who tried before.

A finished build is loaded from its path. A new one is made in a folder of its own, under a lock that the system
releases when its holder dies, and moved into place at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def loaded(key: str, file_name: str, load: Callable[[Path], T], build: Callable[[Path], tuple[T, Path]]) -> T:
    """What ``load`` makes of a built file, which is built first if need be.

    ``key`` names what the file depends on. ``load`` raises ImportError if the file is missing or of no use. ``build``
    is given an empty folder, and returns what has been built there, loaded, and its file.
    """
    folder = folder_of(key, file_name)
    with contextlib.suppress(ImportError):  # not there yet, or of no use
        return load(folder / file_name)
    with _locked(folder / "building") as alone:
        with contextlib.suppress(ImportError):  # another process was faster
            return load(folder / file_name)
        if alone:
            for abandoned in folder.glob("build-*"):  # by processes that were killed
                shutil.rmtree(abandoned, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
        try:
            result, file = build(own)
            complete = shutil.copy(file, own / "complete")
            with contextlib.suppress(OSError):  # in use by another process, on a system that forbids it
                os.replace(complete, folder / file_name)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return result


def folder_of(key: str, file_name: str) -> Path:
    """One per key; it holds the file of that name already or is writable."""
    if os.environ.get("LIC_CACHE_DIR"):
        cache = Path(os.environ["LIC_CACHE_DIR"])
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lic"
    folder = cache / key
    with contextlib.suppress(OSError):
        if (folder / file_name).is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    # Nothing writable: keep the build in the temporary folder, if nobody else can put a library there.
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    shared = Path(tempfile.gettempdir()) / f"lic-{user}"
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        status = shared.lstat()
        ours = user in (str(status.st_uid), "user")
        if ours and stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022:
            (shared / key).mkdir(exist_ok=True)
            return shared / key
    return Path(tempfile.mkdtemp(prefix="lic-"))


def one_line(error: Exception) -> str:
    """The line of a compiler's output that names the error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = (line for line in lines if "error" in line.lower() and "Error building" not in line)
    return next(told, lines[0])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds ``path`` as a lock that dies with its owner; False, at once, where there are no such locks."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            file = stack.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except (ImportError, OSError):
            locked = False
        yield locked
