"""Small models of every context model, with random weights, on the transforms and the hyperprior of the tiny model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import DATA

from lic import conformance
from lic.container import Container, Header, pack
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, Config
from lic.model.store import LoadedModel, load_file, read_info, write_model
from lic.pipeline.codec import SymbolChecks, latent_boxes
from lic.pipeline.tile import Latents
from lic.quality import MAX_CODE

TINY = DATA / "models" / "tiny.safetensors"

# System and options of the models in tests/data/models beside the tiny one: made by write_small_model, seed 1, and like
# the golden files never to be replaced. Windows of 8 give more keys than single precision can add at once (5.8).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-econtextformer": (
        "econtextformer",
        {"segments": [8, 16, 24], "order": "spatial", "width": 24, "heads": 2, "layers": 2, "window": 4},
    ),
    "tiny-econtextformer-channel": (
        "econtextformer",
        {"segments": [16, 32], "order": "channel", "width": 16, "heads": 2, "layers": 2, "window": 8},
    ),
    "tiny-hyperprior": ("hyperprior", {"width": 24}),
    "tiny-msp": ("msp", {"levels": 2, "slices": [16, 32], "width": 16, "depth": 2}),
    "tiny-nlaic": ("nlaic", {"slices": [6, 1, 41], "filters": 8, "features": 4, "widths": [16, 24]}),
}


def latents(config: Config, batch: int, shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """z (B, h/4, w/4, C) and y (B, h, w, M), integers: near 0 in some places, in others as large as any picture's."""
    random = np.random.default_rng(seed)
    h, w = shape
    z = np.clip(np.rint(random.normal(0, 5, (batch, h // 4, w // 4, config.hyper_latent))), -63, 63)
    y = np.rint(random.laplace(0, 1, (batch, h, w, config.latent)) * 2.0 ** random.uniform(-2, 6, (batch, h, w, 1)))
    return torch.from_numpy(z).float(), torch.from_numpy(y).float()


def write_small_model(
    path: Path, system: str, options: Mapping[str, Any], seed: int, non_local_heads: int = 0
) -> LoadedModel:
    """Write weights with a random context model, calibrated and frozen, into a folder that holds the tiny model's.

    With ``non_local_heads`` they have random non-local attention modules besides.
    """
    torch.manual_seed(seed)
    parent = read_info(path.with_name(TINY.name))
    tiny = load_file(parent).net
    config = replace(CONFIGS["tiny"], name=path.stem, system=system, context=options, non_local_heads=non_local_heads)
    net = CodecModel(config).eval()
    net.requires_grad_(False)
    shared = {name: value for name, value in tiny.state_dict().items() if not name.startswith("context.")}
    net.load_state_dict(shared, strict=False)
    tiny.h_s.non_local = net.h_s.non_local
    net.h_s = tiny.h_s
    for name, parameter in net.named_parameters():
        if name.startswith("context.") or ".non_local." in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with net.calibration():
        net.predict(*latents(net.config, 3, (12, 20), seed), torch.tensor([0, 20_000, MAX_CODE]))
    net.freeze()
    write_model(path, net, {"provenance": {"data": "random numbers", "licence": "Apache-2.0"}}, shared_from=parent)
    return load_file(read_info(path))


def file_of(
    model: LoadedModel, width: int, height: int, code: int, tile: int, seed: int, wild: int = 0
) -> tuple[bytes, list[Latents]]:
    """A file of random symbols and the symbols of each tile; ``wild``: one in so many is far beyond any picture's."""
    boxes = [box[0] for box in latent_boxes(width, height, tile)]
    given, checks = [], SymbolChecks()
    for i, geometry in enumerate(boxes):
        z, y = latents(model.net.config, 1, (geometry.height, geometry.width), seed + i)
        if wild:
            y.view(-1)[::wild] *= 1000
        given.append(Latents(z, y))
        checks.add(given[-1])
    streams = conformance.streams_of(model, conformance.File(code, boxes, [], given))
    return packed(model, width, height, code, tile, streams, checks), given


def packed(
    model: LoadedModel,
    width: int,
    height: int,
    code: int,
    tile: int,
    streams: Sequence[tuple[bytes, ...]],
    checks: SymbolChecks,
) -> bytes:
    """A file of the streams of each tile and the checksums of their symbols."""
    header = Header(
        width=width,
        height=height,
        quality=code,
        model=model.info.name,
        entropy_id=model.info.entropy_id,
        synthesis_id=model.info.synthesis_id,
        tile=tile,
        streams=len(streams[0]),
        symbols_crc=checks.crc,
    )
    return pack(Container(header, tuple(streams)))
