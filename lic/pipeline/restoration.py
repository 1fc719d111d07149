"""A filter of a picture's own behind the synthesis, and its coefficients in the file (bitstream_spec.md, 6.6).

The synthesis makes the best of all pictures of training. What it could do better for one picture, a little sharper here
or smoother there, or other colours, is mostly a small linear filter: a Wiener filter, found by least squares from the
picture and what is decoded of it, as the adaptive loop filter of VVC (Karczewicz et al. 2021, "VVC in-loop filters",
IEEE Trans. Circuits Syst. Video Technol. 31(10)); with another distortion than squared error, by one Newton step. Each
of three planes of colour has its own. To a sample are added coefficients times its FEATURES: a constant, the sample
itself, another plane's or its own square, what non-local means, shrunken cosine transforms and matched blocks would
change in it, and for each pair of opposite neighbours the sum of their differences from it, as they are and clipped to
a quarter of the quantiser's step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lic import denoising
from lic.container import FILTER, BitReader, BitWriter, Container, Section
from lic.denoising import CHANGES, COLOURS, block_matching, pixels_of, planes_of
from lic.errors import CorruptError
from lic.pipeline.distortion import halved
from lic.quality import lambda_of, step_of

FARTHEST = 3  # neighbour, in pixels
REACH = max(FARTHEST, denoising.REACH, block_matching.REACH)  # a multiple of block_matching.STRIDE
# One of each pair of opposite neighbours, (down, right), the nearest first.
NEIGHBOURS = sorted(
    (
        (i, j)
        for i in range(FARTHEST + 1)
        for j in range(-FARTHEST, FARTHEST + 1)
        if (i, j) > (0, 0) and i + abs(j) <= FARTHEST
    ),
    key=lambda at: (at[0] + abs(at[1]), at),
)
OF_SAMPLES = 3  # features that are no differences
DENOISED = CHANGES + 1  # features that are what a denoised sample would be more, the last one by matched blocks
MATCHED = OF_SAMPLES + CHANGES  # the number of that one
TIMES = 8  # what is denoised, so that its coefficients are about as large as others
FEATURES = OF_SAMPLES + DENOISED + 2 * len(NEIGHBOURS)
CLIPPED = 0.25  # of the quantiser's step
LEAST_SHIFT, SHIFT_BITS, COUNT_BITS, ORDER_BITS = 4, 3, 6, 2
VERSION = 3  # of the format that has such filters; see _read for those before
MAX_PREFIX = 15
BAND = 128  # rows at a time, so that what is between stays in the cache
SECTION_BITS = 8 * 2  # that it adds to the section table, and the table itself
RIDGES = (
    1e-5,
    1e-3,
    1e-2,
    1e-1,
)  # of least squares, from whose coefficients better ones are searched; features are alike
SWEEPS = 6  # over the coefficients
_DAMAGED = "damaged: the filter behind the synthesis cannot be read"


@dataclass(frozen=True)
class Coefficients:
    """Of the filter of one plane: the first ones of the features', in units of 2**-shift; the others are 0."""

    shift: int
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.shift - LEAST_SHIFT < 2**SHIFT_BITS or len(self.values) > FEATURES:
            raise ValueError("no coefficients of a filter")


@dataclass(frozen=True)
class Restoration:
    """The filters of a picture: of its three planes, or of the one of a gray picture."""

    planes: tuple[Coefficients, ...]

    def section(self) -> Section:
        """As it stands in the file."""
        out = BitWriter()
        for plane in self.planes:
            _write(out, plane)
        out.align()
        return Section(FILTER, bytes(out.data))

    @property
    def bits(self) -> int:
        """What it adds to the file."""
        return 8 * len(self.section().data) + SECTION_BITS

    @classmethod
    def of(cls, container: Container) -> Restoration | None:
        """That of a file. Raises CorruptError if it is damaged."""
        for section in container.sections:
            if section.kind == FILTER:
                reader, version = BitReader(section.data), container.header.version
                try:
                    found = cls(tuple(_read(reader, version) for _ in range(1 if container.header.gray else 3)))
                    reader.align()
                except (CorruptError, ValueError) as error:
                    raise CorruptError(_DAMAGED) from error
                if reader.offset != len(section.data):
                    raise CorruptError(_DAMAGED)
                return found
        return None

    def applied(self, pixels: Tensor, code: float) -> Tensor:
        """Filtered pixels (H, W, C), 0..255, of decoded ones with REACH more at each side, for a quality code."""
        step = step_of(code)
        with_changes = any(any(plane.values[OF_SAMPLES:MATCHED]) for plane in self.planes)
        with_matched = any(len(plane.values) > MATCHED and plane.values[MATCHED] for plane in self.planes)
        bands = []
        for band in _bands(pixels):
            planes = planes_of(band)
            denoised = _denoised(planes, step, with_changes=with_changes, with_matched=with_matched)
            filtered = []
            for index, plane in enumerate(self.planes):
                total = _inner(planes[index], 0, 0).clone()
                weights = [value * 2.0**-plane.shift for value in plane.values]
                for weight, feature in zip(weights, _features(planes, index, denoised, step), strict=False):
                    if weight:
                        total.add_(feature, alpha=weight)
                filtered.append(total)
            bands.append(pixels_of(filtered))
        return torch.cat(bands).clamp_(0, 255)


