"""Tables and offsets of dependent quantisation, from how often what is chosen on training pictures; neighbours."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from torch import Tensor

from lic.coder import SCALES, Tables
from lic.exact import exact_arithmetic
from lic.model.codec import FOR_SQUARED_ERROR, CodecModel, Corrections
from lic.model.context import Geometry
from lic.model.dependent import (
    COARSE,
    OFFSETS,
    QUANTISERS,
    SPACING,
    Chains,
    Dependent,
    distance,
    trellis_of,
)
from lic.model.neighbours import FRACTIONS, WEIGHT_BITS, Neighbours, levels_of, sum_around
from lic.pipeline.tile import places, predicted_integers, quantised_in_steps

LIMIT = 48  # symbols counted, in magnitude
PRIOR = 60.0  # how many observations a Gaussian counts for beside what was observed
MAX_CODED_SCALE = 4.0  # of the rest of a large symbol, in units of 2**raw_bits; as in lic.coder.tables
HALF_WIDTH = 3.6
SMALL = QUANTISERS  # third index of counts: quantisers of latents in chains, and those in none
_SYMBOLS = np.arange(-LIMIT, LIMIT + 1)
LEVELS = 5  # of grids of neighbours
NARROWER = range(-4, 13)  # scale indices that neighbours may take away
LEAST_SHARE = 0.002  # of the bits of the first step that a channel must save by neighbours

TRELLIS = trellis_of(0o13465, 0o7506)
CHAINS = Chains(9, 26)


class Statistics:
    """Counts (scale, fraction, quantiser or SMALL, symbol), and sums of what offsets should be."""

    def __init__(self) -> None:
        self.counts = np.zeros((len(SCALES), FRACTIONS, QUANTISERS + 1, len(_SYMBOLS)))
        self.sums, self.weights = np.zeros((2, len(SCALES), QUANTISERS, OFFSETS))

    def add(self, chosen: Chosen) -> None:
        """What was chosen for the latents of a step."""
        y, _, symbols, quantisers, scale_index, eighths = chosen
        np.add.at(self.counts, (scale_index, eighths, quantisers, symbols.clip(-LIMIT, LIMIT) + LIMIT), 1)
        quantiser = quantisers % SMALL
        fraction = (eighths - FRACTIONS // 2) / FRACTIONS
        towards = np.where(symbols == 0, fraction, np.sign(symbols))
        entry = scale_index, quantiser, np.minimum(np.abs(symbols), OFFSETS - 1)
        np.add.at(self.sums, entry, (y - distance(symbols, quantiser)) * towards)
        np.add.at(self.weights, entry, towards**2)


@torch.no_grad()
def dependently_quantised(net: CodecModel, y: Tensor, z: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (B, h, w, M) that are chosen for latents y in quantiser steps, and half the distances to the next values
    that they could have, below and above, (2, B, h, w, M) in half integers, 1 or 2."""
    schedule = net.context.schedule
    integers, halves = torch.empty_like(y), y.new_empty(2, *y.shape)
    for step, chosen in enumerate(chosen_steps(net, y, z, code)):
        shape, quantisers = schedule.take(y, step).shape, chosen.quantisers % SMALL
        here, before, after = (distance(chosen.symbols + d, quantisers) for d in (0, -1, 1))
        of_step = chosen.shift + here, here - before, after - here
        for target, values in zip((integers, *halves), of_step, strict=True):
            schedule.put(target, step, torch.from_numpy(values).float().view(shape))
    return integers, halves


