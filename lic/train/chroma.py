"""Chroma as photographs have it before anybody scales them down: half as fine as luma, and not always strong.

Cameras write JPEG 4:2:0, and a sensor has a colour filter. Training pictures were scaled down at least twofold, which
makes their chroma as fine as their luma: a model of them alone spends bits on chroma noise and hands it on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JPEG
_LEAST = 0.4  # of the colour that is left


def soften_chroma(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Crops, uint8 (B, S, S, 3) with S even: chroma subsampled 4:2:0, interpolated, and 0.4 to 1 times as strong."""
    x = crops.float()
    luma = (x * torch.tensor(_LUMA, device=x.device)).sum(-1, keepdim=True)
    chroma = F.avg_pool2d((x - luma).permute(0, 3, 1, 2), 2)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
    strength = _LEAST + (1 - _LEAST) * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return torch.round(luma + strength * chroma).clamp(0, 255).to(torch.uint8)
