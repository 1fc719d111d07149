"""Which file becomes which: the inputs and outputs of one call, settled before any work is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lic import files, stdio
from lic.errors import LicError, UsageError

STDIO = "-"


@dataclass(frozen=True)
class Job:
    """One input and its output, as paths or ``-``."""

    source: str
    target: str


def single(source: str, target: str, accepts: Callable[[str], bool], expected: str) -> Job:
    """The job of ``IN OUT``.

    Raises UsageError unless OUT is ``-`` or ``accepts(OUT)``; ``expected`` says what would be. Other names of
    standard input and output (``/dev/stdout``) become ``-``.
    """
    _check_names(source, target)
    source = STDIO if source in stdio.INPUT_NAMES else source
    target = STDIO if target in stdio.OUTPUT_NAMES else target
    if target != STDIO:
        if not accepts(target):
            raise UsageError(f"OUT must {expected}, not {target!r}; for several files use --output-dir")
        if source != STDIO and _same_file(source, target):
            raise UsageError(f"{target}: input and output are the same file")
    return Job(source, target)


def many(
    sources: Sequence[str],
    output_dir: str,
    target_suffix: str,
    source_suffixes: Collection[str],
    *,
    recursive: bool,
) -> list[Job]:
    """The jobs of ``IN... --output-dir DIR``, in the order given, folders sorted.

    A file goes to ``DIR/stem + target_suffix``, where DIR may be a URL. A folder stands for its files with one
    of ``source_suffixes``, with ``recursive`` also for those of its subfolders, whose tree is mirrored; hidden
    files and folders are passed over. Raises UsageError when two inputs would have the same output or an output
    would replace an input, LicError when there is nothing to do. An input that does not exist is a job like
    others and fails when its turn comes.
    """
    _check_names(output_dir, *sources)
    jobs: dict[str, Job] = {}
    for source in sources:
        if source in stdio.INPUT_NAMES:
            raise UsageError(f"{source!r} cannot be combined with --output-dir")
        for path, relative in files.find(source, source_suffixes, recursive=recursive):
            target = files.join(output_dir, relative.with_suffix(target_suffix))
            if target in jobs:
                raise UsageError(f"{jobs[target].source} and {path} would both become {target}")
            jobs[target] = Job(path, target)
    if not jobs:
        raise _nothing_to_do(source_suffixes, recursive)
    inputs = {files.identity(job.source) for job in jobs.values()}
    for target in jobs:
        if files.identity(target) in inputs:
            raise UsageError(f"{target} is an input and would be replaced")
    return list(jobs.values())


def sources_of(names: Sequence[str], suffixes: Collection[str], *, recursive: bool) -> list[str]:
    """The files that ``IN...`` stands for, folders as for :func:`many`. Raises LicError when there are none."""
    _check_names(*names)
    found = [path for source in names for path, _ in files.find(source, suffixes, recursive=recursive)]
    if not found:
        raise _nothing_to_do(suffixes, recursive)
    return found


def _nothing_to_do(suffixes: Collection[str], recursive: bool) -> LicError:
    hint = "" if recursive else "; -r descends into subfolders"
    return LicError(f"nothing to do: no {', '.join(sorted(suffixes))} files{hint}")


def _check_names(*names: str) -> None:
    """An empty name is a variable that a script forgot to set, and not the present folder."""
    if "" in names:
        raise UsageError("an empty name is no file or folder; '.' is the present folder")


def _same_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False
