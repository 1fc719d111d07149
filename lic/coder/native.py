"""The compiled loops of loops.cpp, where there is a C++ compiler; elsewhere numpy, torch and Python do the same."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lic.coder import build
from lic.coder.range_coder import RangeDecoder
from lic.coder.tables import Tables
from lic.errors import CorruptError

_SOURCE = Path(__file__).with_name("loops.cpp")
_OPTIONS = ("-O3", "-std=c++14", "-shared", "-fPIC")
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Loops:
    """What takes too long in Python. Every index must be in range."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._read_chain = library.lic_read_chain
        self._states = library.lic_states
        self._search = library.lic_search
        self._means = library.lic_means
        self._shrunken = library.lic_shrunken
        self._matched = library.lic_matched
        self._grouped = library.lic_grouped
        for function in (
            self._read_chain,
            self._states,
            self._search,
            self._means,
            self._shrunken,
            self._matched,
            self._grouped,
        ):
            function.restype = ctypes.c_int64

    def read_chain(
        self,
        decoder: RangeDecoder,
        rows: Ints,
        start: int,
        tables: Tables,
        trellis: Ints | None,
        state: int,
        found: tuple[Ints, Ints, Ints],
    ) -> tuple[int, int]:
        """Read symbols ``start`` and following of a chain, up to the next escape, as :meth:`Decoder.pull_chain` does.

        Args:
            decoder: has read those before; goes on.
            rows: (N,), those of even states.
            trellis: (states, 2); without one all rows are used as they are, and escapes do not stop it.
            state: of the chain before symbol ``start``.
            found: the rows used, the symbols and the values, (N,) each, to be filled in.

        Returns:
            how many symbols of the chain are known then, and the state behind them; behind an escape that before it,
            the value missing.

        Raises:
            CorruptError: a code value outside of a row, or the data has ended.
        """
        coder, chain = np.array(decoder.state, np.int64), np.array([state], np.int64)
        known = self._read_chain(
            decoder.data,
            ctypes.c_int64(len(decoder.data)),
            _at(coder, np.int64),
            _at(rows, np.int64),
            ctypes.c_int64(start),
            ctypes.c_int64(len(rows)),
            _at(tables.cdf, np.uint16),
            ctypes.c_int64(tables.cdf.shape[1]),
            _at(tables.size, np.int32),
            _at(tables.offset, np.int32),
            None if trellis is None else _at(trellis, np.int64),
            _at(chain, np.int64),
            *(_at(array, np.int64) for array in found),
        )
        if known < 0:
            raise CorruptError("damaged data: a symbol outside the coder's alphabet, or a stream that ends too early")
        low, high, distance, position, used = coder.tolist()
        decoder.state = low, high, distance, position, used
        return known, int(chain[0])

    def states(self, symbols: Ints, trellis: Ints, state: int) -> tuple[Ints, int]:
        """States before the symbols (N,) of a chain that begins in ``state``, and the one behind them."""
        symbols = np.ascontiguousarray(symbols, np.int64)
        states = np.empty_like(symbols)
        after = self._states(
            _at(symbols, np.int64),
            ctypes.c_int64(len(symbols)),
            _at(trellis, np.int64),
            ctypes.c_int64(state),
            _at(states, np.int64),
        )
        return states, int(after)

    def search(
        self,
        costs: Floats,
        parts: tuple[Ints, Ints, Ints, Ints],
        before: Ints,
        branch: Ints,
        found: tuple[Ints, Ints],
        threads: int = 1,
    ) -> None:
        """The search of :meth:`Dependent._search`. Raises MemoryError.

        Args:
            costs: (4, N).
            parts: begins, ends, and first and last states; no latent is in two of them.
            before: (2, states), and branch, the ways into each state.
            found: branches and states before them, (N,) each, to be filled in.
            threads: that share the parts.
        """
        costs = np.ascontiguousarray(costs, np.float32)
        before, branch = (np.ascontiguousarray(array, np.int64) for array in (before, branch))
        shares = max(1, min(threads, len(parts[0])))

        def search(share: int) -> int:
            own = [np.ascontiguousarray(array[share::shares], np.int64) for array in parts]
            failed: int = self._search(
                _at(costs, np.float32),
                ctypes.c_int64(costs.shape[1]),
                *(_at(array, np.int64) for array in own),
                ctypes.c_int64(len(own[0])),
                _at(before, np.int64),
                _at(branch, np.int64),
                ctypes.c_int64(before.shape[1]),
                *(_at(array, np.int64) for array in found),
            )
            return failed

        _in_threads(search, shares)

    def means(
        self,
        planes: Floats,
        calm: Floats,
        reach: int,
        offsets: Ints,
        scale: float,
        kernels: tuple[float, float],
        constant: float,
        threads: int = 1,
    ) -> Floats:
        """Non-local means, as :func:`lic.denoising.non_local_means.means` has them. Raises MemoryError.

        Args:
            planes: (1 or 3, H + 2·reach, W + 2·reach).
            calm: (H + 2·reach, W + 2·reach).
            offsets: (N, 3), down, right and group of each, in the order of their groups; 0 <= down < reach.

        Returns:
            (groups, 2, planes, H, W).
        """
        count, height, width = _inside(planes, reach)
        result = np.empty((int(offsets[-1, 2]) + 1, 2, count, height, width), np.float32)
        both = np.array(kernels, np.float32)

        arguments = (
            _at(planes, np.float32),
            _at(calm, np.float32),
            *(ctypes.c_int64(size) for size in (count, height, width, reach)),
            _at(offsets, np.int64),
            ctypes.c_int64(len(offsets)),
            ctypes.c_float(scale),
            _at(both, np.float32),
            ctypes.c_float(constant),
        )
        return _filled(result, self._means, arguments, threads)

    def shrunken(self, planes: Floats, reach: int, thresholds: tuple[float, ...], threads: int = 1) -> Floats:
        """Shrunken cosine transforms, as :func:`lic.denoising.cosine_shrinkage.shrunken` has them. Raises MemoryError.

        Args:
            planes: (K, H + 2·reach, W + 2·reach), reach being even and 8 or more.
            thresholds: two.

        Returns:
            (2, K, H, W).
        """
        count, height, width = _inside(planes, reach)
        result = np.empty((2, count, height, width), np.float32)
        both = np.array(thresholds, np.float32)

        sizes = (ctypes.c_int64(size) for size in (count, height, width, reach))
        arguments = (_at(planes, np.float32), *sizes, _at(both, np.float32))
        return _filled(result, self._shrunken, arguments, threads)

    def matched(
        self,
        planes: Floats,
        reach: int,
        offsets: Ints,
        matches: int,
        scale: float,
        constant: float,
        threads: int = 1,
    ) -> Floats:
        """Matched blocks, as :func:`lic.denoising.block_matching.matched` has them. Raises MemoryError.

        Args:
            planes: (K, H + 2·reach, W + 2·reach), reach being 27 or more, the first pixel inside at multiples of 4.
            offsets: (N, 2), down and right, -20..20; more than matches.
            matches: 1..16.

        Returns:
            (K, H, W).
        """
        count, height, width = _inside(planes, reach)
        result = np.empty((count, height, width), np.float32)

        arguments = (
            _at(planes, np.float32),
            *(ctypes.c_int64(size) for size in (count, height, width, reach)),
            _at(offsets, np.int64),
            ctypes.c_int64(len(offsets)),
            ctypes.c_int64(matches),
            ctypes.c_float(scale),
            ctypes.c_float(constant),
        )
        return _filled(result, self._matched, arguments, threads)

    def grouped(
        self, planes: Floats, reach: int, offsets: Ints, threshold: float, scale: float, threads: int = 1
    ) -> Floats:
        """Groups of blocks, as :func:`lic.denoising.groups.grouped` has them. Raises MemoryError.

        Args:
            planes: (K, H + 2·reach, W + 2·reach), the first pixel inside at multiples of 4.
            offsets: (N, 2), down and right, up to (reach - 7) / 2 and 20; 15 or more.

        Returns:
            (2, K, H, W).
        """
        count, height, width = _inside(planes, reach)
        result = np.empty((2, count, height, width), np.float32)

        arguments = (
            _at(planes, np.float32),
            *(ctypes.c_int64(size) for size in (count, height, width, reach)),
            _at(offsets, np.int64),
            ctypes.c_int64(len(offsets)),
            ctypes.c_float(threshold),
            ctypes.c_float(scale),
        )
        # A part of the rows computes what begins around it too, and takes memory for that.
        return _filled(result, self._grouped, arguments, max(1, min(threads, height // 64)))


def _inside(planes: Floats, reach: int) -> tuple[int, int, int]:
    """Planes, rows and columns that have ``reach`` more at each side."""
    return planes.shape[0], planes.shape[1] - 2 * reach, planes.shape[2] - 2 * reach


def _filled(result: Floats, function: Callable[..., int], arguments: tuple[Any, ...], threads: int) -> Floats:
    """An array whose shares a function computes, given the number of each, that of all, and where the array lies."""

    def share_of(share: int) -> int:
        return function(*arguments, ctypes.c_int64(share), ctypes.c_int64(threads), _at(result, np.float32))

    _in_threads(share_of, threads)
    return result


def _in_threads(work: Callable[[int], int], threads: int) -> None:
    """Does shares 0..threads - 1 of some work, each in a thread. Raises MemoryError if one returns anything but 0."""
    if threads == 1:
        failed = [work(0)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            failed = list(pool.map(work, range(threads)))
    if any(failed):
        raise MemoryError


def _at(array: npt.NDArray[Any], dtype: type[np.generic]) -> ctypes.c_void_p:
    """Where an array lies, which must outlive the call. ValueError unless it lies there as the loops expect it."""
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"an array of {np.dtype(dtype)} in one piece is wanted")
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def load() -> tuple[Loops | None, str | None]:
    """The loops, or why there are none, in one line. The first call on a machine compiles them, in a few seconds."""
    try:
        made_of = hashlib.sha256(_SOURCE.read_bytes() + " ".join(_OPTIONS).encode()).hexdigest()[:16]
        key = f"loops-{made_of}-{sys.platform}-{platform.machine()}-{8 * ctypes.sizeof(ctypes.c_void_p)}"
        return build.loaded(key, "loops.so", _loaded, _built), None
    except Exception as error:  # whatever a compiler, a linker or a file system can do
        return None, build.one_line(error)


def _loaded(path: Path) -> Loops:
    try:
        return Loops(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise ImportError(f"{path.name}: error: {error}") from error


def _built(folder: Path) -> tuple[Loops, Path]:
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} not found, install g++")
    path = folder / "built.so"
    command += [*_OPTIONS, "-o", str(path), str(_SOURCE)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return _loaded(path), path
