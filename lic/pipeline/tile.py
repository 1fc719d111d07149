"""The one step loop that encoder and decoder share.

They differ only in the object that turns (symbols, table rows) into bytes or back: :class:`Writer` or :class:`Reader`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lic import coder
from lic.coder import SCALES, Tables
from lic.errors import CorruptError
from lic.exact import exact_arithmetic
from lic.model import dependent
from lic.model.codec import CodecModel, expected_offset, gaussian_bits, round_for_rate
from lic.model.context import Geometry, Prediction
from lic.model.context.base import FRACTIONS, LOG_SCALE_0, LOG_SCALE_STEP, MEAN_LIMIT, Schedule
from lic.model.dependent import SPACING, Dependent, Forgetful
from lic.model.hyperprior import Z_LIMIT
from lic.model.store import LoadedModel


class SymbolCoder(Protocol):
    """Turns the values of each step into bytes (and returns them), or bytes into values."""

    def code(
        self,
        stream: int,
        rows: np.ndarray,
        tables: Tables,
        values: np.ndarray | None,
        *,
        last: bool,
    ) -> np.ndarray:
        """The next values of a stream, all those that are left if ``last``.

        rows and values, integers (N,); values is None for a reader.
        """

    def code_chain(self, stream: int, rows: np.ndarray, quantiser: Dependent, values: np.ndarray | None) -> np.ndarray:
        """The next values of a stream, a chain of dependent quantisation; the stream goes on behind them.

        rows: those of quantiser 0; those of quantiser 1 follow each.
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
        self,
        stream: int,
        rows: np.ndarray,
        tables: Tables,
        values: np.ndarray | None,
        *,
        last: bool,
    ) -> np.ndarray:
        assert values is not None and stream not in self._finished
        self._open.setdefault(stream, coder.Encoder()).push(values, rows, tables)
        if last:
            self._finished[stream] = self._open.pop(stream).finish()
        return values

    def code_chain(self, stream: int, rows: np.ndarray, quantiser: Dependent, values: np.ndarray | None) -> np.ndarray:
        assert values is not None
        return self.code(stream, rows + quantiser.quantisers(values)[0], quantiser.tables, values, last=False)


class Reader:
    """Reads the streams of a tile."""

    def __init__(self, streams: tuple[bytes, ...]) -> None:
        self.streams = streams
        self._open: dict[int, coder.Decoder] = {}

    def code(
        self,
        stream: int,
        rows: np.ndarray,
        tables: Tables,
        values: np.ndarray | None,
        *,
        last: bool,
    ) -> np.ndarray:
        if last and stream not in self._open:
            return coder.decode(self.streams[stream], rows, tables)  # all at once is faster
        decoder = self._decoder(stream)
        values = decoder.pull(rows, tables)
        if last:
            decoder.finish()
            del self._open[stream]
        return values

    def code_chain(self, stream: int, rows: np.ndarray, quantiser: Dependent, values: np.ndarray | None) -> np.ndarray:
        decoder = self._decoder(stream)
        return decoder.pull_chain(rows, quantiser.tables, quantiser.trellis)

    def _decoder(self, stream: int) -> coder.Decoder:
        if stream not in self._open:
            self._open[stream] = coder.Decoder(self.streams[stream])
        return self._open[stream]


class LeadingReader(Reader):
    """Reads the leading streams of a tile. In place of the others it gives the values nearest to what is predicted.

    ``stream``: the last one that it has begun to read.
    """

    stream = 0

    def code(
        self,
        stream: int,
        rows: np.ndarray,
        tables: Tables,
        values: np.ndarray | None,
        *,
        last: bool,
    ) -> np.ndarray:
        if stream >= len(self.streams):
            return np.zeros(len(rows), np.int32)  # values count from the predicted mean, rounded
        self.stream = stream
        return super().code(stream, rows, tables, values, last=last)

    def code_chain(self, stream: int, rows: np.ndarray, quantiser: Dependent, values: np.ndarray | None) -> np.ndarray:
        if stream >= len(self.streams):
            return np.zeros(len(rows), np.int32)
        self.stream = stream
        return super().code_chain(stream, rows, quantiser, values)


@dataclass
class Latents:
    """z (B, h/4, w/4, C), integers held as float, and y (B, h, w, M): integers too, or with a ``weight``.

    weight: bits that a squared error of one quantiser step is worth for each latent, (B, h, w, M). y is then in
    quantiser steps; integers count in :attr:`CodecModel.spacing` steps.
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


class Place(NamedTuple):
    """Where a step is coded: its stream, whether it is the last of it, and the first step's grid, if it has one."""

    stream: int
    ends_stream: bool
    grid: tuple[int, int] | None


def places(schedule: Schedule, geometry: Geometry) -> list[Place]:
    """Of every step."""
    streams = [1 + schedule.stream_of(step) for step in range(schedule.steps(geometry))]
    last = {stream: step for step, stream in enumerate(streams)}
    grid = schedule.first_grid(geometry)
    return [Place(its, last[its] == step, None if step else grid) for step, its in enumerate(streams)]


