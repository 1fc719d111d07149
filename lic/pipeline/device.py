"""Choosing the device."""

from __future__ import annotations

from lic.errors import LicError


def select_device(name: str) -> str:
    """A torch device for "auto", "cpu", "cuda" or "cuda:N". Raises LicError when CUDA is asked for and absent."""
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
