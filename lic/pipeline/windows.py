"""Running the transforms over windows of a large image, so that memory stays bounded and no seam appears.

A window carries a halo at least as wide as the network's receptive field; the result does not depend on how the
image is cut, except for the order of floating-point sums. Where there are non-local modules, windows and halos begin
and end at multiples of their blocks or at the border of the image, so that no block is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lic.model.codec import FOR_SQUARED_ERROR, CodecModel, Corrections
from lic.model.config import DOWNSAMPLING
from lic.model.context import Geometry
from lic.model.non_local import BLOCK
from lic.model.transforms import LappedShortcut
from lic.pipeline.distortion import Distortion
from lic.pipeline.restoration import REACH, Restoration, Statistics
from lic.quality import lambda_of

WINDOW = 64  # side of a window in latent positions: 1024 pixels; a multiple of BLOCK
HALO = 10  # in latent positions, 160 pixels; the synthesis of `base` reaches 88, its refinement 44, the filter 28
LOOKED_AT = 4  # windows of a large picture from which its filter is found


class Samples(NamedTuple):
    """What a picture's samples are: one channel or three, of 8 or 16 bits."""

    gray: bool = False
    bits: int = 8


class Area(NamedTuple):
    """A rectangle of the latent grid; ``bottom`` and ``right`` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    def grown(self, by: int, grid: Geometry) -> Area:
        """With so many more positions at each side, as far as the grid goes."""
        return Area(
            max(0, self.top - by),
            max(0, self.left - by),
            min(grid.height, self.bottom + by),
            min(grid.width, self.right + by),
        )

    def overlap(self, other: Area) -> Area | None:
        """What the two have in common."""
        common = Area(*map(max, self[:2], other[:2]), *map(min, self[2:], other[2:]))
        return common if common.top < common.bottom and common.left < common.right else None

    def of(self, y: Tensor, origin: Area) -> Tensor:
        """This area of latents (B, h, w, M) that begin where ``origin`` begins; a view."""
        rows = slice(self.top - origin.top, self.bottom - origin.top)
        return y[:, rows, self.left - origin.left : self.right - origin.left]


def halo_of(net: CodecModel) -> int:
    """How many latents around a window go with it, at each side."""
    return BLOCK if net.config.non_local_heads else HALO


def input_of(net: CodecModel, area: Area, grid: Geometry) -> Area:
    """The latents that the windows over ``area`` are given."""
    top, left = (start // WINDOW * WINDOW for start in area[:2])
    bottom, right = (-(-end // WINDOW) * WINDOW for end in area[2:])
    return Area(top, left, min(bottom, grid.height), min(right, grid.width)).grown(halo_of(net), grid)


def _windows(
    net: CodecModel, size: int, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, start with halo, end with halo) along one axis, in latent positions.

    Only windows over first..last - 1, their start and end cut to that.
    """
    last = size if last is None else last
    halo = halo_of(net)
    for start in range(first // WINDOW * WINDOW, last, WINDOW):
        end = min(start + WINDOW, size)
        yield max(start, first), min(end, last), max(0, start - halo), min(size, end + halo)


def analysis(
    net: CodecModel,
    pictures: Sequence[np.ndarray],
    grid: Geometry,
    code: Tensor,
    worth: Tensor | None = None,
    corrections: Corrections = FOR_SQUARED_ERROR,
) -> Tensor:
    """:meth:`CodecModel.latents_to_quantise` over windows: (B, h, w, M).

    ``pictures``: B, each uint8 or uint16, (H, W, 3), or (H, W, 1), which the network sees as three equal channels,
    and no larger than ``grid``, to which their edges are continued; ``code``: their quality codes, (B,); ``worth``:
    that of their :func:`rounding_worth`. Each window has an MS-SSIM of its own.
    """
    y = _latents(net, pictures, grid, code, lambda x, _: net.analysis(x, code))
    whole = Area(0, 0, grid.height, grid.width)

    def corrected(y: Tensor, once: Corrections, x: Tensor, window: Area) -> Tensor:
        return net.corrected(x, window.of(y, whole), code, None if worth is None else window.of(worth, whole), once)

    for share in corrections.shares:  # the next one needs what this one makes of the surroundings of a window
        y = _latents(net, pictures, grid, code, partial(corrected, y, corrections._replace(shares=(share,))))
    return y


def _latents(
    net: CodecModel,
    pictures: Sequence[np.ndarray],
    grid: Geometry,
    code: Tensor,
    of: Callable[[Tensor, Area], Tensor],
) -> Tensor:
    """(B, h, w, M), put together of what ``of`` makes of the pixels of each window, which is its second argument."""
    y = torch.empty(len(pictures), grid.height, grid.width, net.config.latent, device=code.device)
    for top, bottom, above, below in _windows(net, grid.height):
        for left, right, before, after in _windows(net, grid.width):
            window, inside = Area(above, before, below, after), Area(top, left, bottom, right)
            part = of(torch.stack([_pixels(picture, window, code.device) for picture in pictures]), window)
            y[:, top:bottom, left:right] = inside.of(part, window)
    return y


def _pixels(picture: np.ndarray, window: Area, device: torch.device) -> Tensor:
    """A window as the network sees it: (16·h, 16·w, 3) in [-0.5, 0.5], the picture's edges continued."""
    n = DOWNSAMPLING
    height, width, _ = picture.shape
    rows = np.arange(window.top * n, window.bottom * n).clip(max=height - 1)
    columns = np.arange(window.left * n, window.right * n).clip(max=width - 1)
    pixels = torch.from_numpy(picture[rows[:, None], columns]).to(device)
    return pixels.float().expand(-1, -1, 3) / np.iinfo(picture.dtype).max - 0.5


def synthesis(
    net: CodecModel,
    y: Tensor,
    code: Tensor,
    samples: Sequence[Samples],
    *,
    restorations: Sequence[Restoration | None] | None = None,
    grid: Geometry | None = None,
    area: Area | None = None,
) -> list[Tensor]:
    """Decoded pixels over windows: latents (B, h, w, M) -> each picture, (16·h, 16·w, 3), or (16·h, 16·w, 1) if gray.

    ``code``: quality codes, (B,). ``samples``: what each picture is to be, uint8 or uint16; the one channel of gray is
    the mean of the network's three. ``restorations``: the filter behind g_s of each that has one. With ``area`` of the
    pictures' ``grid`` only the pixels of this area, from its :func:`input_of`, in the windows that the whole pictures
    have there. They depend on no latent that is more than the halo away from them.
    """
    grid = grid or Geometry(1, y.shape[1], y.shape[2])
    area = area or Area(0, 0, grid.height, grid.width)
    restorations = restorations or [None] * len(y)
    origin = input_of(net, area, grid)
    n = DOWNSAMPLING
    height, width = area.bottom - area.top, area.right - area.left
    pictures = [
        torch.empty(
            height * n,
            width * n,
            1 if gray else 3,
            dtype=torch.uint8 if bits == 8 else torch.uint16,
            device=y.device,
        )
        for gray, bits in samples
    ]

    def within(pixels: Tensor, axis: int, start: int, first: int, last: int) -> Tensor:
        return pixels.narrow(axis, (first - start) * n, (last - first) * n)

    for top, bottom, above, below in _windows(net, grid.height, area.top, area.bottom):
        for left, right, before, after in _windows(net, grid.width, area.left, area.right):
            window, box = Area(above, before, below, after), Area(top, left, bottom, right)
            parts = net.decoded(window.of(y, origin), code)
            each = zip(pictures, parts, samples, restorations, code.tolist(), strict=True)
            for picture, part, (gray, bits), restoration, its_code in each:
                white = 2**bits - 1
                if restoration is None:
                    inside = within(within(part, 0, above, top, bottom), 1, before, left, right)
                    pixels = ((inside.mean(-1, keepdim=True) if gray else inside) + 0.5) * white
                else:
                    around = _with_surroundings(part, window, box, gray=gray)
                    pixels = restoration.applied(around, its_code) * (white / 255)
                pixels = pixels.round().clamp(0, white).to(picture.dtype)
                within(within(picture, 0, area.top, top, bottom), 1, area.left, left, right).copy_(pixels)
    return pictures


def restorations(
    net: CodecModel, y: Tensor, code: Tensor, pictures: Sequence[np.ndarray], distortion: Distortion
) -> list[Restoration | None]:
    """The filter behind g_s that is worth its bits, of each of B pictures, for dequantised latents (B, h, w, M).

    It is that of the least distortion as far as that is a quadratic function of what is added to the pixels; if it is
    not, the filter must really lower it by its bits, where it is looked at. Of a large picture LOOKED_AT windows and a
    few more are.
    """
    all_windows = [(*rows, *columns) for rows in _windows(net, y.shape[1]) for columns in _windows(net, y.shape[2])]
    stride = max(1, len(all_windows) // LOOKED_AT)
    statistics = [Statistics(picture.shape[2]) for picture in pictures]
    looked_at: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pictures]
    for top, bottom, above, below, left, right, before, after in all_windows[::stride]:
        window, box = Area(above, before, below, after), Area(top, left, bottom, right)
        parts = net.decoded(y[:, above:below, before:after], code)
        for i, (part, picture, its_code) in enumerate(zip(parts, pictures, code.tolist(), strict=True)):
            seen = _samples(picture, top, bottom, left, right, y.device)
            if seen.numel() == 0:
                continue
            around = _with_surroundings(part, window, box, gray=picture.shape[2] == 1)
            around = around[: seen.shape[0] + 2 * REACH, : seen.shape[1] + 2 * REACH]
            inner = around[REACH:-REACH, REACH:-REACH]
            statistics[i].add(around, its_code, *distortion.expansion(inner, seen))
            if not distortion.is_squared_error:
                looked_at[i].append((around, seen))
    found = [
        its.best(its_code, picture.size // picture.shape[2])
        for its, its_code, picture in zip(statistics, code.tolist(), pictures, strict=True)
    ]
    if distortion.is_squared_error:
        return found
    each = zip(found, looked_at, code.tolist(), strict=True)
    return [its if its and _lowers(its, parts, its_code, distortion) else None for its, parts, its_code in each]


def _lowers(
    restoration: Restoration, decoded_and_seen: Sequence[tuple[Tensor, Tensor]], code: float, distortion: Distortion
) -> bool:
    """Whether a filter lowers a distortion of these parts by more than its bits."""
    gain = 0.0
    for decoded, seen in decoded_and_seen:
        inner = decoded[REACH:-REACH, REACH:-REACH]
        gain += float(distortion.error(inner, seen) - distortion.error(restoration.applied(decoded, code), seen))
    return lambda_of(code) * gain > restoration.bits


def _with_surroundings(part: Tensor, window: Area, box: Area, *, gray: bool) -> Tensor:
    """Pixels of a box in a window, and REACH more at each side: those of the border beyond the border of the picture.

    part: what g_s makes of the window, (16·h, 16·w, 3); the result is in 0..255, one channel if it is gray.
    """
    n = DOWNSAMPLING
    sides = (box.top - window.top, box.bottom - window.top), (box.left - window.left, box.right - window.left)
    rows, columns = (
        torch.arange(start * n - REACH, end * n + REACH, device=part.device).clamp(0, size - 1)
        for (start, end), size in zip(sides, part.shape[:2], strict=True)
    )
    part = part.mean(-1, keepdim=True) if gray else part
    return ((part[rows][:, columns] + 0.5) * 255).clamp(0, 255)


def error(
    net: CodecModel, y: Tensor, code: Tensor, pixels: np.ndarray, distortion: Distortion, *, with_slope: bool
) -> tuple[float, Tensor | None]:
    """What g_s makes of latents y (1, h, w, M) against pixels (H, W, 3), or gray (H, W, 1), uint8 or uint16.

    The sum of the windows' errors and its derivative to y, (1, h, w, M). What lies outside the range of samples costs
    nothing.
    """
    n = DOWNSAMPLING
    total, slope = 0.0, torch.zeros_like(y)
    for top, bottom, above, below in _windows(net, y.shape[1]):
        for left, right, before, after in _windows(net, y.shape[2]):
            seen = _samples(pixels, top, bottom, left, right, y.device)
            if seen.numel() == 0:
                continue
            part = y[:, above:below, before:after].clone().requires_grad_(with_slope)
            with torch.set_grad_enabled(with_slope):
                x = net.synthesis(part, code)[0, (top - above) * n :, (left - before) * n :]
                x = x[: seen.shape[0], : seen.shape[1]]
                if pixels.shape[2] == 1:
                    x = x.mean(-1, keepdim=True)
                part_error = distortion.error(255 * (x + 0.5).clamp(0, 1), seen)
            total += float(part_error.detach())
            if with_slope:
                slope[:, above:below, before:after] += torch.autograd.grad(part_error, part)[0]
    return total, slope if with_slope else None


def error_between(net: CodecModel, shown: np.ndarray, pixels: np.ndarray, distortion: Distortion) -> float:
    """As :func:`error`, of two arrays of one shape and type."""
    grid = [-(-side // DOWNSAMPLING) for side in pixels.shape[:2]]
    device, total = net.sigma.device, 0.0
    for top, bottom, _, _ in _windows(net, grid[0]):
        for left, right, _, _ in _windows(net, grid[1]):
            parts = (_samples(array, top, bottom, left, right, device) for array in (shown, pixels))
            total += float(distortion.error(*parts))
    return total


def _samples(pixels: np.ndarray, top: int, bottom: int, left: int, right: int, device: torch.device) -> Tensor:
    """A window, without halo, in 0..255, as far as there are pixels: (H, W, C)."""
    n = DOWNSAMPLING
    part = pixels[top * n : bottom * n, left * n : right * n].astype(np.float32)
    return torch.from_numpy(part * np.float32(255 / np.iinfo(pixels.dtype).max)).to(device)


def weight(net: CodecModel, pixels: np.ndarray, grid: Geometry, code: Tensor, distortion: Distortion) -> Tensor:
    """Error, times λ, that a squared error of one quantiser step is about worth: (1, h, w, M), for code (1,)."""
    return _times(net, [pixels], grid, code, distortion.weight) * net.distortion_weight(code)[:, None, None]


def rounding_worth(
    net: CodecModel, pictures: Sequence[np.ndarray], grid: Geometry, code: Tensor, distortion: Distortion
) -> Tensor:
    """How many times its :meth:`CodecModel.rounding_weight` each latent of B pictures has: (B, h, w, M)."""
    return _times(net, pictures, grid, code, distortion.weight)


def _times(
    net: CodecModel,
    pictures: Sequence[np.ndarray],
    grid: Geometry,
    code: Tensor,
    of: Callable[[LappedShortcut, Tensor], Tensor],
) -> Tensor:
    """A weight of Distortion over windows: (B, h, w, M)."""

    def times(x: Tensor, window: Area) -> Tensor:
        shape = (window.bottom - window.top, window.right - window.left, net.config.latent)
        return of(net.shortcut, 255 * (x + 0.5)).expand(len(pictures), *shape)

    return _latents(net, pictures, grid, code, times)