class Statistics:
    """What the best filter of a picture follows from: how an error changes with what each feature adds."""

    def __init__(self, channels: int) -> None:
        self._products = np.zeros((channels, FEATURES, FEATURES))
        self._wanted = np.zeros((channels, FEATURES))
        self._pixels = 0

    def add(self, decoded: Tensor, code: float, slope: Tensor, worths: Sequence[Tensor]) -> None:
        """Decoded pixels (H + 2·REACH, W + 2·REACH, C), 0..255, and how the error changes with what is added to them.

        ``slope`` (H, W, C) and ``worths``, of the pixels without those around, are what
        :meth:`lic.pipeline.distortion.Distortion.expansion` says.
        """
        step = step_of(code)
        self._pixels += slope.shape[0] * slope.shape[1]
        bands = (_bands_of(worth, BAND >> scale, len(slope)) for scale, worth in enumerate(worths))
        for band, its_slope, *its_worths in zip(_bands(decoded), slope.split(BAND), *bands, strict=True):
            planes = planes_of(band)
            denoised = _denoised(planes, step)
            for index, colour in enumerate(COLOURS[: len(planes)]):
                mixed = its_slope.new_tensor(colour[: slope.shape[2]])
                features = torch.stack(list(_features(planes, index, denoised, step)))
                wanted = features.flatten(1) @ (its_slope @ mixed).flatten() / -2
                self._wanted[index] += wanted.double().cpu().numpy()
                for scale, worth in enumerate(its_worths):
                    features = halved(features) if scale else features
                    weighted = features * (worth @ mixed.square())
                    products = weighted.flatten(1) @ features.flatten(1).T
                    self._products[index] += products.double().cpu().numpy()

    def best(self, code: float, pixels: int) -> Restoration | None:
        """The filter of least bits + λ·error, for a picture of so many pixels; None if none is worth its bits.

        What was added may have been a part of the picture.
        """
        times = lambda_of(code) * pixels / max(1, self._pixels)
        each = zip(self._products, self._wanted, strict=True)
        found = [_best(times * products, times * wanted) for products, wanted in each]
        if sum(gain for _, gain in found) <= SECTION_BITS:
            return None
        return Restoration(tuple(plane for plane, _ in found))


def _best(products: np.ndarray, wanted: np.ndarray) -> tuple[Coefficients, float]:
    """Coefficients of a plane for the least bits + λ·error, and by how much that is less than without."""
    size = np.sqrt(np.diag(products)) + 1e-9
    best, most = Coefficients(LEAST_SHIFT, ()), 0.0
    for ridge in RIDGES:
        soft = np.linalg.solve(products / size / size[:, None] + ridge * np.eye(FEATURES), wanted / size) / size
        tried = []
        for shift in range(LEAST_SHIFT, LEAST_SHIFT + 2**SHIFT_BITS):
            values = np.rint(soft * 2.0**shift)
            tried.append((_cost(values, shift, products, wanted), shift, values))
        _, shift, values = min(tried, key=lambda one: one[0])
        values = _descended(values, shift, products, wanted)
        gain = -_cost(values, shift, products, wanted)
        if gain > most:
            last = int(np.flatnonzero(values).max(initial=-1))
            best, most = Coefficients(shift, tuple(int(v) for v in values[: last + 1])), gain
    return best, most


def _cost(values: np.ndarray, shift: int, products: np.ndarray, wanted: np.ndarray) -> float:
    """Bits + change of the error."""
    weights = values * 2.0**-shift
    last = int(np.flatnonzero(values).max(initial=-1))
    bits = min(_lengths(values[: last + 1], order).sum() for order in range(2**ORDER_BITS))
    return float(bits + weights @ products @ weights - 2 * wanted @ weights)


