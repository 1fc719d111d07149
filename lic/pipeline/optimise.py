"""Encoder-side optimisation: integers for one picture that cost fewer bits for the same distortion.

The decoder and the format do not change. L = bits + λ·error is lowered in place of what one pass of g_a gives,
as do latent overfitting (Zhang et al. 2022, arXiv 2210.04112, LOF), online RDO of Efficient Contextformer (Koyuncu et
al. 2024, arXiv 2306.14287) and SGA (Yang et al. 2020, arXiv 2006.04240). The way is our own. In quantiser steps, the
second derivative of the error is nearly diagonal and known (:func:`windows.weight`), because the
synthesis is a linear lapped transform plus a correction. So one gradient through g_s tells where each latent would
lie if it were not rounded, and rounding that for rate is one step of a proximal gradient method: it takes a few
passes where stochastic descent takes hundreds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lic.model.codec import CodecModel, expected_offset, gaussian_bits, lambda_of, round_for_rate
from lic.model.context import Geometry, Prediction
from lic.model.hyperprior import Z_LIMIT
from lic.pipeline import windows
from lic.pipeline.distortion import Distortion
from lic.pipeline.tile import quantised_in_steps

STEP = 0.7  # share of the way towards the target that the first pass goes; falls linearly to nothing
WORSE = 1.02  # a pass with so many times the least cost found is taken back, and steps become smaller
Z_SHARE = 0.005  # of the hyper-latents that are changed at first in one pass


@dataclass(frozen=True)
class Effort:
    """Passes over the picture, and whether they see what a latent does to the tables of others, and change z."""

    passes: int
    with_context: bool


EFFORTS = (
    Effort(0, False),
    Effort(1, False),
    Effort(2, False),
    Effort(4, False),
    Effort(4, True),
    Effort(6, True),
    Effort(8, True),
    Effort(11, True),
    Effort(16, True),
    Effort(24, True),
)

Box = tuple[Geometry, slice, slice]  # of a tile: see pipeline.codec.latent_boxes


@dataclass
class _Rate:
    """Of one tile: its predictions (1, h, w, M), bits in all and under each hyper-latent position (1, h/4, w/4)."""

    p: Prediction
    bits: float
    bits_map: Tensor


@dataclass
class _Linearised:
    """What a pass knows around its integers: latents (1, h, w, M), and z (1, h/4, w/4, C) of the next pass."""

    target: Tensor
    dequantised: Tensor
    gradient: Tensor
    p: Prediction
    z_next: Tensor


def optimise(
    net: CodecModel,
    pixels: np.ndarray,
    code: Tensor,
    boxes: Sequence[Box],
    y: Tensor,
    rounding_weight: Tensor,
    start: tuple[Tensor, Tensor, Tensor],
    start_bits: float,
    effort: Effort,
    distortion: Distortion,
    *,
    is_over: Callable[[float], bool],
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Latents y (1, h, w, M) to quantise, and integers z (1, h/4, w/4, C).

    Quantised with their weight, as in :func:`lic.pipeline.tile.code_tiles`, they have the least bits + λ·error found.
    The bits are those of the network in floating point, whose gradients take half the time; with dependent quantisation
    those of its tables.

    Args:
        net: the model, exact.
        pixels: uint8 or uint16, (H, W, 3), or gray (H, W, 1).
        code: quality code, (1,).
        boxes: of the tiles, which are coded independently.
        y: latents as the analysis gives them; rounding_weight: that of each one's error, as in :class:`Latents`.
        start: integers y and z that one pass gives, and the dequantised latents. start_bits: of these.
        effort: how long to search.
        distortion: what error is.
        is_over: is told the seconds that a pass took, and says whether there is no time for another one.
        progress: is told how many passes are done, effort.passes + 1 in the end.
    """
    weight = windows.weight(net, pixels, Geometry(1, *y.shape[1:3]), code, distortion)
    lagrangian = float(lambda_of(code)[0])
    target, (y_hat, z, dequantised) = y, start
    dequantised, known_bits = dequantised.clone(), start_bits
    best_cost, best, damping = math.inf, (target, z), distortion.damping
    searches = [_HyperSearch(net, code) for _ in boxes]
    for number in range(effort.passes + 1):
        began = time.monotonic()
        last = number == effort.passes
        with_context = effort.with_context and not last
        slope = torch.zeros_like(y)
        eighths, scale_index, z_next = torch.empty_like(y), torch.empty_like(y), z.clone()
        bits = 0.0
        for (_, rows, columns), search in zip(boxes, searches, strict=True):
            if net.dependent is not None and not with_context:
                continue
            at, at_z = (slice(None), rows, columns), (slice(None), quarter(rows), quarter(columns))
            rate, to_y, to_z = _rate(net, y_hat[at], z[at_z], code, with_context)
            bits += rate.bits
            if net.dependent is None:
                offset = expected_offset(y_hat[at], rate.p.mean, rate.p.scale, net.centroids)
                dequantised[at] = y_hat[at] + offset
            if to_y is not None:
                slope[at] = distortion.context_weight / net.spacing * to_y
            if to_z is not None and number % 2 == 0:
                z_next[at_z], rate = search.step(y_hat[at], z[at_z], to_z, rate)
            eighths[at], scale_index[at] = rate.p
        if net.dependent is not None:  # not the Gaussians' bits: those of the quantiser's tables
            bits = known_bits
        error, error_slope = windows.error(net, dequantised, code, pixels, distortion, with_slope=not last)
        cost = bits + lagrangian * error
        if cost < best_cost:
            best_cost, best = cost, (target, z)
        progress(number + 1)
        if error_slope is None or is_over(time.monotonic() - began):
            break
        if cost <= WORSE * best_cost:
            gradient = lagrangian * error_slope + slope
            here = _Linearised(target, dequantised, gradient, Prediction(eighths, scale_index), z_next)
        else:
            damping *= 2
        where = here.dequantised - here.gradient / (2 * damping * weight)
        target = here.target + STEP * (1 - number / (effort.passes + 1)) * (where - here.target)
        y_hat, dequantised, z, known_bits = torch.empty_like(y), torch.empty_like(y), here.z_next, 0.0
        for geometry, rows, columns in boxes:
            at, at_z = (slice(None), rows, columns), (slice(None), quarter(rows), quarter(columns))
            if net.dependent is None:  # each latent by itself: with the tables of before, for most integers stay
                p = Prediction(*(t[at] for t in here.p))
                y_hat[at] = round_for_rate(target[at], p.mean, p.scale, rounding_weight[at], net.centroids)
                continue
            # One path of many: all integers may change, and with them the tables of those that follow.
            found = quantised_in_steps(net, geometry, z[at_z], code, target[at], rounding_weight[at])
            y_hat[at], dequantised[at] = found.y, found.dequantised
            known_bits += float(found.bits.sum()) + float(net.prior.bits(z[at_z], code).sum())
    return best