class Part(NamedTuple):
    """Known latents of a step and their weight, (B, P, C), as in :class:`Latents`."""

    y: Tensor
    weight: Tensor | None


class _Coded(NamedTuple):
    """A step as coded: integers and dequantised latents (B, P, C), bits (B,) of writers."""

    y: Tensor
    dequantised: Tensor
    bits: Tensor


class Predicted(NamedTuple):
    """What the latents of a step (B, P, C) are coded with, in integers: the mean in eighths, and the row of SCALES."""

    mean: Tensor
    scale_index: Tensor


def predicted_integers(p: Prediction) -> Predicted:
    """A prediction (B, P, C) in the integers that tables are chosen by.

    Nothing is rounded or limited here where arithmetic is exact.
    """
    mean = torch.round(p.eighths.clamp(-MEAN_LIMIT, MEAN_LIMIT)).int()
    return Predicted(mean, torch.round(p.scale_index.clamp(0, len(SCALES) - 1)).int())


class Quantised(NamedTuple):
    """Integers of a tile and its dequantised latents, (B, h, w, M), and the bits of y, (B,)."""

    y: Tensor
    dequantised: Tensor
    bits: Tensor


@torch.no_grad()
def quantised_in_steps(
    net: CodecModel, geometry: Geometry, z: Tensor, code: Tensor, y: Tensor, weight: Tensor
) -> Quantised:
    """What :func:`code_tiles` makes of latents, step by step with the context of its own choices, coding nothing.

    z, y and weight as in :class:`Latents`. A network in floating point may choose otherwise than the exact one.
    """
    assert net.dependent is not None
    integers, dequantised, bits = torch.empty_like(y), torch.empty_like(y), y.new_zeros(len(y))
    schedule = net.context.schedule
    state = net.context.start(net.h_s(z, code), geometry, code, net.unit(code))
    for step, place in enumerate(places(schedule, geometry)):
        predicted = predicted_integers(net.context.predict(state, step))
        part = Part(schedule.take(y, step), schedule.take(weight, step))
        coded = _dependent(net.dependent, place, predicted, [Forgetful()] * len(y), part)
        schedule.put(integers, step, coded.y)
        schedule.put(dequantised, step, coded.dequantised)
        bits += coded.bits
        state = net.context.observe(state, step, coded.y)
    return Quantised(integers, dequantised, bits)


def code_step(
    model: LoadedModel, place: Place, predicted: Predicted, symbols: Sequence[SymbolCoder], known: Part | None
) -> _Coded:
    """Code a step of a batch of tiles, whose latents are None for readers."""
    if model.net.dependent is None:
        return _scalar(model, place, predicted, symbols, known)
    return _dependent(model.net.dependent, place, predicted, [_OfStep(its, place) for its in symbols], known)


def _scalar(
    model: LoadedModel, place: Place, predicted: Predicted, symbols: Sequence[SymbolCoder], known: Part | None
) -> _Coded:
    """Each latent by itself, at a whole number of quantiser steps."""
    centred, scale_index = predicted.mean + FRACTIONS // 2, predicted.scale_index
    shift = centred.div(FRACTIONS, rounding_mode="floor")
    mean = predicted.mean / FRACTIONS
    scale = torch.exp(LOG_SCALE_0 + scale_index * LOG_SCALE_STEP)
    given = None
    if known is not None:
        y = known.y
        if known.weight is not None:
            y = round_for_rate(y, mean, scale, known.weight, model.net.centroids)
        given = y.int() - shift
    rows = scale_index * FRACTIONS + centred - shift * FRACTIONS
    values = _code(symbols, place.stream, rows, model.y_tables, given, last=place.ends_stream)
    y = (values + shift).float()
    bits = gaussian_bits(y, mean, scale).sum(dim=(1, 2)) if known is not None else y.new_zeros(len(y))
    return _Coded(y, y + expected_offset(y, mean, scale, model.net.centroids), bits)


