"""The only module that imports torchac (and torch): quiet, lazily, from a private build folder.

torchac compiles itself with torch's extension builder whenever it is imported. As it comes, that prints on
stdout, needs ninja even when there is nothing to build, and waits for ever for the lock of a build that was
killed. So the builder is replaced during the import (:mod:`lic.coder.build`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lic.coder import build

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
        return None, build.one_line(error)
    return torchac, None


def _load_extension(original: Builder, name: str, sources: list[str], **_: Any) -> ModuleType:
    """Stands in for torch.utils.cpp_extension.load: the extension from our folder, built first if need be."""
    import torch

    key = (
        f"torchac-{importlib.metadata.version('torchac')}-torch-{torch.__version__}"
        f"-{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"
    )
    file_name = name + (".pyd" if sys.platform == "win32" else ".so")
    return build.loaded(
        key, file_name, functools.partial(_import_file, name), functools.partial(_built, original, name, sources)
    )


def _built(original: Builder, name: str, sources: list[str], folder: Path) -> tuple[ModuleType, Path]:
    from torch.utils.cpp_extension import get_cxx_compiler

    path = os.environ.get("PATH", os.defpath)
    search = os.pathsep.join([str(Path(sys.executable).parent), path])  # ninja of a virtual environment
    compiler = str(get_cxx_compiler())  # type: ignore[no-untyped-call]
    for program, remedy in ((compiler.split()[0], "g++"), ("ninja", "ninja")):
        if shutil.which(program, path=search) is None:
            raise RuntimeError(f"{program} not found, install {remedy} to compile torchac")
    _log.info("compiling torchac, once; this takes about half a minute")
    os.environ["PATH"] = search
    try:
        module = original(name=name, sources=sources, build_directory=str(folder), verbose=False)
    finally:
        os.environ["PATH"] = path
    return module, Path(str(module.__file__))


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
