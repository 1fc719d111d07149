"""Running the transforms over windows of a large image, so that memory stays bounded and no seam appears.

A window carries a halo at least as wide as the network's receptive field; the result does not depend on how the
image is cut, except for the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lic.model.codec import CodecModel
from lic.model.config import DOWNSAMPLING

WINDOW = 64  # side of a window in latent positions: 1024 pixels
HALO = 8  # in latent positions; the transforms reach 6 (docs/architecture.md)


def _windows(size: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, start with halo, end with halo) along one axis, in latent positions."""
    for start in range(0, size, WINDOW):
        end = min(start + WINDOW, size)
        yield start, end, max(0, start - HALO), min(size, end + HALO)


def analysis(net: CodecModel, x: Tensor, code: Tensor) -> Tensor:
    """g_a over windows: pixels (1, H, W, 3) -> latents (1, H/16, W/16, M) in quantiser steps."""
    h, w = x.shape[1] // DOWNSAMPLING, x.shape[2] // DOWNSAMPLING
    y = x.new_empty(1, h, w, net.config.latent)
    n = DOWNSAMPLING
    for top, bottom, above, below in _windows(h):
        for left, right, before, after in _windows(w):
            part = net.analysis(x[:, above * n : below * n, before * n : after * n], code)
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