class _HyperSearch:
    """Changes hyper-latents of one tile by one, where their gradient is largest, and keeps what pays (as LOF does).

    What a hyper-latent changes lies nearly all within its neighbours: changes are judged there, and then together.
    """

    def __init__(self, net: CodecModel, code: Tensor) -> None:
        self._net, self._code = net, code
        self._share = Z_SHARE
        self._trust: Tensor | None = None  # halved wherever a change was taken back

    def step(self, y_hat: Tensor, z: Tensor, gradient: Tensor, rate: _Rate) -> tuple[Tensor, _Rate]:
        """z after this step, and the rate with it."""
        trust = torch.ones_like(z) if self._trust is None else self._trust
        score = (gradient.abs() * trust).flatten()
        chosen = torch.zeros_like(score)
        chosen[score.topk(max(1, round(self._share * len(score)))).indices] = 1
        change = (z - gradient.sign() * chosen.view_as(z)).clamp(-Z_LIMIT, Z_LIMIT) - z
        tried = _rate(self._net, y_hat, z + change, self._code, False)[0]
        around = F.avg_pool2d((tried.bits_map - rate.bits_map).unsqueeze(1), 3, 1, 1, divisor_override=1)
        pays = (around.squeeze(1) < 0).unsqueeze(-1)
        self._trust = torch.where((change != 0) & ~pays, trust / 2, trust)
        kept = _rate(self._net, y_hat, z + change * pays, self._code, False)[0]
        if kept.bits < rate.bits:
            self._share *= 1.2
            return z + change * pays, kept
        self._share /= 2
        return z, rate


def _rate(
    net: CodecModel, y_hat: Tensor, z: Tensor, code: Tensor, with_gradient: bool
) -> tuple[_Rate, Tensor | None, Tensor | None]:
    """Of one tile, and the gradients of its bits to y_hat through the tables of other latents, and to z."""
    y_in, z_in = (t.clone().requires_grad_(with_gradient) for t in (y_hat, z))
    with torch.set_grad_enabled(with_gradient):
        p = net.predict(z_in, y_in, code)
        y_bits = gaussian_bits(y_hat, p.mean, p.scale, net.reach).sum(dim=-1)
        z_bits = net.prior.bits(z_in, code).sum(dim=-1)
        total = y_bits.sum() + z_bits.sum()
        # Where there is no context, y_in has no gradient.
        gradients = torch.autograd.grad(total, (y_in, z_in), allow_unused=True) if with_gradient else (None, None)
    bits_map = F.avg_pool2d(y_bits.detach().unsqueeze(1), 4, divisor_override=1).squeeze(1) + z_bits.detach()
    return _Rate(Prediction(*(t.detach() for t in p)), float(total.detach()), bits_map), *gradients


def quarter(span: slice) -> slice:
    """Of hyper-latents, from that of latents."""
    return slice(span.start // 4, -(-span.stop // 4))
