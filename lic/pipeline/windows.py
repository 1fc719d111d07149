"""Running the transforms over windows of a large image, so that memory stays bounded and no seam appears.

A window carries a halo at least as wide as the network's receptive field; the result does not depend on how the
image is cut, except for the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lic.model.codec import CodecModel
from lic.model.config import DOWNSAMPLING
from lic.model.context import Geometry

WINDOW = 64  # side of a window in latent positions: 1024 pixels
HALO = 8  # in latent positions; the transforms of `base` reach 6 (docs/architecture.md)


def _windows(size: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, start with halo, end with halo) along one axis, in latent positions."""
    for start in range(0, size, WINDOW):
        end = min(start + WINDOW, size)
        yield start, end, max(0, start - HALO), min(size, end + HALO)


def analysis(net: CodecModel, rgb: np.ndarray, grid: Geometry, code: Tensor) -> Tensor:
    """g_a over windows: uint8 (H, W, 3), edges continued to the latent grid -> latents (1, h, w, M), not rounded."""
    n = DOWNSAMPLING
    height, width, _ = rgb.shape
    y = torch.empty(1, grid.height, grid.width, net.config.latent, device=code.device)
    for top, bottom, above, below in _windows(grid.height):
        rows = np.arange(above * n, below * n).clip(max=height - 1)
        for left, right, before, after in _windows(grid.width):
            columns = np.arange(before * n, after * n).clip(max=width - 1)
            pixels = torch.from_numpy(rgb[rows[:, None], columns]).to(code.device)
            part = net.analysis(pixels.unsqueeze(0).float() / 255 - 0.5, code)
            y[:, top:bottom, left:right] = part[:, top - above : bottom - above, left - before : right - before]
    return y


def synthesis(net: CodecModel, y: Tensor, code: Tensor) -> Tensor:
    """g_s over windows: latents (1, h, w, M) -> pixels (1, 16·h, 16·w, 3), uint8."""
    h, w = y.shape[1:3]
    n = DOWNSAMPLING
    x = torch.empty(1, h * n, w * n, 3, dtype=torch.uint8, device=y.device)
    for top, bottom, above, below in _windows(h):
        for left, right, before, after in _windows(w):
            part = net.synthesis(y[:, above:below, before:after], code)
            inside = part[:, (top - above) * n : (bottom - above) * n, (left - before) * n : (right - before) * n]
            pixels = ((inside + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
            x[:, top * n : bottom * n, left * n : right * n] = pixels
    return x
