"""Dependent quantisation: which values a latent can have depends on the latents before it.

Trellis-coded quantisation (Marcellin and Fischer 1990, IEEE Trans. Commun. 38(1)) in the form of VVC (Schwarz et al.
2019, "Hybrid video coding with trellis-coded quantization", DCC). Latents are integers on a grid that is finer than the
quantiser's step, but each can only be one of every other integer: quantiser 0 has the even distances from the
predicted mean, quantiser 1 the odd ones and 0. Which of the two a latent has follows from the parities of the symbols
before it in its chain, through a state of the trellis. The encoder looks for the path of least bits + weight·error²
(Viterbi). Where every latent by itself must choose between integers that are far apart, a path can pass near all of
them: smaller errors at the same rate, up to 1.5 dB in theory, more of that the more states there are.

The latents of a step are one chain, but in the first step, which may be cut into pieces with a chain each
(:mod:`lic.model.neighbours`). They are of three kinds, by the scale that is predicted for them:

- small: nearly always 0. They are in no chain and have quantiser 0: their zeros steer no path.
- medium: first in the chain, from small scales to large ones, so that those that are often 0 do not part the others.
  Their tables depend on their quantisers, which only those before them tell.
- large: behind them. Their parity hardly depends on the quantiser: all parities are coded, which settles the
  quantisers, and then the rest of each symbol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lic import coder
from lic.coder import SCALES, Tables
from lic.errors import CorruptError
from lic.model.neighbours import FRACTIONS, Neighbours, Piece

SPACING_LOG2 = -3400  # of the integers' distance in quantiser steps: 9/16, in 4096ths of an octave
SPACING = 2.0 ** (SPACING_LOG2 / 4096)
BLOCK, WINDOW = 4096, 256  # latents that the search goes through at a time, and looks at each way to tie these up
BESIDE = 64  # blocks that numpy searches side by side: it remembers half a kilobyte for each latent of them
COARSE = 4  # of them that tables of large latents tell apart
QUANTISERS = 2
MAX_STATES = 4096
OFFSETS = 4  # magnitudes of symbols that offsets tell apart: 0, 1, 2, more

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class SymbolCoder(Protocol):
    """What codes the symbols of a piece of a step, in this order; values are None for readers."""

    def code_chain(self, rows: Ints, quantiser: Dependent, values: Ints | None) -> Ints:
        """Symbols (N,) of medium latents, with the rows of quantiser 0; those of quantiser 1 are the next ones."""

    def code(self, rows: Ints, tables: Tables, values: Ints | None, *, last: bool) -> Ints:
        """Symbols (N,) of the others."""


class Forgetful:
    """A :class:`SymbolCoder` for who only wants to know what would be coded."""

    def code_chain(self, rows: Ints, quantiser: Dependent, values: Ints | None) -> Ints:
        assert values is not None
        return values

    def code(self, rows: Ints, tables: Tables, values: Ints | None, *, last: bool) -> Ints:
        assert values is not None
        return values


class Kinds(NamedTuple):
    """Places of the latents of each kind in a piece of a step, in the order in which they are coded."""

    small: Ints
    medium: Ints
    large: Ints


@dataclass(frozen=True)
class Chains:
    """Which latents of a piece of a step are in its chain, and which rows of the tables they have.

    least, large: scale indices from which latents are medium and large. share: None, or at most one latent of a piece
    in so many is medium, those of the largest scales, in their order there (weights of before 2026-11-30).
    """

    least: int
    large: int
    share: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.large <= len(SCALES) or self.share == 0:
            raise ValueError("kinds of latents that are none")

    @property
    def medium_row(self) -> int:
        """The first row of medium latents, behind those of small ones."""
        return self.large * FRACTIONS

    @property
    def parity_row(self) -> int:
        return self.medium_row + (self.large - self.least) * FRACTIONS * QUANTISERS

    @property
    def rest_row(self) -> int:
        return self.parity_row + (len(SCALES) - self.large) * COARSE

    @property
    def rows(self) -> int:
        return self.rest_row + (len(SCALES) - self.large) * COARSE * QUANTISERS * 2

    def kinds(self, scale_index: Ints) -> Kinds:
        """Of scale indices (N,)."""
        least = self.least
        if self.share is not None:
            count = np.bincount(scale_index, minlength=len(SCALES))
            while count[least : self.large].sum() > len(scale_index) // self.share:
                least += 1
        is_large, is_small = scale_index >= self.large, scale_index < least
        small, medium, large = (np.flatnonzero(kind) for kind in (is_small, ~is_small & ~is_large, is_large))
        if self.share is None:
            medium = medium[np.argsort(scale_index[medium], kind="stable")]
        return Kinds(small, medium, large)

    def rows_of_medium(self, scale_index: Ints, eighths: Ints) -> Ints:
        """Those of quantiser 0."""
        return self.medium_row + ((scale_index - self.least) * FRACTIONS + eighths) * QUANTISERS

    def rows_of_large(self, scale_index: Ints, eighths: Ints) -> tuple[Ints, Ints]:
        """Those of parities, and those of the rest with quantiser 0 and parity 0."""
        coarse = (scale_index - self.large) * COARSE + eighths * COARSE // FRACTIONS
        return self.parity_row + coarse, self.rest_row + 2 * QUANTISERS * coarse


def trellis_of(h0: int, h1: int) -> Ints:
    """The trellis (states, 2) of a systematic feedback code of rate 1/2 with these parity-check polynomials.

    (Ungerboeck 1982, IEEE Trans. Inf. Theory 28(1).) The parities p and quantisers q of a chain satisfy
    h0·q + h1·p = 0, the lowest bit of a polynomial being the present one; h0 begins and ends with 1, h1 with 0.
    ValueError for other polynomials, and for more than MAX_STATES.
    """
    memory = h0.bit_length() - 1
    if not h0 & 1 or h1 & 1 or h1.bit_length() > memory or not h1:
        raise ValueError("no parity-check polynomials of a trellis")
    if 2**memory > MAX_STATES:
        raise ValueError("a trellis of too many states")
    state, parity = np.arange(2**memory, dtype=np.int64)[:, None], np.arange(2, dtype=np.int64)
    return np.asarray(state >> 1 ^ (h0 >> 1) * (state & 1) ^ (h1 >> 1) * parity)


def polynomials_of(trellis: Ints) -> tuple[int, int]:
    """The inverse of :func:`trellis_of`. ValueError for a trellis of another kind."""
    h0, h1 = 2 * int(trellis[1, 0]) + 1, 2 * int(trellis[0, 1])
    if not np.array_equal(trellis_of(h0, h1), trellis):
        raise ValueError("a trellis without polynomials")
    return h0, h1


FIRST_CHAINS = Chains(8, 17, share=6)  # of weights that do not say


class Coded(NamedTuple):
    """The latents of a piece (N,): distances from their rounded means, and offsets; the bits of writers."""

    distances: Ints
    offsets: Floats
    bits: float


def distance(symbol: Ints, quantiser: Ints | int) -> Ints:
    """From the predicted mean, rounded, to the integer that a symbol of a quantiser stands for."""
    result: Ints = 2 * symbol - np.sign(symbol) * np.asarray(quantiser)
    return result


@dataclass(frozen=True, eq=False)
class Dependent:
    """What dependent quantisation of a model needs besides its networks.

    tables: of small latents, of medium ones, of parities of large ones, of the rest of large ones. offsets:
    (scales, QUANTISERS, OFFSETS), how much farther than its integer, in integers, a latent is expected from the mean;
    for symbol 0 that is a share of the mean's fraction. trellis: (states, 2), the state that follows a state and the
    parity of its symbol; a state has quantiser state & 1, and two ways lead to each. neighbours: what the first step
    learns from them, if the model has any. ValueError if they are not so.
    """

    tables: Tables
    offsets: Floats
    trellis: Ints
    chains: Chains
    neighbours: Neighbours | None = None

    def __post_init__(self) -> None:
        states = len(self.trellis)
        if self.trellis.dtype != np.int64 or not self.trellis.flags.c_contiguous:
            raise ValueError("a trellis of other numbers")
        if self.trellis.shape != (states, 2) or not 2 <= states <= MAX_STATES:
            raise ValueError("no trellis of two ways from each state")
        if not np.array_equal(np.sort(self.trellis, axis=None), np.repeat(np.arange(states), 2)):
            raise ValueError("a trellis that has not two ways to each state")
        if len(self.tables) != self.chains.rows or self.offsets.shape != (len(SCALES), QUANTISERS, OFFSETS):
            raise ValueError("tables of another quantiser")
        medium = slice(self.chains.medium_row, self.chains.parity_row)
        if self.tables.skipped[medium].any() or self.tables.raw_bits[medium].any():
            raise ValueError("a table of chained latents skips symbols or has raw bits")

    def pieces(self, grid: tuple[int, int] | None, mean: Ints, scale_index: Ints, integers: Ints) -> Iterator[Piece]:
        """The latents of a step, all together unless they learn from each other; as :meth:`Neighbours.pieces`.

        ``grid`` is None but for the first step.
        """
        if grid is None or self.neighbours is None:
            yield Piece(slice(None), mean, scale_index, True)
        else:
            yield from self.neighbours.pieces(grid, mean, scale_index, integers)

    def choose(self, y: Floats, scale_index: Ints, eighths: Ints, weight: Floats, threads: int = 1) -> Ints:
        """Symbols of nearly the least bits + weight·error², (N,), or (B, N) of a batch of tiles, which is faster.

        Args:
            y: the latents of a piece of a step, in integers from the rounded mean.
            scale_index: of the prediction of each; eighths: of its mean's fraction plus 4, 0..7.
            weight: bits that a squared error of one integer is worth.
            threads: that search, where the loops are compiled.
        """
        shape, n = scale_index.shape, scale_index.shape[-1]
        by_tile = [self.chains.kinds(its) for its in np.atleast_2d(scale_index)]
        kinds = [np.concatenate([n * b + at for b, at in enumerate(its)]) for its in zip(*by_tile, strict=True)]
        chains = [np.concatenate([n * b + its.medium, n * b + its.large]) for b, its in enumerate(by_tile)]
        y, weight, scale_index, eighths = y.ravel(), weight.ravel(), scale_index.ravel(), eighths.ravel()
        costs = np.empty((2 * QUANTISERS, len(y)), np.float32)
        symbols = np.empty((2 * QUANTISERS, len(y)), np.int64)
        for kind, at in enumerate(kinds):
            for quantiser in range(QUANTISERS if kind else 1):
                both = slice(2 * quantiser, 2 * quantiser + 2)
                costs[both, at], symbols[both, at] = self._best(
                    y[at], scale_index[at], eighths[at], weight[at], quantiser, kind
                )
        result = np.where(costs[0] <= costs[1], symbols[0], symbols[1])
        chained = np.concatenate(chains)
        path = self._least_path(costs[:, chained], [len(chain) for chain in chains], threads)
        result[chained] = np.take_along_axis(symbols[:, chained], path[None], axis=0)[0]
        return result.reshape(shape)

    def quantisers(self, symbols: Ints, state: int = 0) -> tuple[Ints, int]:
        """Of the next symbols (N,) of a chain in this state, and the state behind them; only their parities count."""
        if (compiled := coder.loops()) is not None:
            found, state = compiled.states(symbols, self.trellis, state)
            return found % QUANTISERS, state
        after, states = self.trellis.tolist(), []
        for parity in (symbols & 1).tolist():
            states.append(state)
            state = after[state][parity]
        return np.array(states, np.int64) % QUANTISERS, state

    def symbols_of(self, distances: Ints, scale_index: Ints) -> Ints:
        """Symbols of the latents of a piece (N,); of distances that those before do not allow, those next to them."""
        small, medium, large = self.chains.kinds(scale_index)
        symbols = np.empty_like(distances)
        symbols[small] = distances[small] >> 1
        chain, after, state = np.concatenate([medium, large]), self.trellis.tolist(), 0
        found = []
        for at in distances[chain].tolist():
            quantiser = state % QUANTISERS
            found.append(at + (quantiser if at > 0 else -quantiser if at < 0 else 0) >> 1)
            state = after[state][found[-1] & 1]
        symbols[chain] = found
        return symbols

    def code(
        self, symbols: SymbolCoder, scale_index: Ints, eighths: Ints, given: Ints | None, *, last: bool = True
    ) -> Coded:
        """Code the latents of a piece (N,), the ``last`` one of its step or not.

        ``given`` are their symbols, None for readers. Raises CorruptError.
        """
        kinds = self.chains.kinds(scale_index)
        small, medium, large = kinds
        values, quantisers = np.zeros((2, len(scale_index)), np.int64)
        rows = self.chains.rows_of_medium(scale_index[medium], eighths[medium])
        values[medium] = symbols.code_chain(rows, self, None if given is None else given[medium])
        quantisers[medium], state = self.quantisers(values[medium])
        rows, rest_rows = self.chains.rows_of_large(scale_index[large], eighths[large])
        parities = symbols.code(rows, self.tables, None if given is None else given[large] & 1, last=False)
        if given is None and np.any(parities & ~1):
            raise CorruptError("damaged: a parity is out of range")
        quantisers[large], _ = self.quantisers(parities, state)
        rows = np.concatenate(
            [rest_rows + 2 * quantisers[large] + parities, _small_rows(scale_index[small], eighths[small])]
        )
        rest = None if given is None else np.concatenate([given[large] >> 1, given[small]])
        rest = symbols.code(rows, self.tables, rest, last=last)
        values[large], values[small] = 2 * rest[: len(large)] + parities, rest[len(large) :]
        bits = 0.0
        if given is not None:
            for number, at in enumerate(kinds):
                lengths = self.lengths(values[at], scale_index[at], eighths[at], quantisers[at], number)
                bits += float(lengths.sum(dtype=np.float64))
        return Coded(distance(values, quantisers), self.offset(values, quantisers, scale_index, eighths), bits)

    def _least_path(self, costs: Floats, runs: Sequence[int], threads: int = 1) -> Ints:
        """The branch, 2·quantiser + parity, of each of N latents in chains of these lengths, of nearly the least cost.

        costs: of the branches, (4, N). A chain is searched in blocks side by side. The state between two of them is
        that of the least path through the latents around.
        """
        counts, ends = [-(-run // BLOCK) for run in runs], np.cumsum(runs)
        starts = ends - runs
        begins = np.concatenate([np.arange(*chain, BLOCK) for chain in zip(starts, ends, strict=True)])
        end = np.repeat(ends, counts)  # of the chain of each block
        stops = np.minimum(begins + BLOCK, end)
        inner = stops < end
        borders, free = stops[inner], np.full(np.count_nonzero(inner), -1)
        _, states = self._search(costs, borders - WINDOW, np.minimum(borders + WINDOW, end[inner]), free, free, threads)
        first = np.where(begins == np.repeat(starts, counts), 0, states[begins])
        last = np.full(len(begins), -1)
        last[inner] = states[borders]
        return self._search(costs, begins, stops, first, last, threads)[0]

    def _search(
        self, costs: Floats, begins: Ints, ends: Ints, first: Ints, last: Ints, threads: int = 1
    ) -> tuple[Ints, Ints]:
        """Branches, and states before them, (N,) each, on the paths of least cost through some parts of N latents.

        first, last: states that the paths begin and end in, -1 for any.
        """
        states = len(self.trellis)
        # The two ways into each state: the states before, and the branches.
        before, parity = np.divmod(np.argsort(self.trellis, axis=None, kind="stable").reshape(states, 2).T, 2)
        branch = 2 * (before % QUANTISERS) + parity
        path, passed = np.zeros((2, costs.shape[1]), np.int64)
        if (compiled := coder.loops()) is not None:
            compiled.search(costs, (begins, ends, first, last), before, branch, (path, passed), threads)
            return path, passed
        order = np.argsort(begins - ends, kind="stable")  # the longest first
        for at in np.split(order, range(BESIDE, len(order), BESIDE)):
            part = begins[at], (ends - begins)[at], first[at], last[at]
            self._search_beside(costs, *part, (before, branch), (path, passed))
        return path, passed

    def _search_beside(
        self,
        costs: Floats,
        begins: Ints,
        lengths: Ints,
        first: Ints,
        last: Ints,
        ways: tuple[Ints, Ints],
        result: tuple[Ints, Ints],
    ) -> None:
        """:meth:`_search` of some parts side by side, the longest first, into ``result``. ``ways``: into each state,
        the two states before and the branches, (2, states) each."""
        before, branch = ways
        path, passed = result
        states = len(self.trellis)
        links = [begins[: np.count_nonzero(lengths > i)] + i for i in range(lengths.max(initial=0))]
        total = np.where((first < 0) | (np.arange(states)[:, None] == first), 0, np.inf).astype(np.float32)
        choices = []
        least = np.zeros(len(begins), np.float32)
        for link in links:
            n = len(link)
            its = costs[:, link] - least[:n]  # so that single precision is enough
            one, other = (
                total[:, :n].take(way, axis=0) + its.take(by, axis=0) for way, by in zip(before, branch, strict=True)
            )
            choices.append(_packed(other < one))
            np.minimum(one, other, out=total[:, :n])
            least[:n] = _least(total[:, :n])
        state = np.where(last < 0, total.argmin(axis=0), last) if len(links) else last
        for link, choice in zip(reversed(links), reversed(choices), strict=True):
            n = len(link)
            bit, row = np.divmod(state[:n], len(choice))
            way = choice[row, np.arange(n)].astype(np.int64) >> bit & 1
            path[link] = branch[way, state[:n]]
            passed[link] = state[:n] = before[way, state[:n]]

    def _best(
        self, y: Floats, scale_index: Ints, eighths: Ints, weight: Floats, quantiser: int, kind: int
    ) -> tuple[Floats, Ints]:
        """Costs of the best even and the best odd symbol of a quantiser, and these: (2, N) each."""
        sign, low = np.where(y < 0, -1, 1), np.floor((np.abs(y) + quantiser) / 2).astype(np.int64)

        def cost(symbol: Ints) -> Floats:
            error = (
                y
                - distance(symbol, quantiser).astype(np.float32)
                - self.offset(symbol, quantiser, scale_index, eighths)
            )
            return self.lengths(symbol, scale_index, eighths, quantiser, kind) + weight * error**2

        even, odd, zero = sign * (low + (low & 1)), sign * (low | 1), np.zeros_like(low)
        of_even, of_zero = cost(even), cost(zero)
        best = of_even < of_zero
        return np.stack([np.where(best, of_even, of_zero), cost(odd)]), np.stack([np.where(best, even, zero), odd])

    def lengths(self, symbol: Ints, scale_index: Ints, eighths: Ints, quantiser: Ints | int, kind: int) -> Floats:
        """Bits of symbols of a kind, the index in Kinds, each under its quantiser."""
        if kind == 0:
            return coder.code_lengths(symbol, _small_rows(scale_index, eighths), self.tables)
        if kind == 1:
            return coder.code_lengths(symbol, self.chains.rows_of_medium(scale_index, eighths) + quantiser, self.tables)
        parity_rows, rest_rows = self.chains.rows_of_large(scale_index, eighths)
        parity = symbol & 1
        of_parity = coder.code_lengths(parity, parity_rows, self.tables)
        return of_parity + coder.code_lengths(symbol >> 1, rest_rows + 2 * quantiser + parity, self.tables)

    def offset(self, symbol: Ints, quantiser: Ints | int, scale_index: Ints, eighths: Ints) -> Floats:
        """E[y | symbol] minus its integer, in integers, (N,)."""
        table = self.offsets[scale_index, quantiser, np.minimum(np.abs(symbol), OFFSETS - 1)]
        fraction = (eighths - FRACTIONS // 2).astype(np.float32) / FRACTIONS
        return table * np.where(symbol == 0, fraction, np.sign(symbol)).astype(np.float32)


def _packed(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Flags (states, n) as bits of bytes (⌈states/8⌉, n), that of state s in row s mod ⌈states/8⌉."""
    rows = -(-len(flags) // 8)
    result = np.zeros((rows, flags.shape[1]), np.uint8)
    for bit, first in enumerate(range(0, len(flags), rows)):
        part = flags[first : first + rows].view(np.uint8)
        result[: len(part)] |= part << np.uint8(bit)
    return result


def _least(total: Floats) -> Floats:
    """Of (states, n) over the states: in halves, since numpy goes through n numbers at a time."""
    while len(total) > 64 and len(total) % 2 == 0:
        half = len(total) // 2
        total = np.minimum(total[:half], total[half:])
    return np.asarray(total.min(axis=0))


def _small_rows(scale_index: Ints, eighths: Ints) -> Ints:
    return scale_index * FRACTIONS + eighths
