"""Devices by name: checked without torch, chosen with it."""

from __future__ import annotations

import re

from lic.errors import LicError, UsageError


def check_device(name: str) -> str:
    """``name`` if it is "auto", "cpu", "cuda" or "cuda:N", whatever this machine has. Raises UsageError otherwise."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    return name


def select_device(name: str) -> str:
    """A torch device for "auto", "cpu", "cuda" or "cuda:N"; imports torch.

    Raises UsageError for other names, LicError when CUDA is asked for and absent.
    """
    check_device(name)
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise LicError(f"--device {name}: CUDA is not available here")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise LicError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices")
    return name
