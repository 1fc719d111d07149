"""Running the transforms over windows of a large image, so that memory stays bounded and no seam appears.

A window carries a halo at least as wide as the network's receptive field; the result does not depend on how the
image is cut, except for the order of floating-point sums. Where there are non-local modules, windows and halos begin
and end at multiples of their blocks or at the border of the image, so that no block is cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lic.model.codec import CodecModel
from lic.model.config import DOWNSAMPLING
from lic.model.context import Geometry
from lic.model.non_local import BLOCK

WINDOW = 64  # side of a window in latent positions: 1024 pixels; a multiple of BLOCK
HALO = 8  # in latent positions; the transforms of `base` reach 6 (docs/architecture.md)


def _windows(net: CodecModel, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, start with halo, end with halo) along one axis, in latent positions."""
    halo = BLOCK if net.config.non_local_heads else HALO
    for start in range(0, size, WINDOW):
        end = min(start + WINDOW, size)
        yield start, end, max(0, start - halo), min(size, end + halo)


def analysis(net: CodecModel, pixels: np.ndarray, grid: Geometry, code: Tensor) -> Tensor:
    """g_a over windows, edges continued to the latent grid -> latents (1, h, w, M), not rounded.

    ``pixels``: uint8 or uint16, (H, W, 3), or (H, W, 1), which the network sees as three equal channels.
    """
    n = DOWNSAMPLING
    height, width, _ = pixels.shape
    white = np.iinfo(pixels.dtype).max
    y = torch.empty(1, grid.height, grid.width, net.config.latent, device=code.device)
    for top, bottom, above, below in _windows(net, grid.height):
        rows = np.arange(above * n, below * n).clip(max=height - 1)
        for left, right, before, after in _windows(net, grid.width):
            columns = np.arange(before * n, after * n).clip(max=width - 1)
            window = torch.from_numpy(pixels[rows[:, None], columns]).to(code.device)
            part = net.analysis(window.float().expand(1, -1, -1, 3) / white - 0.5, code)
            y[:, top:bottom, left:right] = part[:, top - above : bottom - above, left - before : right - before]
    return y


def synthesis(net: CodecModel, y: Tensor, code: Tensor, *, gray: bool = False, bits: int = 8) -> Tensor:
    """g_s over windows: latents (1, h, w, M) -> pixels (1, 16·h, 16·w, 3), uint8, or uint16 with ``bits`` = 16.

    ``gray``: one channel, the mean of the network's three.
    """
    h, w = y.shape[1:3]
    n = DOWNSAMPLING
    white, dtype = 2**bits - 1, torch.uint8 if bits == 8 else torch.uint16
    x = torch.empty(1, h * n, w * n, 1 if gray else 3, dtype=dtype, device=y.device)
    for top, bottom, above, below in _windows(net, h):
        for left, right, before, after in _windows(net, w):
            part = net.synthesis(y[:, above:below, before:after], code)
            inside = part[:, (top - above) * n : (bottom - above) * n, (left - before) * n : (right - before) * n]
            if gray:
                inside = inside.mean(-1, keepdim=True)
            pixels = ((inside + 0.5) * white).round().clamp(0, white).to(dtype)
            x[:, top * n : bottom * n, left * n : right * n] = pixels
    return x


def squared_error(
    net: CodecModel, y: Tensor, code: Tensor, pixels: np.ndarray, *, with_slope: bool
) -> tuple[float, Tensor | None]:
    """What g_s makes of latents y (1, h, w, M) against pixels (H, W, 3), or gray (H, W, 1), uint8 or uint16.

    Squared error in 8-bit units, summed over the pixels and averaged over their channels, and its derivative to y,
    (1, h, w, M). What lies outside the range of samples costs nothing.
    """
    n = DOWNSAMPLING
    white = np.iinfo(pixels.dtype).max
    total, slope = 0.0, torch.zeros_like(y)
    for top, bottom, above, below in _windows(y.shape[1]):
        for left, right, before, after in _windows(y.shape[2]):
            seen = torch.from_numpy(pixels[top * n : bottom * n, left * n : right * n].astype(np.float32)).to(y.device)
            if seen.numel() == 0:
                continue
            part = y[:, above:below, before:after].clone().requires_grad_(with_slope)
            with torch.set_grad_enabled(with_slope):
                x = net.synthesis(part, code)[0, (top - above) * n :, (left - before) * n :]
                x = x[: seen.shape[0], : seen.shape[1]]
                if pixels.shape[2] == 1:
                    x = x.mean(-1, keepdim=True)
                error = (255 * ((x + 0.5).clamp(0, 1) - seen / white)).square().mean(-1).sum()
            total += float(error.detach())
            if with_slope:
                slope[:, above:below, before:after] += torch.autograd.grad(error, part)[0]
    return total, slope if with_slope else None
