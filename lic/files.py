"""Reading and writing by name: local paths, ``-`` for the standard streams, URLs such as ``s3://bucket/a.png``.

URLs go through fsspec, which torch brings along; the package behind a protocol (s3fs, gcsfs) is the user's.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from lic import atomic, stdio
from lic.errors import LicError

# There an object is visible when it is complete and not before; renaming would be a second copy.
_OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"))


def is_url(name: str) -> bool:
    """Whether ``name`` is a URL and no local path (``C:`` is a drive)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name) is not None


def read(name: str) -> bytes:
    """All of a file, or of standard input. Raises OSError or LicError."""
    if name in stdio.INPUT_NAMES:
        return stdio.read_stdin()
    if not is_url(name):
        return Path(name).read_bytes()
    system, path = _system(name)
    try:
        data: bytes = system.cat_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
    return data


def write(name: str, data: bytes) -> None:
    """Put ``data`` under ``name``, whose old content stays whole until then. Makes its folder.

    On a file system that is neither local nor an object store this takes a rename, and is as atomic as that.
    Raises OSError or LicError.
    """
    if not is_url(name):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        atomic.write(name, data)
        return
    system, path = _system(name)
    if "file" in _protocols(system):
        write(path, data)
        return
    folder = path.rpartition("/")[0]
    system.makedirs(folder, exist_ok=True)
    if not _OBJECT_STORES.isdisjoint(_protocols(system)):
        system.pipe_file(path, data)
        return
    temporary = f"{folder}/{atomic.temporary_name()}"
    try:
        system.pipe_file(temporary, data)
        system.mv(temporary, path)
    except BaseException:
        if system.exists(temporary):
            system.rm(temporary)
        raise


def exists(name: str) -> bool:
    """Whether something has that name. A link that leads nowhere has."""
    if not is_url(name):
        return os.path.lexists(name)
    system, path = _system(name)
    return bool(system.exists(path))


def join(folder: str, relative: PurePath) -> str:
    """``relative`` inside ``folder``."""
    if is_url(folder):
        return f"{folder.rstrip('/')}/{relative.as_posix()}"
    return str(Path(folder) / relative)


def absolute(name: str) -> str:
    """The same file for a process in another folder."""
    return name if is_url(name) else os.path.abspath(name)


def identity(name: str) -> str:
    """A name that two names of one file share, as far as links and ``..`` go."""
    return name if is_url(name) else os.path.realpath(name)


def find(source: str, suffixes: Collection[str], *, recursive: bool) -> Iterator[tuple[str, PurePath]]:
    """The files that ``source`` stands for, sorted, each with its path relative to ``source``.

    A folder stands for its files with one of ``suffixes``, with ``recursive`` also for those of its
    subfolders, but for hidden ones. Anything else stands for itself, whether it exists or not.
    """
    if is_url(source):
        system, root = _system(source)
        if not system.isdir(root):
            yield source, PurePosixPath(PurePosixPath(root).name)
            return
        found = system.find(root, maxdepth=None if recursive else 1)
        names: list[tuple[str, PurePath]]
        names = [(system.unstrip_protocol(path), PurePosixPath(path).relative_to(root)) for path in sorted(found)]
    else:
        folder = Path(source)
        if not folder.is_dir():
            yield source, Path(folder.name)
            return
        paths = sorted(folder.rglob("*") if recursive else folder.iterdir())
        names = [(str(path), path.relative_to(folder)) for path in paths if path.is_file()]
    for name, relative in names:
        hidden = any(part.startswith(".") for part in relative.parts)
        if relative.suffix.lower() in suffixes and not hidden:
            yield name, relative


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. Raises LicError when the protocol needs another package."""
    import fsspec  # 0.1 s

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise LicError(f"{url}: {error}") from error
    return system, path


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