@torch.no_grad()
def quantised(net: CodecModel, y: Tensor, z: Tensor, code: Tensor, worth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers that a network with dependent quantisation chooses for latents y (B, h, w, M) in quantiser steps, given
    integers z, and the dequantised latents. ``worth`` as for :meth:`CodecModel.rounded`."""
    weight = net.rounding_weight(code, worth is None)[:, None, None].expand_as(y)
    with exact_arithmetic():
        its_weight = weight if worth is None else worth * weight
        found = quantised_in_steps(net, Geometry(*y.shape[:3]), z, code, y, its_weight)
    return found.y, found.dequantised


class ToQuantise(NamedTuple):
    """Latents y (B, h, w, M) as an encoder has them before it quantises, z (B, h/4, w/4, C) and quality codes (B,)."""

    y: Tensor
    z: Tensor
    code: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        net: CodecModel,
        x: Tensor,
        code: Tensor,
        worth: Tensor | None = None,
        corrections: Corrections = FOR_SQUARED_ERROR,
    ) -> ToQuantise:
        """Of pixels (B, H, W, 3) in [-0.5, 0.5], without gradients. The others as for
        :meth:`CodecModel.latents_to_quantise`."""
        y = net.latents_to_quantise(x, code, worth, corrections)
        return cls(y, torch.round(net.hyper_analysis(y, code)), code)


def fit(
    net: CodecModel, latents: Sequence[ToQuantise], trellis: np.ndarray = TRELLIS, iterations: int = 6
) -> Dependent:
    """Dependent quantisation for a model with frozen weights, its entropy path exact, from its latents.

    Begins with Gaussians; every iteration chooses with the tables of the one before, all but the last two with a third
    of the latents each. The network has the result as its ``dependent``, and its units count in its integers.
    """
    found = _fitted(Statistics(), trellis)
    for i in range(iterations):
        net.quantise(found)
        statistics = Statistics()
        for y, z, code in latents if i >= iterations - 2 else latents[i % 3 :: 3]:
            for chosen in chosen_steps(net, y, z, code):
                statistics.add(chosen)
        found = _fitted(statistics, trellis)
    net.quantise(found)
    return found


def fit_neighbours(net: CodecModel, latents: Iterable[ToQuantise]) -> Dependent:
    """What the first step of a model with dependent quantisation can learn from neighbours, if there is anything.

    Least squares of what is unknown of the means of each channel, kept where they save bits. The network has the result
    as its ``dependent``.
    """
    assert net.dependent is not None
    plain = replace(net.dependent, neighbours=None)
    net.quantise(plain)
    samples: list[list[_Samples]] = [[] for _ in range(LEVELS)]
    for y, z, code in latents:
        grid = net.context.schedule.first_grid(Geometry(*y.shape[:3]))
        if grid is None:
            return plain
        with closing(chosen_steps(net, y, z, code)) as steps:
            chosen = next(steps)
        integers = distance(chosen.symbols, chosen.quantisers % SMALL)
        unknown = FRACTIONS * integers - (chosen.eighths - FRACTIONS // 2)
        by_position = (len(y), grid[0] * grid[1], -1)
        around = unknown.reshape(len(y), *grid, -1)
        unknown, scale_index = unknown.reshape(by_position), chosen.scale_index.reshape(by_position)
        fraction = chosen.eighths.reshape(by_position)
        for number, (positions, away, is_diagonal) in enumerate(levels_of(grid, LEVELS)):
            total = sum_around(around, away, is_diagonal) if number else np.zeros_like(around)
            at = [values.reshape(by_position)[:, positions] for values in (unknown, total, scale_index, fraction)]
            samples[number].append(_Samples(*(values.reshape(-1, values.shape[-1]) for values in at)))
    of_levels = [_Samples(*(np.concatenate(values) for values in zip(*level, strict=True))) for level in samples]
    by_channel = [
        [_Samples(*(values[:, channel] for values in level)) for level in of_levels]
        for channel in range(of_levels[0].unknown.shape[1])
    ]
    before = [sum(_bits(plain, level, 0, 0) for level in its) for its in by_channel]
    channels, weights, narrower = [], [], []
    for channel, its in enumerate(by_channel):
        found = [_least_bits(plain, level, has_neighbours=n > 0) for n, level in enumerate(its)]
        if before[channel] - sum(bits for bits, _, _ in found) > LEAST_SHARE * sum(before):
            channels.append(channel)
            weights.append([weight for _, weight, _ in found[1:]])
            narrower.append([fewer for _, _, fewer in found])
    if channels:
        neighbours = Neighbours(*(np.array(values, np.int64) for values in (channels, weights, narrower)))
        net.quantise(replace(plain, neighbours=neighbours))
    return net.dependent


class _Samples(NamedTuple):
    """Latents of a level, (n, channels): what the mean misses, in eighths, that of their neighbours, and what they are
    coded with."""

    unknown: np.ndarray
    around: np.ndarray
    scale_index: np.ndarray
    eighths: np.ndarray


def _least_bits(quantiser: Dependent, samples: _Samples, has_neighbours: bool) -> tuple[float, int, int]:
    """Bits of the latents of a level and channel, and the weight of neighbours and the fewer scale indices for that."""
    weight, least = 0, quantiser.chains.least
    if has_neighbours:
        worth = np.where(samples.scale_index < least, 0, SCALES[samples.scale_index].clip(SCALES[least]) ** -2.0)
        square = float(worth @ samples.around.astype(float) ** 2)
        product = float(worth @ (samples.around * samples.unknown).astype(float))
        weight = int(np.clip(np.rint(2**WEIGHT_BITS * product / max(square, 1.0)), 0, np.iinfo(np.int8).max))
    found = [(_bits(quantiser, samples, weight, fewer), weight, fewer) for fewer in NARROWER]
    return min(found, key=lambda its: (its[0], abs(its[2])))


def _bits(quantiser: Dependent, samples: _Samples, weight: int, fewer: int) -> float:
    """Of the integers that are there, by the tables of medium and large latents, those of small ones left out."""
    chains = quantiser.chains
    change = weight * samples.around + (1 << WEIGHT_BITS - 1) >> WEIGHT_BITS
    unknown = samples.unknown - change
    away = -((FRACTIONS // 2 - unknown) // FRACTIONS)  # from the new mean, rounded
    eighths = FRACTIONS * away - unknown + FRACTIONS // 2
    scale_index = (samples.scale_index - fewer).clip(chains.least, len(SCALES) - 1)
    chained = samples.scale_index >= chains.least
    total = 0.0
    for kind, at in enumerate((chained & (scale_index < chains.large), chained & (scale_index >= chains.large)), 1):
        odd = away[at] & 1
        for quantiser_of, part in ((odd, 0.5), (np.where(away[at] == 0, 1, odd), 0.5)):
            symbols = away[at] + np.sign(away[at]) * quantiser_of >> 1
            lengths = quantiser.lengths(symbols, scale_index[at], eighths[at], quantiser_of, kind)
            total += part * float(lengths.sum(dtype=np.float64))
    return total


class Chosen(NamedTuple):
    """A step of a batch of crops, all (B, N): y in integers from the rounded mean ``shift``, the symbols chosen for it
    and their quantisers, SMALL for those in no chain, and what they are coded with."""

    y: np.ndarray
    shift: np.ndarray
    symbols: np.ndarray
    quantisers: np.ndarray
    scale_index: np.ndarray
    eighths: np.ndarray


def _quantisers(quantiser: Dependent, symbols: np.ndarray, scale_index: np.ndarray) -> np.ndarray:
    result = np.full(symbols.shape, SMALL)
    for its_result, its_symbols, its_scale_index in zip(result, symbols, scale_index, strict=True):
        at = np.concatenate(quantiser.chains.kinds(its_scale_index)[1:])
        its_result[at] = quantiser.quantisers(its_symbols[at])[0]
    return result


@torch.no_grad()
def chosen_steps(net: CodecModel, y: Tensor, z: Tensor, code: Tensor) -> Generator[Chosen, None, None]:
    """Dependent quantisation of latents y (B, h, w, M) in quantiser steps, step by step with the context of its own."""
    assert net.dependent is not None
    geometry, schedule = Geometry(*y.shape[:3]), net.context.schedule
    weight = (net.rounding_weight(code, True) * SPACING**2)[:, None, None].expand_as(y)
    with exact_arithmetic():
        state = net.context.start(net.h_s(z, code), geometry, code, net.unit(code))
        for step, place in enumerate(places(schedule, geometry)):
            predicted = predicted_integers(net.context.predict(state, step))
            shape = predicted.mean.shape
            its_y, its_weight = (schedule.take(t, step).flatten(1).cpu().numpy() for t in (y / SPACING, weight))
            means, scales = (t.flatten(1).cpu().numpy().astype(np.int64) for t in predicted)
            chosen = Chosen(np.empty_like(its_y), *(np.empty_like(means) for _ in Chosen._fields[1:]))
            integers = np.zeros_like(means)
            for piece in net.dependent.pieces(place.grid, means, scales, integers):
                at, shift, eighths = piece.at, piece.shift, piece.eighths
                from_mean = (its_y[:, at] - shift).astype(np.float32)
                symbols = net.dependent.choose(from_mean, piece.scale_index, eighths, its_weight[:, at])
                quantisers = _quantisers(net.dependent, symbols, piece.scale_index)
                of_piece = Chosen(from_mean, shift, symbols, quantisers, piece.scale_index, eighths)
                for target, values in zip(chosen, of_piece, strict=True):
                    target[:, at] = values
                integers[:, at] = shift + distance(symbols, quantisers % SMALL)
            yield chosen
            state = net.context.observe(state, step, torch.from_numpy(integers).to(y).view(shape))


def _fitted(statistics: Statistics, trellis: np.ndarray = TRELLIS) -> Dependent:
    """Tables and offsets from what was seen, in the order of the rows of :class:`Dependent`."""
    counts = statistics.counts
    # What is left and right of the mean is alike.
    mirrored = counts.copy()
    mirrored[:, 1:] += counts[:, :0:-1, :, ::-1]
    pmfs: list[np.ndarray] = []
    offsets: list[int] = []
    raw_bits: list[int] = []

    def append(probabilities: np.ndarray, width: float) -> None:
        """A row from the probabilities of -LIMIT..LIMIT, of so many symbols each way."""
        half = min(LIMIT, max(1, math.ceil(width)))
        pmfs.append(probabilities[LIMIT - half : LIMIT + half + 1])
        offsets.append(-half)
        raw_bits.append(0)

    factors = _factors(mirrored)
    for i, j in np.ndindex(CHAINS.large, FRACTIONS):
        append(_blend(mirrored[i, j, SMALL], SCALES[i] * factors[i, SMALL], (j - 4) / 8, 0), 2 + 2.5 * float(SCALES[i]))
    for i, j, q in np.ndindex(CHAINS.large - CHAINS.least, FRACTIONS, QUANTISERS):
        i += CHAINS.least
        row = _blend(mirrored[i, j, q], SCALES[i] * factors[i, q], (j - 4) / 8, q)
        row[[LIMIT - 1, LIMIT + 1]] += 2.0**-12  # no row of a latent in a chain may be skipped
        append(row / row.sum(), 2 + 2.5 * float(SCALES[i]))
    joint = {}
    fractions = np.arange(FRACTIONS).reshape(COARSE, -1)
    means = ((fractions - 4) / 8).mean(axis=1).tolist()
    for i, c in np.ndindex(len(SCALES) - CHAINS.large, COARSE):
        i += CHAINS.large
        js, mean = fractions[c], means[c]
        for q in range(QUANTISERS):
            joint[i, c, q] = _blend(counts[i, js, q].sum(axis=0), SCALES[i] * factors[i, q], mean, q)
        both = sum(joint[i, c, q] * (1 + counts[i, js, q].sum()) for q in range(QUANTISERS))
        odd = float(both[_SYMBOLS & 1 == 1].sum() / both.sum()) if SCALES[i] < LIMIT / 3 else 0.5
        pmfs.append(np.array([1 - odd, odd]) * (1 - 1e-6))
        offsets.append(0)
        raw_bits.append(0)
    for i, c, q, parity in np.ndindex(len(SCALES) - CHAINS.large, COARSE, QUANTISERS, 2):
        i += CHAINS.large
        k = max(0, math.ceil(math.log2(SCALES[i] / 4 / MAX_CODED_SCALE)))
        half = max(1, math.ceil(HALF_WIDTH * SCALES[i] / 4 / 2**k + 0.5))
        if k == 0:
            of_parity = joint[i, c, q][parity::2]  # LIMIT is even
            row = of_parity[LIMIT // 2 - half : LIMIT // 2 + half + 1] / of_parity.sum()
        else:
            m = np.arange(-half * 2**k - 2 ** (k - 1), (half + 1) * 2**k - 2 ** (k - 1))
            row = 2 * _gaussian(2 * m + parity, SCALES[i] * factors[i, q], means[c], q).reshape(-1, 2**k).sum(axis=1)
        pmfs.append(row / max(1.0, row.sum()))
        offsets.append(-half)
        raw_bits.append(k)
    offset = statistics.sums / (statistics.weights + 30)
    return Dependent(Tables.from_pmfs(pmfs, offsets, raw_bits), offset.astype(np.float32), trellis, CHAINS)


def _gaussian(symbols: np.ndarray, scale: float, mean: float, quantiser: int) -> np.ndarray:
    """Of a Gaussian, the mass between the middles of neighbouring values of a quantiser, for consecutive symbols."""
    here, after, before = (distance(symbols + d, quantiser) for d in (0, 1, -1))
    return ndtr(((here + after) / 2 - mean) / scale) - ndtr(((here + before) / 2 - mean) / scale)


def _blend(counts: np.ndarray, scale: float, mean: float, quantiser: int) -> np.ndarray:
    """Probabilities of -LIMIT..LIMIT: what was counted, and PRIOR times a Gaussian."""
    probabilities = (counts + PRIOR * _gaussian(_SYMBOLS, scale, mean, quantiser)) / (counts.sum() + PRIOR)
    return np.asarray(probabilities)


def _factors(counts: np.ndarray) -> np.ndarray:
    """For each scale and quantiser or SMALL, how much wider than predicted the Gaussian is that fits best."""
    factors = np.ones((len(SCALES), QUANTISERS + 1))
    for i, kind in np.ndindex(*factors.shape):
        seen = counts[i, :, kind]
        if seen.sum() < 300 or SCALES[i] > LIMIT / 3:
            factors[i, kind] = factors[i - 1, kind] if i else 1.0
            continue

        def misfit(log: float, seen: np.ndarray = seen, i: int = i, kind: int = kind) -> float:
            scale = SCALES[i] * math.exp(log)
            mass = [_gaussian(_SYMBOLS, scale, (j - 4) / 8, kind % SMALL) for j in range(FRACTIONS)]
            return -float((seen * np.log(np.maximum(mass, 1e-12))).sum())

        factors[i, kind] = math.exp(minimize_scalar(misfit, bounds=(-1.2, 0.6), method="bounded").x)
    return factors
