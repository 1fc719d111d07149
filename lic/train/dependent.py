"""Tables and offsets of dependent quantisation: from how often what is chosen, on training pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from torch import Tensor

from lic.coder import SCALES, Tables
from lic.exact import exact_arithmetic
from lic.model import dependent
from lic.model.codec import CodecModel
from lic.model.context import Geometry
from lic.model.dependent import (
    COARSE,
    FRACTIONS,
    LARGE,
    LEAST,
    OFFSETS,
    QUANTISERS,
    SPACING,
    Dependent,
    Forgetful,
    Kinds,
    distance,
)
from lic.pipeline.tile import predicted_integers

LIMIT = 48  # symbols counted, in magnitude
PRIOR = 60.0  # how many observations a Gaussian counts for beside what was observed
MAX_CODED_SCALE = 4.0  # of the rest of a large symbol, in units of 2**raw_bits; as in lic.coder.tables
HALF_WIDTH = 3.6
SMALL = QUANTISERS  # third index of counts: quantisers of latents in chains, and those in none
_SYMBOLS = np.arange(-LIMIT, LIMIT + 1)


class Statistics:
    """Counts (scale, fraction, quantiser or SMALL, symbol), and sums of what offsets should be."""

    def __init__(self) -> None:
        self.counts = np.zeros((len(SCALES), FRACTIONS, QUANTISERS + 1, len(_SYMBOLS)))
        self.sums, self.weights = np.zeros((2, len(SCALES), QUANTISERS, OFFSETS))

    def add(self, y: np.ndarray, symbols: np.ndarray, scale_index: np.ndarray, eighths: np.ndarray) -> None:
        """The latents of a step (N,), in integers from the rounded mean."""
        kinds = Kinds.of(scale_index)
        kind = np.full(len(y), SMALL)
        for at in kinds[1:]:
            kind[at] = dependent.quantisers_of(symbols[at])
        np.add.at(self.counts, (scale_index, eighths, kind, symbols.clip(-LIMIT, LIMIT) + LIMIT), 1)
        quantiser = kind % SMALL
        fraction = (eighths - FRACTIONS // 2) / FRACTIONS
        towards = np.where(symbols == 0, fraction, np.sign(symbols))
        entry = scale_index, quantiser, np.minimum(np.abs(symbols), OFFSETS - 1)
        np.add.at(self.sums, entry, (y - distance(symbols, quantiser)) * towards)
        np.add.at(self.weights, entry, towards**2)


def fit(net: CodecModel, crops: Iterable[tuple[Tensor, Tensor]], iterations: int = 6) -> Dependent:
    """Dependent quantisation for a model with frozen weights, its entropy path exact, from latents of pixels and codes.

    Begins with Gaussians; every iteration chooses with the tables of the one before, all but the last two with a third
    of the crops each. The network has the result as its ``dependent``, and its units count in its integers.
    """
    latents = []
    for x, code in crops:
        y = net.corrected(x, net.analysis(x, code), code)
        latents.append((y, torch.round(net.hyper_analysis(y, code)), code))
    found = _fitted(Statistics())
    for i in range(iterations):
        net.dependent = found
        net.unit_tables = None
        net.unit_tables = net.make_unit_tables()
        statistics = Statistics()
        for y, z, code in latents if i >= iterations - 2 else latents[i % 3 :: 3]:
            _observe(net, y, z, code, statistics)
        found = _fitted(statistics)
    net.dependent = found
    return found


@torch.no_grad()
def _observe(net: CodecModel, y: Tensor, z: Tensor, code: Tensor, statistics: Statistics) -> None:
    assert net.dependent is not None
    geometry, schedule = Geometry(*y.shape[:3]), net.context.schedule
    weight = (net.rounding_weight(code) * SPACING**2)[:, None, None].expand_as(y)
    with exact_arithmetic():
        state = net.context.start(net.h_s(z, code), geometry, code, net.unit(code))
        for step in range(schedule.steps(geometry)):
            predicted = predicted_integers(net.context.predict(state, step))
            part = schedule.take(y, step) / SPACING - predicted.shift
            integers = predicted.shift.float()
            for b, (its_y, its_weight) in enumerate(zip(part, schedule.take(weight, step), strict=True)):
                scale_index, eighths = (
                    t[b].flatten().numpy().astype(np.int64) for t in (predicted.scale_index, predicted.fraction)
                )
                from_mean = its_y.flatten().numpy()
                symbols = net.dependent.choose(from_mean, scale_index, eighths, its_weight.flatten().numpy())
                coded = net.dependent.code(Forgetful(), scale_index, eighths, symbols)
                statistics.add(from_mean, symbols, scale_index, eighths)
                integers[b] += torch.from_numpy(coded.distances).view(its_y.shape)
            state = net.context.observe(state, step, integers)


def _fitted(statistics: Statistics) -> Dependent:
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
    for i, j in np.ndindex(LARGE, FRACTIONS):
        append(_blend(mirrored[i, j, SMALL], SCALES[i] * factors[i, SMALL], (j - 4) / 8, 0), 2 + 2.5 * float(SCALES[i]))
    for i, j, q in np.ndindex(LARGE - LEAST, FRACTIONS, QUANTISERS):
        i += LEAST
        row = _blend(mirrored[i, j, q], SCALES[i] * factors[i, q], (j - 4) / 8, q)
        row[[LIMIT - 1, LIMIT + 1]] += 2.0**-12  # no row of a latent in a chain may be skipped
        append(row / row.sum(), 2 + 2.5 * float(SCALES[i]))
    joint = {}
    fractions = np.arange(FRACTIONS).reshape(COARSE, -1)
    means = ((fractions - 4) / 8).mean(axis=1).tolist()
    for i, c in np.ndindex(len(SCALES) - LARGE, COARSE):
        i += LARGE
        js, mean = fractions[c], means[c]
        for q in range(QUANTISERS):
            joint[i, c, q] = _blend(counts[i, js, q].sum(axis=0), SCALES[i] * factors[i, q], mean, q)
        both = sum(joint[i, c, q] * (1 + counts[i, js, q].sum()) for q in range(QUANTISERS))
        odd = float(both[_SYMBOLS & 1 == 1].sum() / both.sum()) if SCALES[i] < LIMIT / 3 else 0.5
        pmfs.append(np.array([1 - odd, odd]) * (1 - 1e-6))
        offsets.append(0)
        raw_bits.append(0)
    for i, c, q, parity in np.ndindex(len(SCALES) - LARGE, COARSE, QUANTISERS, 2):
        i += LARGE
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
    return Dependent(Tables.from_pmfs(pmfs, offsets, raw_bits), offset.astype(np.float32))


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
