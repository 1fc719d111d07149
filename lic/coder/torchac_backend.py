"""The only module that imports torchac (and torch): quiet, lazily, from a private build folder.

torchac compiles itself with torch's extension builder whenever it is imported. As it comes, that prints on
stdout, needs ninja even when there is nothing to build, and waits for ever for the lock of a build that was
killed. So the builder is replaced during the import: a finished build is loaded from its path; a new one is
made in a folder of its own, under a lock that the system releases when its holder dies, and moved into
place at the end.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Builder = Callable[..., ModuleType]

_log = logging.getLogger(__name__)
_import_lock = threading.Lock()


def problem() -> str | None:
    """Why torchac cannot be used, in one line, or None if it can. The first call may have to compile."""
    with _import_lock:
        return _load()[1]


def encode(bounds: npt.NDArray[np.uint16]) -> bytes:
    """Code N symbols given as (N, 2) lower and upper ends, lower < upper <= 65535."""
    # The coder looks at two entries of a row only, so three columns with symbol 0 stand for any table.
    table = np.zeros((len(bounds), 3), dtype=np.uint16)
    table[:, :2] = bounds
    torchac, torch = _modules()
    symbols = torch.zeros(len(bounds), dtype=torch.int16)
    return bytes(torchac.encode_int16_normalized_cdf(torch.from_numpy(table.view(np.int16)), symbols))


def decode(data: bytes, cdfs: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """(N,) symbols, given the row (N, width) of tables for each, contiguous; N * width < 2**31.

    Symbols in the padding of a row come back from damaged data; the caller checks.
    """
    torchac, torch = _modules()
    assert cdfs.flags.c_contiguous  # torchac ignores strides
    symbols = torchac.decode_int16_normalized_cdf(torch.from_numpy(cdfs.view(np.int16)), data)
    return np.asarray(symbols.numpy(), dtype=np.int64)


def _modules() -> tuple[Any, Any]:
    torchac, reason = _load()
    if torchac is None:
        raise RuntimeError(reason)
    return torchac, sys.modules["torch"]


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """torchac, or why not."""
    for name in ("torch", "torchac"):
        if importlib.util.find_spec(name) is None:
            return None, f"{name} is not installed"
    try:
        from torch.utils import cpp_extension

        original = cpp_extension.load
        cpp_extension.load = functools.partial(_load_extension, original)
        try:
            import torchac
        finally:
            cpp_extension.load = original
    except Exception as error:  # whatever a compiler, a linker or a file system can do
        return None, _one_line(error)
    return torchac, None


def _load_extension(original: Builder, name: str, sources: list[str], **_: Any) -> ModuleType:
    """Stands in for torch.utils.cpp_extension.load: the extension from our folder, built first if need be."""
    file_name = name + (".pyd" if sys.platform == "win32" else ".so")
    folder = _build_folder(file_name)
    with contextlib.suppress(ImportError):  # not there yet, or of no use
        return _import_file(name, folder / file_name)
    with _locked(folder / "building") as alone:
        with contextlib.suppress(ImportError):  # another process was faster
            return _import_file(name, folder / file_name)
        if alone:
            for abandoned in folder.glob("build-*"):  # by processes that were killed
                shutil.rmtree(abandoned, ignore_errors=True)
        return _build(original, name, sources, folder / file_name)


def _build(original: Builder, name: str, sources: list[str], target: Path) -> ModuleType:
    """Compiles in a folder of its own; the result moves to ``target`` as a whole or not at all."""
    from torch.utils.cpp_extension import get_cxx_compiler

    path = os.environ.get("PATH", os.defpath)
    search = os.pathsep.join([str(Path(sys.executable).parent), path])  # ninja of a virtual environment
    compiler = str(get_cxx_compiler())  # type: ignore[no-untyped-call]
    for program, remedy in ((compiler.split()[0], "g++"), ("ninja", "ninja")):
        if shutil.which(program, path=search) is None:
            raise RuntimeError(f"{program} not found, install {remedy} to compile torchac")
    _log.info("compiling torchac, once; this takes about half a minute")
    folder = tempfile.mkdtemp(prefix="build-", dir=target.parent)
    os.environ["PATH"] = search
    try:
        module = original(name=name, sources=sources, build_directory=folder, verbose=False)
        complete = shutil.copy(str(module.__file__), Path(folder) / "complete")
        with contextlib.suppress(OSError):  # in use by another process, on a system that forbids it
            os.replace(complete, target)
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(folder, ignore_errors=True)
    return module


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build_folder(file_name: str) -> Path:
    """One per combination of what the built file depends on; it holds that file already or is writable."""
    import torch

    key = (
        f"torchac-{importlib.metadata.version('torchac')}-torch-{torch.__version__}"
        f"-{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"
    )
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


def _one_line(error: Exception) -> str:
    """The line of a compiler's output that names the error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = (line for line in lines if "error" in line.lower() and "Error building" not in line)
    return next(told, lines[0])
