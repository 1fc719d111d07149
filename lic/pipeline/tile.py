"""The one step loop that encoder and decoder share.

They differ only in the object that turns (symbols, table rows) into bytes or back: :class:`Writer` or :class:`Reader`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lic import coder
from lic.coder import SCALES, Tables
from lic.errors import CorruptError
from lic.exact import exact_arithmetic
from lic.model.codec import expected_offset, gaussian_bits, round_for_rate
from lic.model.context import Geometry
from lic.model.context.base import FRACTIONS, LOG_SCALE_0, LOG_SCALE_STEP, MEAN_LIMIT
from lic.model.hyperprior import Z_LIMIT
from lic.model.store import LoadedModel


class SymbolCoder(Protocol):
    """Turns the values of each step into bytes (and returns them), or bytes into values."""

    def code(
        self, stream: int, rows: np.ndarray, tables: Tables, values: np.ndarray | None, *, last: bool
    ) -> np.ndarray:
        """The next values of a stream, all those that are left if ``last``.

        rows and values int32 (N,); values is None for a reader.
        """


class Writer:
    """Collects the streams of a tile."""

    def __init__(self) -> None:
        self._open: dict[int, coder.Encoder] = {}
        self._finished: dict[int, bytes] = {}

    @property
    def streams(self) -> list[bytes]:
        """In their order, once all of them are finished."""
        assert not self._open
        return [self._finished[stream] for stream in sorted(self._finished)]

    def code(
        self, stream: int, rows: np.ndarray, tables: Tables, values: np.ndarray | None, *, last: bool
    ) -> np.ndarray:
        assert values is not None and stream not in self._finished
        self._open.setdefault(stream, coder.Encoder()).push(values, rows, tables)
        if last:
            self._finished[stream] = self._open.pop(stream).finish()
        return values


class Reader:
    """Reads the streams of a tile."""

    def __init__(self, streams: tuple[bytes, ...]) -> None:
        self.streams = streams
        self._open: dict[int, coder.Decoder] = {}

    def code(
        self, stream: int, rows: np.ndarray, tables: Tables, values: np.ndarray | None, *, last: bool
    ) -> np.ndarray:
        if last and stream not in self._open:
            return coder.decode(self.streams[stream], rows, tables)  # all at once is faster
        if stream not in self._open:
            self._open[stream] = coder.Decoder(self.streams[stream])
        decoder = self._open[stream]
        values = decoder.pull(rows, tables)
        if last:
            decoder.finish()
            del self._open[stream]
        return values


class LeadingReader(Reader):
    """Reads the leading streams of a tile. In place of the others it gives the values nearest to what is predicted.

    ``stream``: the last one that it has begun to read.
    """

    stream = 0

    def code(
        self, stream: int, rows: np.ndarray, tables: Tables, values: np.ndarray | None, *, last: bool
    ) -> np.ndarray:
        if stream >= len(self.streams):
            return np.zeros(len(rows), np.int32)  # values count from the predicted mean, rounded
        self.stream = stream
        return super().code(stream, rows, tables, values, last=last)


@dataclass
class Latents:
    """z (B, h/4, w/4, C), integers held as float, and y (B, h, w, M): integers too, or with a ``weight``.

    weight: bits that a squared error of one quantiser step is worth for each latent, (B, h, w, M).
    """

    z: Tensor
    y: Tensor
    weight: Tensor | None = None


@dataclass
class CodedTiles:
    """The latents as coded, the dequantised latents (with their offset) and, for writers, the model's bits, (B,)."""

    latents: Latents
    dequantised: Tensor
    estimated_bits: Tensor


@torch.no_grad()
def code_tiles(
    model: LoadedModel, geometry: Geometry, codes: Sequence[int], symbols: Sequence[SymbolCoder], known: Latents | None
) -> CodedTiles:
    """Code a batch of tiles of one geometry, each with its quality code and its coder.

    ``known`` holds the latents for writers and is None for readers. Latents with a weight are rounded at their step,
    for the least bits + weight·error² under the table that they get. Raises CorruptError if a reader's streams do not
    decode.
    """
    net, device = model.net, model.device
    config, schedule = net.config, net.context.schedule
    code = torch.tensor(codes, device=device)
    shape = (geometry.batch, geometry.height, geometry.width)

    def code_part(stream: int, rows: Tensor, tables: Tables, given: Tensor | None, last: bool) -> Tensor:
        """The next values (B, ...) of one stream of each tile."""
        all_given = [None] * len(symbols) if given is None else _integers(given)
        values = [
            coder.code(stream, its_rows, tables, its_given, last=last)
            for coder, its_rows, its_given in zip(symbols, _integers(rows), all_given, strict=True)
        ]
        return torch.from_numpy(np.stack(values)).to(device).reshape(rows.shape)

    with exact_arithmetic():
        z_shape = (shape[0], shape[1] // 4, shape[2] // 4, config.hyper_latent)
        channel = torch.arange(config.hyper_latent, device=device)
        z_rows = net.prior.bucket(code)[:, None, None, None] * config.hyper_latent + channel
        z_values = code_part(0, z_rows.expand(z_shape), model.z_tables, None if known is None else known.z, last=True)
        if int(z_values.abs().max()) > Z_LIMIT:
            raise CorruptError("damaged: a hyper-latent is out of range")
        z = z_values.float()

        y = torch.zeros(*shape, config.latent, device=device)
        dequantised = torch.zeros_like(y)
        bits = torch.zeros(shape[0], device=device)
        if known is not None:
            bits += net.prior.bits(z, code).sum(dim=(1, 2, 3))
        state = net.context.start(net.h_s(z, code), geometry, code, net.unit(code))
        last_steps = {schedule.stream_of(step): step for step in range(schedule.steps(geometry))}
        for step in range(schedule.steps(geometry)):
            p = net.context.predict(state, step)
            # Nothing changes here where arithmetic is exact.
            eighths = torch.round(p.eighths.clamp(-MEAN_LIMIT, MEAN_LIMIT)).int()
            scale_index = torch.round(p.scale_index.clamp(0, len(SCALES) - 1)).int()
            centred = eighths + FRACTIONS // 2
            shift = centred.div(FRACTIONS, rounding_mode="floor")
            rows = scale_index * FRACTIONS + (centred - shift * FRACTIONS)
            mean, scale = eighths / FRACTIONS, torch.exp(LOG_SCALE_0 + scale_index * LOG_SCALE_STEP)
            given = None
            if known is not None:
                y_known = schedule.take(known.y, step)
                if known.weight is not None:
                    y_known = round_for_rate(y_known, mean, scale, schedule.take(known.weight, step), net.centroids)
                given = y_known.int() - shift
            stream = schedule.stream_of(step)
            values = code_part(1 + stream, rows, model.y_tables, given, last=step == last_steps[stream])
            y_step = (values + shift).float()
            if known is not None:
                bits += gaussian_bits(y_step, p.mean, p.scale).sum(dim=(1, 2))
            schedule.put(y, step, y_step)
            schedule.put(dequantised, step, y_step + expected_offset(y_step, mean, scale, net.centroids))
            state = net.context.observe(state, step, y_step)
    return CodedTiles(Latents(z, y), dequantised, bits)


def _integers(x: Tensor) -> list[np.ndarray]:
    """Of each tile, int32 (N,)."""
    return list(x.reshape(len(x), -1).to(torch.int32).cpu().numpy())
