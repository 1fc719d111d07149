"""Sums of integers on whatever machine: settings that would break them, a test that notices, and the kernels."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lic.errors import LicError
from lic.exact.fixed import ACCUMULATOR

KERNELS = ("float32", "float64", "int8")  # all give the same integers; float32 is the fast one

_log = logging.getLogger("lic")
_kernel: str | None = None  # set by use_kernel
_fallback: dict[str, str] = {}  # kernel of each type of device that has passed the known-answer test


def selected_kernel(device: torch.device) -> str:
    """The kernel that sums on ``device``: what use_kernel or $LIC_EXACT_KERNEL says, else what was found to work."""
    name = _kernel or os.environ.get("LIC_EXACT_KERNEL") or _fallback.get(device.type, "float32")
    if name not in KERNELS:
        raise LicError(f"LIC_EXACT_KERNEL must be one of {', '.join(KERNELS)}, not {name!r}")
    return name


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Sum with this kernel inside the block. For tests."""
    global _kernel
    before, _kernel = _kernel, name
    try:
        yield
    finally:
        _kernel = before


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Switch off everything that computes float32 products with fewer bits, for the block."""
    off: Any
    torch_backends: Any = torch.backends
    backends, switch, off = [torch_backends.cuda.matmul], "allow_tf32", False  # before torch 2.9
    if hasattr(torch_backends.cuda.matmul, "fp32_precision"):
        backends, switch, off = [torch_backends.cuda.matmul, torch_backends.mkldnn.matmul], "fp32_precision", "ieee"
    before = [getattr(backend, switch) for backend in backends]
    for backend in backends:
        setattr(backend, switch, off)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, switch, value)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """x · weightᵀ + bias, (..., K), (N, K), (N,) -> (..., N): exact in float32 if the certificate holds.

    x holds integers, row n of ``weight`` and ``bias`` integers times scale[n], a power of two.
    """
    kernel = selected_kernel(x.device)
    if torch.is_grad_enabled() or kernel == "float32":
        return F.linear(x, weight, bias)
    if kernel == "float64":
        return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(x.dtype)
    # Products of 8-bit integers: activations of 11 bits are cut in two, x = 16·high + low.
    rows = x.flatten(0, -2)
    count, inputs = rows.shape
    outputs = len(weight)
    padded = F.pad(rows, (0, -inputs % 8, 0, -count % 32))  # some devices want many rows, and multiples of 8
    high = torch.floor(padded / 16)
    w = F.pad(weight / scale[:, None], (0, -inputs % 8, 0, -outputs % 8)).to(torch.int8).t().contiguous()
    total = 16 * torch._int_mm(high.to(torch.int8), w) + torch._int_mm((padded - 16 * high).to(torch.int8), w)
    y = total[:count, :outputs].to(x.dtype) * scale
    return (y if bias is None else y + bias).unflatten(0, x.shape[:-1])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of integers, for attention; exact if every sum of magnitudes stays below 2**24."""
    if torch.is_grad_enabled() or selected_kernel(a.device) != "float64":
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


def known_answer(device: torch.device) -> None:
    """Test once a process and type of device that integer sums up to 2**24 - 1 come out right.

    If float32 fails, float64 (exact to 2**53) takes its place, and -v says so. Raises LicError if that fails too.
    """
    if device.type in _fallback:
        return
    for kernel in ("float32", "float64"):
        with use_kernel(kernel):
            if _sums_are_exact(device):
                _fallback[device.type] = kernel
                if kernel != "float32":
                    _log.info("float32 sums are not exact on %s: using float64 for the entropy path", device)
                return
    raise LicError(f"integer sums are not exact on {device}: it cannot code .lic files")


@torch.no_grad()
def _sums_are_exact(device: torch.device) -> bool:
    """Matrix products of several shapes whose sums, and partial sums, are odd numbers just below 2**24."""
    with exact_arithmetic():
        for rows, inner, columns in ((1, 256, 64), (33, 512, 256), (384, 96, 768)):
            index = torch.arange(rows * inner, device=device).reshape(rows, inner)
            magnitude = (ACCUMULATOR // inner - 4 + (index * 7919) % 4).double()
            sign = 1.0 - 2.0 * ((torch.arange(columns, device=device)[:, None] * 31 + index[:1]) % 5 == 0).double()
            sign[0] = 1.0
            magnitude[:, 0] += ACCUMULATOR - 1 - magnitude.sum(dim=1)
            expected = magnitude.long().cpu() @ sign.long().cpu().t()
            result = linear(magnitude.float(), sign.float(), None, torch.ones(columns, device=device))
            if not torch.equal(result.double().cpu(), expected.double()):
                return False
            batched = matmul(magnitude.float()[None, None], sign.float().t()[None, None])
            if not torch.equal(batched[0, 0].double().cpu(), expected.double()):
                return False
    return True
