"""Multiply-adds of each part of a model, counted by torch's own operation counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lic.model.codec import CodecModel
from lic.model.config import DOWNSAMPLING, HYPER_DOWNSAMPLING, Config
from lic.model.refinement import PLANES


def kmac_per_pixel(net: CodecModel, height: int = 512, width: int = 768) -> dict[str, float]:
    """Thousand multiply-adds per pixel of each part on a picture of that size, the context model with its cache.

    The analysis is counted without its corrections, each of which costs an encoder a synthesis and the shortcut, and
    the last one for squared error a refinement. Denoising, for the refinement and for a picture's own filter, is not
    counted: it is no network. Its cosine transforms take 0.7 thousand multiplications for a pixel, its groups 3.4; its
    means compare 52 pairs of pixels for each, and a block for every 16 pixels is compared with 840 others for groups,
    with 1,680 for matched blocks.
    """
    config: Config = net.config
    with torch.no_grad():
        x = torch.zeros(1, height, width, 3)
        y = torch.zeros(1, height // DOWNSAMPLING, width // DOWNSAMPLING, config.latent)
        z = torch.zeros(1, height // HYPER_DOWNSAMPLING, width // HYPER_DOWNSAMPLING, config.hyper_latent)
        code = torch.zeros(1)
        psi, unit = net.h_s(z, code), net.unit(code)

        def count(part: Callable[[], Any]) -> float:
            with FlopCounterMode(display=False) as counter:
                part()
            return round(counter.get_total_flops() / 2 / (height * width) / 1000, 2)

        parts = {
            "analysis": count(lambda: net.analysis(x, code)),
            "hyper_analysis": count(lambda: net.hyper_analysis(y, code)),
            "hyper_synthesis": count(lambda: net.h_s(z, code)),
            "context": count(lambda: net.context.teacher(psi, y, code, unit)),
            "synthesis": count(lambda: net.synthesis(y, code)),
        }
        if (refinement := net.refinement) is not None:
            features = torch.zeros(1, height // 4, width // 4, config.widths[0])
            changes = torch.zeros(1, refinement.count * PLANES, height, width)
            steps = torch.ones(1, 1, 1, 1)
            parts["refinement"] = count(lambda: refinement.added(x, features, changes, code, steps))
    decoder = sum(parts[part] for part in ("hyper_synthesis", "context", "synthesis", "refinement") if part in parts)
    return parts | {"decoder": round(decoder, 2)}