def _dependent(
    quantiser: Dependent,
    place: Place,
    predicted: Predicted,
    symbols: Sequence[dependent.SymbolCoder],
    known: Part | None,
) -> _Coded:
    """Each latent at one of the integers that those before it in its chain leave it (:mod:`lic.model.dependent`)."""
    shape, device = predicted.mean.shape, predicted.mean.device
    mean, scale_index = (t.flatten(1).cpu().numpy().astype(np.int64) for t in predicted)
    y = None if known is None else known.y.flatten(1).cpu().numpy()
    weight = None
    if known is not None and known.weight is not None:
        weight = known.weight.flatten(1).cpu().numpy() * np.float32(SPACING**2)
    integers, offsets = np.zeros_like(mean), np.zeros(mean.shape, np.float32)
    bits = np.zeros(len(mean))
    for piece in quantiser.pieces(place.grid, mean, scale_index, integers):
        at, shift, eighths = piece.at, piece.shift, piece.eighths
        its_symbols: Sequence[dependent.Ints | None] = [None] * len(symbols)
        if y is not None and weight is None:
            distances = y[:, at].astype(np.int64) - shift
            its_symbols = [quantiser.symbols_of(*its) for its in zip(distances, piece.scale_index, strict=True)]
        elif y is not None and weight is not None:
            from_mean = (y[:, at] / np.float32(SPACING) - shift).astype(np.float32)
            threads = torch.get_num_threads()
            its_symbols = list(quantiser.choose(from_mean, piece.scale_index, eighths, weight[:, at], threads))
        for b, (its_coder, given) in enumerate(zip(symbols, its_symbols, strict=True)):
            coded = quantiser.code(its_coder, piece.scale_index[b], eighths[b], given, last=piece.is_last)
            integers[b, at], offsets[b, at] = shift[b] + coded.distances, coded.offsets
            bits[b] += coded.bits
    of_step, offset, total = (torch.from_numpy(values).float().to(device) for values in (integers, offsets, bits))
    of_step = of_step.view(shape)
    return _Coded(of_step, (of_step + offset.view(shape)) * SPACING, total)


@dataclass(frozen=True)
class _OfStep:
    """The coder of a tile at a step, as :class:`dependent.SymbolCoder`."""

    symbols: SymbolCoder
    place: Place

    def code_chain(self, rows: np.ndarray, quantiser: Dependent, values: np.ndarray | None) -> np.ndarray:
        return self.symbols.code_chain(self.place.stream, rows, quantiser, values)

    def code(self, rows: np.ndarray, tables: Tables, values: np.ndarray | None, *, last: bool) -> np.ndarray:
        last = last and self.place.ends_stream
        return self.symbols.code(self.place.stream, rows, tables, values, last=last)


def _code(
    symbols: Sequence[SymbolCoder], stream: int, rows: Tensor, tables: Tables, given: Tensor | None, last: bool = True
) -> Tensor:
    """The next values (B, ...) of one stream of each tile."""
    all_given = [None] * len(symbols) if given is None else _integers(given)
    values = [
        its.code(stream, its_rows, tables, its_given, last=last)
        for its, its_rows, its_given in zip(symbols, _integers(rows), all_given, strict=True)
    ]
    return torch.from_numpy(np.stack(values)).to(rows.device).reshape(rows.shape)


@torch.no_grad()
def code_tiles(
    model: LoadedModel, geometry: Geometry, codes: Sequence[int], symbols: Sequence[SymbolCoder], known: Latents | None
) -> CodedTiles:
    """Code a batch of tiles of one geometry, each with its quality code and its coder.

    ``known`` holds the latents for writers and is None for readers. Latents with a weight are rounded at their step,
    for the least bits + weight·error² under the table that they get, or chosen so along the chains of dependent
    quantisation; integers without a weight that it cannot have become others. Raises CorruptError if a reader's streams
    do not decode.
    """
    net, device = model.net, model.device
    config, schedule = net.config, net.context.schedule
    code = torch.tensor(codes, device=device)
    shape = (geometry.batch, geometry.height, geometry.width)

    with exact_arithmetic():
        z_shape = (shape[0], shape[1] // 4, shape[2] // 4, config.hyper_latent)
        channel = torch.arange(config.hyper_latent, device=device)
        z_rows = net.prior.bucket(code)[:, None, None, None] * config.hyper_latent + channel
        known_z = None if known is None else known.z
        z_values = _code(symbols, 0, z_rows.expand(z_shape), model.z_tables, known_z)
        if int(z_values.abs().max()) > Z_LIMIT:
            raise CorruptError("damaged: a hyper-latent is out of range")
        z = z_values.float()

        y = torch.zeros(*shape, config.latent, device=device)
        dequantised = torch.zeros_like(y)
        bits = torch.zeros(shape[0], device=device)
        if known is not None:
            bits += net.prior.bits(z, code).sum(dim=(1, 2, 3))
        state = net.context.start(net.h_s(z, code), geometry, code, net.unit(code))
        for step, place in enumerate(places(schedule, geometry)):
            predicted = predicted_integers(net.context.predict(state, step))
            part = None
            if known is not None:
                weight = None if known.weight is None else schedule.take(known.weight, step)
                part = Part(schedule.take(known.y, step), weight)
            coded = code_step(model, place, predicted, symbols, part)
            bits += coded.bits
            schedule.put(y, step, coded.y)
            schedule.put(dequantised, step, coded.dequantised)
            state = net.context.observe(state, step, coded.y)
    return CodedTiles(Latents(z, y), dequantised, bits)


def _integers(x: Tensor) -> list[np.ndarray]:
    """Of each tile, int32 (N,)."""
    return list(x.reshape(len(x), -1).to(torch.int32).cpu().numpy())