def _descended(values: np.ndarray, shift: int, products: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Better values, found by changing one after another."""
    unit, values = 2.0**-shift, values.copy()
    for _ in range(SWEEPS):
        before = values.copy()
        order = min(range(2**ORDER_BITS), key=lambda k: float(_lengths(values, k).sum()))
        slope = unit * (unit * products @ values - wanted)
        for at in range(FEATURES):
            curvature = unit**2 * products[at, at]
            least = values[at] - slope[at] / max(curvature, 1e-12)
            tried = np.array([values[at], 0, math.floor(least), math.ceil(least), np.trunc(least / 2)])
            tried = tried.clip(-(2.0**MAX_PREFIX), 2.0**MAX_PREFIX)
            change = tried - values[at]
            costs = _lengths(tried, order) + 2 * slope[at] * change + curvature * change**2
            chosen = change[int(costs.argmin())]
            values[at] += chosen
            slope += unit**2 * products[:, at] * chosen
        if np.array_equal(values, before):
            break
    return values


def _lengths(values: np.ndarray, order: int) -> np.ndarray:
    """Bits of coefficients: of 0 one, of others a sign and an exponential Golomb code besides."""
    size = np.maximum(np.abs(values) - 1, 0) + 2**order
    return np.where(values == 0, 1, 2 + 2 * np.floor(np.log2(size)) + 1 - order)


def _write(out: BitWriter, plane: Coefficients) -> None:
    out.write(len(plane.values), COUNT_BITS)
    if not plane.values:
        return
    values = np.array(plane.values)
    order = min(range(2**ORDER_BITS), key=lambda k: float(_lengths(values, k).sum()))
    out.write(plane.shift - LEAST_SHIFT, SHIFT_BITS)
    out.write(order, ORDER_BITS)
    for value in plane.values:
        out.write(value != 0, 1)
        if value:
            out.write(value < 0, 1)
            size = abs(value) - 1 + 2**order
            out.write(0, size.bit_length() - 1 - order)
            out.write(size, size.bit_length())


def _read(reader: BitReader, version: int) -> Coefficients:
    """Raises CorruptError or ValueError.

    Version 2 has no matched blocks, version 1 no features DENOISED at all, and COUNT_BITS less one.
    """
    of_version = {1: 0, 2: CHANGES}.get(version, DENOISED)
    plane = _read_coefficients(reader, COUNT_BITS - (version == 1))
    missing, at = DENOISED - of_version, OF_SAMPLES + of_version
    if len(plane.values) > FEATURES - missing:
        raise ValueError("too many coefficients")
    if len(plane.values) <= at:
        return plane
    return Coefficients(plane.shift, (*plane.values[:at], *[0] * missing, *plane.values[at:]))


def _read_coefficients(reader: BitReader, count_bits: int) -> Coefficients:
    """As :func:`_read`, those that are there."""
    count = reader.read(count_bits)
    if not count:
        return Coefficients(LEAST_SHIFT, ())
    shift, order = reader.read(SHIFT_BITS) + LEAST_SHIFT, reader.read(ORDER_BITS)
    values = []
    for _ in range(count):
        value = 0
        if reader.read(1):
            negative, more = reader.read(1), 0
            while not reader.read(1):
                more += 1
                if more > MAX_PREFIX:
                    raise ValueError("a coefficient is out of range")
            value = (1 << more + order | reader.read(more + order)) - 2**order + 1
            value = -value if negative else value
        values.append(value)
    return Coefficients(shift, tuple(values))


def _bands(pixels: Tensor) -> Iterator[Tensor]:
    """Rows (BAND + 2·REACH or fewer, W, C) of pixels that have REACH more at each side."""
    for top in range(0, len(pixels) - 2 * REACH, BAND):
        yield pixels[top : top + BAND + 2 * REACH]


def _bands_of(worth: Tensor, rows: int, height: int) -> Sequence[Tensor]:
    """Those of a worth that belong to :func:`_bands`: one that is the same everywhere belongs to all of them."""
    return [worth] * -(-height // BAND) if worth.shape[:2] == (1, 1) else worth.split(rows)


def _inner(plane: Tensor, down: int, right: int) -> Tensor:
    """What is so far from each sample, which are those at least REACH from the borders."""
    height, width = (side - 2 * REACH for side in plane.shape)
    return plane[REACH + down : REACH + down + height, REACH + right : REACH + right + width]


def _denoised(planes: Sequence[Tensor], step: float, *, with_changes: bool = True, with_matched: bool = True) -> Tensor:
    """The features of all planes that take long: (DENOISED, K, H, W), of planes with REACH more at each side.

    Those that nobody asks for are 0.
    """
    stacked = torch.stack(list(planes))
    found = stacked.new_zeros(DENOISED, len(stacked), *(size - 2 * REACH for size in stacked.shape[1:]))
    if with_changes:
        inner = slice(REACH - denoising.REACH, denoising.REACH - REACH or None)
        torch.mul(denoising.changes(stacked[:, inner, inner], step), TIMES, out=found[:CHANGES])
    if with_matched:
        torch.mul(block_matching.matched(stacked, step), TIMES, out=found[CHANGES])
    return found


def _features(planes: Sequence[Tensor], index: int, denoised: Tensor, step: float) -> Iterator[Tensor]:
    """The FEATURES of a plane, (H, W) each, of planes with REACH more at each side; denoised: :func:`_denoised`."""
    here, luma, clipped = _inner(planes[index], 0, 0), _inner(planes[0], 0, 0), CLIPPED * step
    yield torch.ones_like(here)
    yield here / 8
    yield luma / 8 if index else here.square() / 512
    yield from denoised[:, index]
    for down, right in NEIGHBOURS:
        one, other = (_inner(planes[index], sign * down, sign * right) - here for sign in (1, -1))
        yield one + other
        yield one.clamp(-clipped, clipped).add_(other.clamp(-clipped, clipped))
