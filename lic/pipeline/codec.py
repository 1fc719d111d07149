"""Encoding and decoding of the colour of one picture, RGB or gray."""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lic.container import Container, Header, tile_boxes
from lic.errors import CorruptError, UnsupportedError
from lic.images import mse
from lic.model.config import DOWNSAMPLING, HYPER_DOWNSAMPLING
from lic.model.context import Geometry
from lic.model.store import LoadedModel
from lic.pipeline import windows
from lic.pipeline.optimise import EFFORTS, Box, optimise, quarter
from lic.pipeline.tile import Latents, Reader, Writer, code_tiles
from lic.quality import lambda_of

TILE = 1024  # side of the tiles of an image with more pixels than LARGEST_TILE, counted with its padding
LARGEST_TILE = 1536 * 1536

Progress = Callable[[int, int], None]  # units of work done, and in all: tiles, times the passes over them


@dataclass(frozen=True)
class Encoded:
    """A coded picture: what the decoder will show, and the float model's estimate of its streams in bits."""

    container: Container
    reconstruction: np.ndarray  # of the shape and type of what was encoded
    estimated_bits: float
    symbols_sha256: str


@dataclass(frozen=True)
class Decoded:
    rgb: np.ndarray  # uint8 or uint16, (H, W, 3), or (H, W, 1) if gray
    symbols_sha256: str


class SymbolChecks:
    """Checksums of all symbols: per tile z then y, each (C, h, w) in raster order as little-endian int32."""

    def __init__(self) -> None:
        self.crc, self._sha = 0, hashlib.sha256()

    def add(self, latents: Latents) -> None:
        for tensor in (latents.z, latents.y):
            data = tensor[0].permute(2, 0, 1).to(torch.int32).cpu().contiguous().numpy().astype("<i4").tobytes()
            self.crc = zlib.crc32(data, self.crc)
            self._sha.update(data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


@torch.no_grad()
def encode_rgb(
    model: LoadedModel,
    rgb: np.ndarray,
    quality_code: int,
    *,
    effort: int = 0,
    seconds: float = math.inf,
    progress: Progress | None = None,
) -> Encoded:
    """Encode uint8 or uint16, (H, W, 3) or gray (H, W, 1), at a quality code of :mod:`lic.quality`.

    ``effort``, 0..9, is how long to look for integers that cost less (:mod:`lic.pipeline.optimise`); what comes out
    has never more bits + λ·squared error than with effort 0. ``seconds`` bounds the time of the whole: no pass begins
    that would probably end later.
    """
    began = time.monotonic()
    height, width, _ = rgb.shape
    code = torch.tensor([float(quality_code)], device=model.device)
    grid = _geometry(width, height)
    tile = TILE if grid.height * grid.width * DOWNSAMPLING**2 > LARGEST_TILE else 0
    boxes = list(latent_boxes(width, height, tile))
    passes = EFFORTS[effort].passes
    # The work of a pass is about that of coding everything once; coding is done twice if there are passes.
    units = len(boxes) * (1 if passes == 0 else 2 + passes + 1)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, units)

    y = windows.analysis(model.net, rgb, grid, code)
    encoded, known = _coded(model, rgb, quality_code, tile, boxes, y, None, report)
    if passes == 0:
        return encoded
    coded_once = time.monotonic() - began

    def is_over(pass_seconds: float) -> bool:
        return time.monotonic() - began + pass_seconds + coded_once > seconds

    with model.net.in_floating_point():
        found = optimise(
            model.net,
            rgb,
            code,
            boxes,
            y,
            known,
            EFFORTS[effort],
            is_over=is_over,
            progress=lambda done: report(len(boxes) * (1 + done)),
        )
    better, _ = _coded(model, rgb, quality_code, tile, boxes, *found, lambda done: report(units - len(boxes) + done))
    best = min(encoded, better, key=lambda e: _cost(e, rgb))
    header = replace(best.container.header, effort=effort)
    return replace(best, container=replace(best.container, header=header))


def _cost(encoded: Encoded, rgb: np.ndarray) -> float:
    """Bits of the streams + λ·squared error."""
    bits = 8 * sum(len(stream) for streams in encoded.container.tiles for stream in streams)
    pixels = rgb.shape[0] * rgb.shape[1]
    return bits + lambda_of(encoded.container.header.quality) * mse(rgb, encoded.reconstruction) * pixels


