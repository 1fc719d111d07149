"""The one step loop that encoder and decoder share.

They differ only in the object that turns (symbols, table rows) into bytes or back: :class:`Writer` or :class:`Reader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lic import coder
from lic.coder import SCALES, Tables
from lic.errors import CorruptError
from lic.model.codec import bounded_scale, expected_offset, gaussian_bits, round_for_rate
from lic.model.context import Geometry
from lic.model.hyperprior import Z_LIMIT
from lic.model.store import LoadedModel
from lic.model.tables import FRACTIONS, LOG_SCALE_0, LOG_SCALE_STEP

MEAN_LIMIT = 2.0**17  # predicted means are clamped to it, in quantiser steps


class SymbolCoder(Protocol):
    """Turns the values of one stream into bytes (and returns them), or bytes into values."""

    def code(self, stream: int, rows: np.ndarray, tables: Tables, values: np.ndarray | None) -> np.ndarray:
        """rows and values int32 (N,); values is None for a reader."""


class Writer:
    """Collects the streams of a tile."""

    def __init__(self) -> None:
        self.streams: list[bytes] = []

    def code(self, stream: int, rows: np.ndarray, tables: Tables, values: np.ndarray | None) -> np.ndarray:
        assert values is not None and stream == len(self.streams)
        self.streams.append(coder.encode(values, rows, tables))
        return values


class Reader:
    """Reads the streams of a tile."""

    def __init__(self, streams: tuple[bytes, ...]) -> None:
        self.streams = streams

    def code(self, stream: int, rows: np.ndarray, tables: Tables, values: np.ndarray | None) -> np.ndarray:
        return coder.decode(self.streams[stream], rows, tables)


@dataclass
class Latents:
    """z (1, h/4, w/4, C), integers held as float, and y (1, h, w, M): integers too, or not rounded yet."""

    z: Tensor
    y: Tensor


@dataclass
class CodedTile:
    """The latents as coded, the dequantised latents (with their offset) and, for a writer, the float model's bits."""

    latents: Latents
    dequantised: Tensor
    estimated_bits: float


@torch.no_grad()
def code_tile(
    model: LoadedModel, geometry: Geometry, quality_code: int, symbols: SymbolCoder, known: Latents | None
) -> CodedTile:
    """Code one tile. ``known`` holds the latents for a writer, y not rounded, and is None for a reader.

    A writer rounds each step's latents for the least bits + λ·distortion under the table that they get. Raises
    CorruptError if a reader's streams do not decode.
    """
    net, device = model.net, model.device
    config, schedule = net.config, net.context.schedule
    code = torch.tensor([float(quality_code)], device=device)
    shape = (geometry.height, geometry.width)

    z_shape = (1, shape[0] // 4, shape[1] // 4, config.hyper_latent)
    bucket = int(net.prior.bucket(code))
    z_rows = np.tile(np.arange(config.hyper_latent, dtype=np.int32), z_shape[1] * z_shape[2])
    z_values = None if known is None else _integers(known.z)
    z_values = symbols.code(0, z_rows + bucket * config.hyper_latent, model.z_tables, z_values)
    if np.abs(z_values).max() > Z_LIMIT:
        raise CorruptError("damaged: a hyper-latent is out of range")
    z = torch.from_numpy(z_values).to(device, torch.float32).reshape(z_shape)

    y = torch.zeros(1, *shape, config.latent, device=device)
    dequantised = torch.zeros_like(y)
    bits = 0.0 if known is None else float(net.prior.bits(z, code).sum())
    weight = net.distortion_weight(code)[:, None, None].expand_as(y)
    state = net.context.start(net.h_s(z, code), geometry, code, net.unit(code))
    for step in range(schedule.steps(geometry)):
        mean, log_scale = net.context.predict(state, step)
        eighths = torch.round(mean.clamp(-MEAN_LIMIT, MEAN_LIMIT) * FRACTIONS).int()
        scale_index = torch.round((log_scale - LOG_SCALE_0) / LOG_SCALE_STEP).clamp(0, len(SCALES) - 1).int()
        centred = eighths + FRACTIONS // 2
        shift = centred.div(FRACTIONS, rounding_mode="floor")
        rows = scale_index * FRACTIONS + (centred - shift * FRACTIONS)
        table_mean, scale = eighths / FRACTIONS, torch.exp(LOG_SCALE_0 + scale_index * LOG_SCALE_STEP)
        given = None
        if known is not None:
            rounded = round_for_rate(schedule.take(known.y, step), table_mean, scale, schedule.take(weight, step))
            given = _integers(rounded) - _integers(shift)
        values = symbols.code(1 + schedule.stream_of(step), _integers(rows), model.y_tables, given)
        y_step = (torch.from_numpy(values).to(device).reshape(shift.shape) + shift).float()
        if known is not None:
            bits += float(gaussian_bits(y_step, mean, bounded_scale(log_scale)).sum())
        schedule.put(y, step, y_step)
        schedule.put(dequantised, step, y_step + expected_offset(y_step, table_mean, scale))
        state = net.context.observe(state, step, y_step)
    return CodedTile(Latents(z, y), dequantised, bits)


def _integers(x: Tensor) -> np.ndarray:
    return x.reshape(-1).to(torch.int32).cpu().numpy()
