"""What rounding for rate, encoder-side optimisation and training take for error: squared error, or 1 - MS-SSIM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lic.images import MS_SSIM_C1, MS_SSIM_C2, MS_SSIM_SIGMA, MS_SSIM_WINDOW, ms_ssim_exponents
from lic.model.codec import FOR_SQUARED_ERROR, IN_TRAINING, Corrections, Share
from lic.model.transforms import LappedShortcut
from lic.quality import Tune

# Squared error of a pixel that 1 - MS-SSIM is worth: the ratio of the λ with which CompressAI trains its models for the
# one and for the other, 1220 to 1330.
MS_SSIM_WORTH = 1280.0
OF_CHANNELS, OF_NEIGHBOURS = 0.3, 0.5  # least share of their mean, of their maximum: see MsSsim.weight
LEAST_TERM = 1e-3  # of MS-SSIM: the derivative of its powers is infinite at 0


class Distortion(Protocol):
    """``context_weight``: of the rate's gradient through the context, for it acts over several passes.

    ``damping``: by how much the second derivative is taken larger than :meth:`weight` at first. ``corrections`` of
    latents, and those ``in_training``. ``is_squared_error``: what lowers that lowers this.
    """

    context_weight: float
    damping: float
    corrections: Corrections
    in_training: Corrections
    is_squared_error: bool

    def error(self, shown: Tensor, seen: Tensor) -> Tensor:
        """Of pixels (H, W, C) against those of the source, both in 0..255: a scalar, summed over the pixels."""

    def expansion(self, shown: Tensor, seen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """How :meth:`error` changes when something small is added to the pixels that are shown.

        Its derivative to them, (H, W, C), and the worths of squares at scales 0, 1, ...: of the mean of what is added
        over each 2**scale by 2**scale pixels, (⌈H/2**scale⌉, ⌈W/2**scale⌉, C) or (1, 1, C).
        """

    def weight(self, shortcut: LappedShortcut, seen: Tensor) -> Tensor:
        """How many times the weight that squared error gives it each latent has, (B, h, w, M) or one for all.

        Rounding and the search weigh errors so. That is of the second derivative of :meth:`error`, for pixels
        (B, 16·h, 16·w, 3) of the sources in 0..255.
        """


class SquaredError:
    """Summed over the pixels, averaged over their channels."""

    context_weight, damping, is_squared_error = 2.0, 1.0, True
    corrections, in_training = FOR_SQUARED_ERROR, IN_TRAINING

    def error(self, shown: Tensor, seen: Tensor) -> Tensor:
        return (shown - seen).square().mean(-1).sum()

    def expansion(self, shown: Tensor, seen: Tensor) -> tuple[Tensor, list[Tensor]]:
        channels = seen.shape[-1]
        return 2 / channels * (shown - seen), [torch.full((1, 1, channels), 1 / channels, device=seen.device)]

    def weight(self, shortcut: LappedShortcut, seen: Tensor) -> Tensor:
        return torch.ones(1, 1, 1, 1, device=seen.device)


class MsSsim:
    """1 - MS-SSIM (Wang, Simoncelli and Bovik 2003) of a window, times its pixels and ``MS_SSIM_WORTH``."""

    context_weight, damping, is_squared_error = 0.75, 2.0, False

    def __init__(self) -> None:
        self.corrections = Corrections((Share(0.17, 0.8), Share(0.17, 0.8)), self._pull)
        self.in_training = Corrections((Share(0.15, 0.73),))

    def error(self, shown: Tensor, seen: Tensor) -> Tensor:
        pixels = seen.shape[-3] * seen.shape[-2]
        return MS_SSIM_WORTH * pixels * (1 - ms_ssim(shown, seen)).sum()

    @torch.enable_grad()
    def _slope(self, shown: Tensor, seen: Tensor) -> Tensor:
        """The derivative of :meth:`error` to the pixels that are shown; also of the sum over pictures (B, H, W, C)."""
        shown = shown.detach().requires_grad_()
        with torch.autocast(shown.device.type, enabled=False):  # variances are differences of large numbers
            return torch.autograd.grad(self.error(shown, seen), shown)[0]

    def _pull(self, shown: Tensor, seen: Tensor) -> Tensor:
        """See :class:`Corrections`."""
        return -0.5 * seen.shape[-1] * self._slope(shown.clamp(0, 255), seen)

    def expansion(self, shown: Tensor, seen: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._slope(shown, seen), [
            4**scale * MS_SSIM_WORTH / seen.shape[-1] * worth.movedim(0, -1)
            for scale, worth in enumerate(_worths(shown.detach(), seen))
        ]

    def weight(self, shortcut: LappedShortcut, seen: Tensor) -> Tensor:
        """The sum over scales of :func:`_worths`, as the functions of the latents reach them.

        No latent gets much less than others at its place, nor less than those around it: g_s carries errors over to
        them, and what moved far for its own small weight would harm more than it saves.
        """
        total = torch.zeros((), device=seen.device)
        for scale, worth in enumerate(_worths(seen, seen)):
            total = total + shortcut.energy(worth.unflatten(0, (len(seen), -1)).movedim(1, -1), 2**scale)
        mean = total.mean(-1, keepdim=True)
        around = F.max_pool2d(mean.movedim(-1, 1), 3, 1, 1).movedim(1, -1)
        least = OF_CHANNELS * torch.maximum(mean, OF_NEIGHBOURS * around)
        return MS_SSIM_WORTH * torch.maximum(total, least)


DISTORTIONS: dict[Tune, Distortion] = {"psnr": SquaredError(), "ms-ssim": MsSsim()}


def ms_ssim(shown: Tensor, seen: Tensor) -> Tensor:
    """As :func:`lic.bench.metrics.ms_ssim`, with gradients: (...) of pixels (..., H, W, C) in 0..255, in float32."""
    x, y = _planes(shown), _planes(seen)
    exponents = ms_ssim_exponents(min(seen.shape[-3:-1]))
    result = torch.ones(len(x), device=x.device)
    for scale, exponent in enumerate(exponents):
        mean_x, mean_y = _blur(x), _blur(y)
        var_x, var_y = _blur(x.square()) - mean_x.square(), _blur(y.square()) - mean_y.square()
        term = (2 * (_blur(x * y) - mean_x * mean_y) + MS_SSIM_C2) / (var_x + var_y + MS_SSIM_C2)
        if scale == len(exponents) - 1:
            term = term * (2 * mean_x * mean_y + MS_SSIM_C1) / (mean_x.square() + mean_y.square() + MS_SSIM_C1)
        result = result * term.mean(dim=(1, 2)).clamp(min=LEAST_TERM) ** exponent
        x, y = halved(x), halved(y)
    return result.unflatten(0, (*seen.shape[:-3], -1)).mean(-1)


def _worths(shown: Tensor, seen: Tensor) -> Iterator[Tensor]:
    """Worths of squares at each scale of MS-SSIM, (N, H, W) of the planes of pixels (..., H, W, C) in 0..255.

    A term of SSIM is (2·c + C2) / (v + w + C2), c being the covariance and v and w the variances of both pictures, and
    what is added to one of them and fits the other no better increases its variance alone: 1 - MS-SSIM grows by about a
    sum over scales of squares with weights (2·c + C2) / (v + w + C2)².
    """
    x, y = _planes(shown), _planes(seen)
    for exponent in ms_ssim_exponents(min(seen.shape[-3:-1])):
        mean_x, mean_y = _blur(_mirrored(x)), _blur(_mirrored(y))
        var_x, var_y = (
            (_blur(_mirrored(planes.square())) - mean.square()).clamp(min=0)
            for planes, mean in ((x, mean_x), (y, mean_y))
        )
        covariance = (_blur(_mirrored(x * y)) - mean_x * mean_y).clamp(min=0)
        term = 2 * covariance + MS_SSIM_C2
        yield exponent * _blur(_mirrored(term / (var_x + var_y + MS_SSIM_C2).square()))
        x, y = halved(x), halved(y)


def _planes(pixels: Tensor) -> Tensor:
    """(..., H, W, C) -> (N, H, W)."""
    return pixels.movedim(-1, -3).flatten(0, -3)


def _blur(planes: Tensor) -> Tensor:
    """The Gaussian window at every position where it fits entirely (odd size, at most the picture)."""
    for dim in (1, 2):
        radius = (min(MS_SSIM_WINDOW, planes.shape[dim]) - 1) // 2
        offsets = torch.arange(-radius, radius + 1, device=planes.device)
        taps = torch.exp(offsets.square() / (-2 * MS_SSIM_SIGMA**2))
        kernel = (taps / taps.sum()).view(1, 1, *((-1, 1) if dim == 1 else (1, -1)))
        # Planes as groups of one picture: ten times as fast on a CPU as pictures of one channel, gradients and all.
        planes = F.conv2d(planes.unsqueeze(0), kernel.expand(len(planes), -1, -1, -1), groups=len(planes)).squeeze(0)
    return planes


def _mirrored(planes: Tensor) -> Tensor:
    """With as much at each side as the window reaches, so that it fits everywhere. Sides are 16 at least."""
    height, width = (min(MS_SSIM_WINDOW // 2, side - 1) for side in planes.shape[1:])
    return F.pad(planes.unsqueeze(1), (width, width, height, height), mode="reflect").squeeze(1)


def halved(planes: Tensor) -> Tensor:
    """Means of 2×2 blocks; an odd last row or column is repeated."""
    odd_height, odd_width = (side % 2 for side in planes.shape[1:])
    return F.avg_pool2d(F.pad(planes.unsqueeze(1), (0, odd_width, 0, odd_height), mode="replicate"), 2).squeeze(1)