def _coded(
    model: LoadedModel,
    rgb: np.ndarray,
    quality_code: int,
    tile: int,
    boxes: Sequence[Box],
    y: Tensor,
    z: Tensor | None,
    report: Callable[[int], None],
) -> tuple[Encoded, tuple[Tensor, Tensor]]:
    """Code latents y (1, h, w, M): integers with the integers z, or not rounded, without z.

    Also returns the integers y and z that were coded. ``report`` is told how many tiles are done.
    """
    height, width, channels = rgb.shape
    net = model.net
    code = torch.tensor([float(quality_code)], device=model.device)
    integers = torch.empty_like(y)
    hyper = y.new_empty(1, y.shape[1] // 4, y.shape[2] // 4, net.config.hyper_latent)
    dequantised = torch.empty_like(y)
    checks, bits, tiles = SymbolChecks(), 0.0, []
    for done, (geometry, rows, columns) in enumerate(boxes):
        at, at_z = (slice(None), rows, columns), (slice(None), quarter(rows), quarter(columns))
        known_z = torch.round(net.hyper_analysis(y[at], code)) if z is None else z[at_z]
        writer = Writer()
        coded = code_tiles(model, geometry, [quality_code], [writer], Latents(known_z, y[at], rounded=z is not None))
        checks.add(coded.latents)
        bits += float(coded.estimated_bits[0])
        tiles.append(tuple(writer.streams))
        integers[at], hyper[at_z], dequantised[at] = coded.latents.y, coded.latents.z, coded.dequantised
        report(done + 1)
    header = Header(
        width=width,
        height=height,
        quality=quality_code,
        model=model.info.name,
        entropy_id=model.info.entropy_id,
        synthesis_id=model.info.synthesis_id,
        tile=tile,
        streams=len(tiles[0]),
        symbols_crc=checks.crc,
        gray=channels == 1,
        deep=rgb.dtype == np.uint16,
    )
    pixels = _pixels(model, dequantised, code, header, 16 if header.deep else 8)
    return Encoded(Container(header, tuple(tiles)), pixels, bits, checks.hexdigest()), (integers, hyper)


@torch.no_grad()
def decode_rgb(model: LoadedModel, container: Container, *, bits: int = 8, progress: Progress | None = None) -> Decoded:
    """Decode a container made with this model to 8 or 16 bits per sample.

    Raises CorruptError if the symbols are not those that were coded.
    """
    header, net = container.header, model.net
    if (header.entropy_id, header.synthesis_id) != (model.info.entropy_id, model.info.synthesis_id):
        raise UnsupportedError(f"made with other weights: {header.model} {header.entropy_id.hex()}")
    code = torch.tensor([float(header.quality)], device=model.device)
    boxes = list(latent_boxes(header.width, header.height, header.tile))
    full = _geometry(header.width, header.height)
    if header.streams != 1 + net.context.schedule.stream_of(net.context.schedule.steps(full) - 1) + 1:
        raise CorruptError(f"damaged: {header.streams} streams do not fit the model {header.model}")
    dequantised = torch.empty(1, full.height, full.width, net.config.latent, device=model.device)
    checks = SymbolChecks()
    for done, ((geometry, rows, columns), streams) in enumerate(zip(boxes, container.tiles, strict=True)):
        coded = code_tiles(model, geometry, [header.quality], [Reader(streams)], None)
        checks.add(coded.latents)
        dequantised[:, rows, columns] = coded.dequantised
        if progress:
            progress(done + 1, len(boxes))
    if checks.crc != header.symbols_crc:
        raise CorruptError("the decoded symbols fail their checksum: damaged, or this machine computes differently")
    return Decoded(_pixels(model, dequantised, code, header, bits), checks.hexdigest())


def _pixels(model: LoadedModel, dequantised: Tensor, code: Tensor, header: Header, bits: int) -> np.ndarray:
    pixels = windows.synthesis(model.net, dequantised, code, gray=header.gray, bits=bits)
    return pixels[0, : header.height, : header.width].cpu().numpy()


def _geometry(width: int, height: int) -> Geometry:
    """Latent grid of so many pixels, padded to whole hyper-latent positions."""
    n = HYPER_DOWNSAMPLING // DOWNSAMPLING
    return Geometry(1, -(-height // HYPER_DOWNSAMPLING) * n, -(-width // HYPER_DOWNSAMPLING) * n)


def latent_boxes(width: int, height: int, tile: int) -> Iterator[tuple[Geometry, slice, slice]]:
    """Geometry of each tile and its rows and columns in the latent grid of the image."""
    for x0, y0, x1, y1 in tile_boxes(width, height, tile):
        geometry = _geometry(x1 - x0, y1 - y0)
        top, left = y0 // DOWNSAMPLING, x0 // DOWNSAMPLING
        yield geometry, slice(top, top + geometry.height), slice(left, left + geometry.width)
