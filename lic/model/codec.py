"""The whole model: transforms, gains, hyperprior and context model; the training loss stands on `forward`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lic.coder import SCALES
from lic.exact import MAX_BITS, Depthwise, Grid, Linear, QualityTable, freeze, interpolate, round_ste
from lic.exact.tables import EXP2_INDEX_BITS
from lic.model.config import Config
from lic.model.context import Geometry, Prediction, Unit, make_context
from lic.model.context.base import INDEX_BITS, LOG_SCALE_0, LOG_SCALE_STEP
from lic.model.dependent import SPACING, SPACING_LOG2, Dependent
from lic.model.hyperprior import HyperAnalysis, HyperPrior, HyperSynthesis
from lic.model.layers import Matrix, lower_bound
from lic.model.refinement import Refinement
from lic.model.transforms import Analysis, LappedShortcut, Synthesis
from lic.quality import MAX_CODE, MAX_LAMBDA, MIN_LAMBDA

MIN_SCALE = float(SCALES[0])  # of the tables, in quantiser steps
ROUNDING_WEIGHT, ROUNDING_EXPONENT, DEPENDENT_WEIGHT = 0.72, -0.05, 1.15  # see CodecModel.rounding_weight
COARSE_LAMBDA, COARSE_EXPONENT = 0.0023, -0.15  # the first about that of quality 20; see there
OF_OTHERS = 0.85  # see there
CENTROIDS = 3  # distances from the mean that CodecModel.centroids tells apart: 1, 2, more
OF_PULL, MAX_PULL = 0.5, 0.7  # see CodecModel.corrected
DRIFT_BITS = 1.0  # see CodecModel.forward
THRESHOLD, SOFTNESS = 0.64, 0.06  # see softly_rounded
THRESHOLD_EXPONENT, MAX_THRESHOLD = -0.7, 0.95  # with a worth of its errors
# Of latents y (B, h, w, M), z, codes and worth: integers, and the dequantised latents.
Choose = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
QUANTISERS = ("ste", "universal", "noise")  # what stands for rounding in training, see quantised()


class Share(NamedTuple):
    """Of the way that a correction goes, at quality 0 and at 100; ``refined``: by refined pixels, or by plain ones."""

    low: float
    high: float
    refined: bool = False


class Corrections(NamedTuple):
    """How an encoder corrects its latents (:meth:`CodecModel.corrected`): once for each share.

    ``pull``, of an error that is not squared error, is what it asks to be added to pixels that are shown for those that
    are seen, both (B, H, W, 3) in 0..255: -3/2 of its derivative, which for squared error is all that is missing.
    """

    shares: tuple[Share, ...] = (Share(0.35, 0.9), Share(0.35, 0.9, refined=True))
    pull: Callable[[Tensor, Tensor], Tensor] | None = None


FOR_SQUARED_ERROR = Corrections()
IN_TRAINING = Corrections((Share(0.51, 0.69),))  # see CodecModel.forward


@dataclass
class Forward:
    """x_hat (B, H, W, 3) in [-0.5, 0.5]; bits of y and of z for each image, (B,)."""

    x_hat: Tensor
    y_bits: Tensor
    z_bits: Tensor


class CodecModel(nn.Module):
    """Pixels are (B, H, W, 3) in [-0.5, 0.5], H and W multiples of 64; latents are (B, H/16, W/16, M)."""

    sigma: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.shortcut = LappedShortcut(config.latent)
        self.g_a = Analysis(config)
        self.g_s = Synthesis(config)
        self.refinement = Refinement(config) if config.refinement else None
        self.h_a = HyperAnalysis(config)
        self.h_s = HyperSynthesis(config)
        self.prior = HyperPrior(config)
        self.context = make_context(config)
        self.log_gain = QualityTable(config.knots, config.latent)
        self.log_igain = QualityTable(config.knots, config.latent)
        self.centroids = nn.Parameter(torch.zeros(len(SCALES), CENTROIDS))  # see expected_offset
        self.register_buffer("sigma", torch.ones(config.latent))  # of the shortcut's latents
        self.unit_tables: tuple[Tensor, Tensor] | None = None  # those of a weights file; None in training
        self.dependent: Dependent | None = None  # how its latents are quantised, if weights say so
        self.spacing = 1.0  # of the integers that are coded, in quantiser steps

    @property
    def exact(self) -> bool:
        """Whether the entropy path (h_s and the context model) computes on integers."""
        return self.context.answer.exact

    def set_exact(self, exact: bool) -> None:
        for grid in self.grids().values():
            grid.exact = exact

    @contextlib.contextmanager
    def in_floating_point(self) -> Iterator[None]:
        """Inside the block, the entropy path is a network like any other: faster to differentiate, and not exact."""
        before = self.exact
        self.set_exact(False)
        try:
            yield
        finally:
            self.set_exact(before)

    def adapt(self, rank: int) -> None:
        """Give every matrix of g_a and g_s an adapter, :class:`Matrix`."""
        for net in (self.g_a, self.g_s):
            for layer in net.modules():
                if isinstance(layer, Matrix):
                    layer.adapt(rank)

    def grids(self) -> dict[str, Grid]:
        """Those of the entropy path, by name."""
        parts = (("h_s", self.h_s), ("context", self.context))
        return {f"{part}.{k}": g for part, net in parts for k, g in net.named_modules() if isinstance(g, Grid)}

    def grid_bits(self) -> dict[str, int]:
        """Fraction bits of every grid."""
        return {name: grid.bits for name, grid in self.grids().items()}

    def set_grid_bits(self, bits: dict[str, int]) -> None:
        """Raises ValueError if they are not those of this network's grids."""
        grids = self.grids()
        if set(grids) != set(bits) or not all(type(b) is int and 0 <= b <= MAX_BITS for b in bits.values()):
            raise ValueError("the units of activations are not those of the network")
        if any(grid.bits != bits[name] for name, grid in grids.items() if not grid.calibrated):
            raise ValueError("units of activations differ from those that the network gives")
        for name, grid in grids.items():
            grid.bits = bits[name]

    def exact_layers(self) -> dict[str, Linear | Depthwise]:
        """The layers with weights of the entropy path, by name."""
        parts = (("h_s", self.h_s), ("context", self.context))
        layers = ((f"{part}.{k}", m) for part, net in parts for k, m in net.named_modules())
        return {k: m for k, m in layers if isinstance(m, Linear | Depthwise)}

    def visit(self) -> None:
        """Compute the smallest picture, so that every layer of the entropy path sees the units that it works in.

        Raises ValueError if frozen weights break a certificate.
        """
        device = self.sigma.device
        z = torch.zeros(1, 1, 1, self.config.hyper_latent, device=device)
        self.predict(z, torch.zeros(1, 4, 4, self.config.latent, device=device), torch.zeros(1, device=device))

    @torch.no_grad()
    def freeze(self) -> None:
        """Make the rounded weights and units of the calibrated exact path final."""
        self.set_exact(True)
        self.unit_tables = self.make_unit_tables()
        with freeze():
            self.visit()

    @contextlib.contextmanager
    def calibration(self) -> Iterator[None]:
        """Choose the units of the exact path from what passes through it, in floating point, inside the block.

        Those of a module with frozen weights in it stay.
        """
        self.set_exact(False)
        frozen = [name for name, layer in self.exact_layers().items() if layer.exponent is not None]
        grids = [
            grid
            for name, grid in self.grids().items()
            if not any(layer.startswith(name.rpartition(".")[0] + ".") for layer in frozen)
        ]
        for grid in grids:
            grid.observing, grid.largest = True, 0.0
        yield
        for grid in grids:
            grid.observing = False
            grid.fit()

    @property
    def reach(self) -> float:
        """Integers each way that are as near to one value of a latent as to the next."""
        return 0.5 if self.dependent is None else 1.0

    def quantise(self, dependent: Dependent | None) -> None:
        """With this quantiser from here on; None is scalar quantisation, each latent by itself.

        Raises ValueError for neighbours that its first step has not.
        """
        if dependent is not None and dependent.neighbours is not None:
            schedule = self.context.schedule
            channels = schedule.take(torch.empty(1, 4, 4, self.config.latent), 0).shape[-1]
            if schedule.first_grid(Geometry(1, 4, 4)) is None or dependent.neighbours.channels[-1] >= channels:
                raise ValueError("neighbours of another first step")
        self.dependent, self.spacing = dependent, 1.0 if dependent is None else SPACING
        self.unit_tables = self.make_unit_tables()

    def gain(self, code: Tensor) -> Tensor:
        """Quantiser steps per pixel unit, (B, M), for codes (B,): λ's theoretical step times a learned factor."""
        return torch.exp(self.log_gain(code)) * (255 / step_of(code)).unsqueeze(-1)

    def igain(self, code: Tensor) -> Tensor:
        """Pixel units per quantiser step at the decoder, (B, M)."""
        return torch.exp(self.log_igain(code)) / self.gain(code)

    def unit(self, code: Tensor) -> Unit:
        """Integers per standard deviation of each channel, (B, M); a constant to the entropy path."""
        if not self.exact:
            return Unit.real((self.gain(code) * self.sigma).detach() / self.spacing)
        log2, index = self.unit_tables or self.make_unit_tables()
        spacing = self.log_gain.spacing
        return Unit.integer(interpolate(log2, code, spacing), interpolate(index, code, spacing))

    @torch.no_grad()
    def make_unit_tables(self) -> tuple[Tensor, Tensor]:
        """The unit at each knot of log_gain, (knots, M), as integers: 4096·log2, and Unit.scale_index.

        The logarithm of the unit is linear between knots, as are those of the gain and of the theoretical step.
        """
        code = torch.arange(len(self.log_gain.table), device=self.sigma.device) * self.log_gain.spacing
        log = self.log_gain.table.double() - torch.log(step_of(code).double() / 255).unsqueeze(-1)
        log = log + torch.log(self.sigma.double())
        log2 = log * (2**EXP2_INDEX_BITS / math.log(2))
        if self.spacing == SPACING:
            log2, log = log2 - SPACING_LOG2, log - math.log(SPACING)
        return torch.round(log2), torch.round((log - LOG_SCALE_0) * (2**INDEX_BITS / LOG_SCALE_STEP))

    def analysis(self, x: Tensor, code: Tensor) -> Tensor:
        """Latents in quantiser steps, not rounded."""
        y = self.shortcut.analysis(x) + self.g_a(x, code).float()
        return y * self.gain(code)[:, None, None]

    @torch.no_grad()
    def corrected(
        self,
        x: Tensor,
        y: Tensor,
        code: Tensor,
        worth: Tensor | None = None,
        corrections: Corrections = FOR_SQUARED_ERROR,
    ) -> Tensor:
        """Latents y (B, h, w, M) of pixels x, taken to where the synthesis would make x of them: analysis by synthesis.

        v is about what the decoder will get for y, and x - g_s(v) what is still missing. Were the synthesis its linear
        shortcut alone, v plus the shortcut's latents of that would be the latents of x. g_s adds a correction, which
        g_a anticipates in the mean only, whereas this sees what it does to these very latents, and what the refinement
        does to their pixels where a share is of the way by refined ones. The share grows linearly with quality: the
        finer the steps, the surer is v. ``worth`` is that of :meth:`rounded`, which makes zeros of more where errors
        count less.

        An error other than squared error asks each latent, all others being as they are, to move by its pull over its
        worth: by what mends its own error and those of others besides. As all move at once, that is too far for some.
        So OF_PULL of the difference from what is missing is taken, and at most OF_PULL·MAX_PULL quantiser steps of it.
        Without gradients.
        """
        gain = self.gain(code)[:, None, None]
        for low, high, refined in corrections.shares:
            v = softly_rounded(y, worth)
            shown = self.decoded(v, code) if refined else self.synthesis(v, code)
            missing = self.shortcut.analysis(x - shown) * gain
            if corrections.pull is not None:
                pull = self.shortcut.analysis(corrections.pull(255 * (shown + 0.5), 255 * (x + 0.5)) / 255) * gain
                pull = pull if worth is None else pull / worth
                missing = missing + OF_PULL * (pull - missing).clamp(-MAX_PULL, MAX_PULL)
            way = low + (high - low) / MAX_CODE * code[:, None, None, None]
            y = y + way * (v + missing - y)
        return y

    def synthesis(self, y: Tensor, code: Tensor) -> Tensor:
        """Pixels from dequantised latents in quantiser steps (rounded latents plus their offset)."""
        y = y * self.igain(code)[:, None, None]
        linear = self.shortcut.synthesis(y)
        return linear + self.g_s(y, linear, code).float()

    def decoded(self, y: Tensor, code: Tensor) -> Tensor:
        """Pixels that a decoder makes samples of: those of :meth:`synthesis`, refined if there is a refinement.

        Black is -0.5 and white 0.5; some may lie beyond.
        """
        return self.synthesis(y, code) if self.refinement is None else self.plain_and_refined(y, code)[1]

    def plain_and_refined(self, y: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels of :meth:`synthesis`, in the range of samples, and refined ones."""
        assert self.refinement is not None
        y = y * self.igain(code)[:, None, None]
        linear = self.shortcut.synthesis(y)
        features = self.g_s.features(y, linear, code)
        x = (linear + self.g_s.ended(features).float()).clamp(-0.5, 0.5)
        return x, x + self.refinement(x, features.float(), code, step_of(code)).float()

    def hyper_analysis(self, y: Tensor, code: Tensor) -> Tensor:
        """z, not rounded, from unrounded latents in quantiser steps."""
        return self.h_a(Unit.real((self.gain(code) * self.sigma).detach()[:, None, None]).features(y).x, code)

    def distortion_weight(self, code: Tensor) -> Tensor:
        """Bits that a squared error of one quantiser step is worth, (B, M): λ/3·(255·igain)².

        Exact for an orthonormal synthesis; the MSE is a mean over three channels.
        """
        return lambda_of(code).unsqueeze(-1) / 3 * (255 * self.igain(code)).square()

    def rounding_weight(self, code: Tensor, is_squared_error: bool) -> Tensor:
        """The same for quantisation, (B, M): of the plain gain, times 0.72·λ^-0.05, 1.05 to 0.72.

        A choice for fewer bits also makes later symbols cheaper, which is not seen there. With dependent quantisation
        1.15 times as much, still more below COARSE_LAMBDA and, where the error is not squared error, OF_OTHERS of that,
        all measured. igain is left out: it undoes what rounding does to the values, which is not what an error costs.
        """
        strength = lambda_of(code)
        times = ROUNDING_WEIGHT * strength ** (1 + ROUNDING_EXPONENT) / 3
        if self.dependent is not None:
            coarse = (strength / COARSE_LAMBDA).clamp(max=1) ** COARSE_EXPONENT
            times = coarse * (DEPENDENT_WEIGHT * times) * (1 if is_squared_error else OF_OTHERS)
        return times.unsqueeze(-1) * (255 / self.gain(code)).square()

    def predict(self, z: Tensor, y_hat: Tensor, code: Tensor) -> Prediction:
        """What rounded latents y_hat (B, h, w, M) are coded with, given integer z: all steps at once."""
        with torch.autocast(z.device.type, enabled=torch.is_autocast_enabled(z.device.type) and not self.exact):
            return self.context.teacher(self.h_s(z, code), y_hat, code, self.unit(code))

    @torch.no_grad()
    def latents(self, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Integers y (B, h, w, M), rounded as the encoder does it, and z (B, h/4, w/4, C) of pixels x."""
        y = self.latents_to_quantise(x, code)
        z = torch.round(self.hyper_analysis(y, code))
        return self.rounded(y, z, code), z

    def latents_to_quantise(
        self, x: Tensor, code: Tensor, worth: Tensor | None = None, corrections: Corrections = FOR_SQUARED_ERROR
    ) -> Tensor:
        """Latents (B, h, w, M) as an encoder has them before it quantises: the analysis, corrected."""
        return self.corrected(x, self.analysis(x, code), code, worth, corrections)

    def rate(self, y_hat: Tensor, z: Tensor, code: Tensor, halves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bits of integers y_hat and z for each image, (B,), with gradients to h_s and the context model.

        halves: how far the integers reach below and above, in half integers, (2, B, h, w, M); 1 if it is None.
        """
        p = self.predict(z, y_hat, code)
        reach = (0.5,) if halves is None else 0.5 * halves
        y_bits = gaussian_bits(y_hat, p.mean, p.scale, *reach).sum(dim=(1, 2, 3))
        return y_bits, self.prior.bits(z, code).sum(dim=(1, 2, 3)).detach()

    @torch.no_grad()
    def rounded(self, y: Tensor, z: Tensor, code: Tensor, worth: Tensor | None = None) -> Tensor:
        """y rounded for rate, each latent by itself, with the context of plainly rounded latents.

        worth: how many times its usual weight the error of each latent has, (B, h, w, M); None for squared error.
        """
        p = self.predict(torch.round(z), torch.round(y), code)
        weight = self.rounding_weight(code, worth is None)[:, None, None]
        return round_for_rate(y, p.mean, p.scale, weight if worth is None else worth * weight, self.centroids)

    def forward(
        self,
        x: Tensor,
        code: Tensor,
        *,
        frozen_latents: bool = False,
        optimised_rounding: bool = False,
        worth: Tensor | None = None,
        corrections: Corrections = IN_TRAINING,
        quantiser: str = "ste",
        choose: Choose | None = None,
    ) -> Forward:
        """Training pass: context and synthesis get latents from the ``quantiser`` (:func:`quantised`).

        The bits are those of the rounded latents, and so are the gradients of the entropy model: under additive noise
        it would learn scales for noise (a symbol that is always 0 then still costs a tenth of a bit). The latents
        themselves get the gradient of the rate under additive noise, which is the rate's slope over a whole step.

        Latents are corrected as in the encoder (:meth:`corrected`), with the gradient passing straight through. That
        is wrong where g_s answers too strongly, and then the analysis drifts: hence only once and less far, by
        ``corrections``, and y is drawn to what it is corrected to, by DRIFT_BITS times the logarithm of about the
        squared distance.

        With ``frozen_latents`` the transforms up to y carry no gradient. With ``optimised_rounding`` the latents are
        rounded as the encoder does it (:meth:`rounded`, with ``worth``), likewise straight through. With ``choose``,
        for a network with dependent quantisation, they are what that gives, and noise is as wide as what lies between
        two values that a latent can have.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_latents):
            y = self.analysis(x, code)
        corrected = self.corrected(x, y, code, worth, corrections)
        weight = self.rounding_weight(code, worth is None)[:, None, None]
        drift = torch.log1p(weight * (y - corrected).square()).sum(dim=(1, 2, 3))
        y = corrected + _gradient_only(y)
        z = self.hyper_analysis(y, code)
        z_bits = self.prior.bits(torch.round(z).detach(), code) + _gradient_only(self.prior.bits(_noisy(z), code, True))
        dequantised = None
        if choose is not None:
            integers, dequantised = choose(y.detach(), torch.round(z).detach(), code, worth)
            y_hat = integers + _gradient_only(y / self.spacing)
        elif optimised_rounding:
            y_hat = self.rounded(y, z, code, worth) + _gradient_only(y)
        else:
            y_hat = quantised(y, quantiser)
        p = self.predict(round_ste(z), y_hat, code)
        mean, scale, reach = p.mean, p.scale, self.reach
        y_bits = gaussian_bits(y_hat.detach(), mean, scale, reach)
        if not frozen_latents:
            noisy = y / self.spacing + 2 * reach * (torch.rand_like(y) - 0.5)
            y_bits = y_bits + _gradient_only(gaussian_bits(noisy, mean.detach(), scale.detach(), reach))
        if dequantised is None:
            decoded = y_hat + expected_offset(y_hat.detach(), mean.detach(), scale.detach(), self.centroids)
        else:
            decoded = dequantised + _gradient_only(y)
        y_bits = y_bits.sum(dim=(1, 2, 3)) + _gradient_only(DRIFT_BITS * drift)
        return Forward(self.synthesis(decoded, code), y_bits, z_bits.sum(dim=(1, 2, 3)))


def lambda_of(code: Tensor) -> Tensor:
    """:func:`lic.quality.lambda_of` on tensors."""
    return MIN_LAMBDA * torch.exp(code.float() / MAX_CODE * math.log(MAX_LAMBDA / MIN_LAMBDA))


def step_of(code: Tensor) -> Tensor:
    """:func:`lic.quality.step_of` on tensors."""
    return torch.sqrt(26 / lambda_of(code))


def quantised(y: Tensor, quantiser: str) -> Tensor:
    """y (B, h, w, M) as training quantises it, with the gradient of the identity.

    ``ste``: rounded; ``noise``: with uniform noise of one step instead; ``universal``: round(y + u) - u with one such
    random u for each crop (Choi et al. 2019), errors like those of rounding, spread like noise.
    """
    if quantiser == "noise":
        return _noisy(y)
    if quantiser == "universal":
        u = torch.rand(len(y), 1, 1, 1, device=y.device) - 0.5
        return round_ste(y + u) - u
    return round_ste(y)


def _noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x) - 0.5


def _gradient_only(x: Tensor) -> Tensor:
    """Zero, with the gradient of x."""
    return x - x.detach()


def gaussian_bits(
    y: Tensor, mean: Tensor, scale: Tensor, below: Tensor | float = 0.5, above: Tensor | float | None = None
) -> Tensor:
    """-log2 of the Gaussian's mass on the interval that reaches so far below and above y, as far if above is None."""
    distance = (y - mean).abs()
    towards = away = below
    if above is not None:
        towards, away = torch.where(y > mean, below, above), torch.where(y > mean, above, below)
    mass = _cdf((towards - distance) / scale) - _cdf((-away - distance) / scale)
    return -torch.log2(lower_bound(mass, 1e-9))


def round_for_rate(y: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, centroids: Tensor) -> Tensor:
    """Round y to the nearest integer or the next one towards the mean, whichever costs less.

    The cost is bits + weight·(error of the dequantised value)²: rate-distortion optimised quantisation with the
    context as it is, blind to what a choice does to the prediction of later symbols. ``centroids`` (scales, CENTROIDS)
    are those of :func:`expected_offset`.
    """
    nearest = torch.round(y)
    other = nearest + torch.sign(torch.round(mean) - nearest)

    def cost(value: Tensor) -> Tensor:
        error = y - value - expected_offset(value, mean, scale, centroids)
        return gaussian_bits(value, mean, scale) + weight * error.square()

    return torch.where(cost(other) < cost(nearest), other, nearest)


def softly_rounded(y: Tensor, worth: Tensor | None = None) -> Tensor:
    """About E[dequantised value | y], before anything is known of means and scales: a staircase with soft steps.

    Rounding for rate takes y to the next integer from a fraction of about THRESHOLD on, of more where an error's
    ``worth`` is less than 1; where exactly depends on the context, hence the softness.
    """
    threshold: Tensor | float = THRESHOLD
    if worth is not None:
        threshold = (0.5 + (THRESHOLD - 0.5) * worth**THRESHOLD_EXPONENT).clamp(max=MAX_THRESHOLD)
    size = y.abs()
    whole = torch.floor(size)
    return torch.sign(y) * (whole + torch.sigmoid((size - whole - threshold) / SOFTNESS))


def expected_offset(y_hat: Tensor, mean: Tensor, scale: Tensor, centroids: Tensor) -> Tensor:
    """E[y | y_hat] - y_hat: for a Gaussian y within half a step of y_hat, at most half a step, plus ``centroids``.

    Rounding for rate takes values towards the mean, so that those which stay at an integer lie farther out; and
    latents have longer tails than a Gaussian. ``centroids`` (scales, CENTROIDS) says by how many steps the expectation
    is farther out for integers at a distance of 1, 2 or more from the rounded mean.
    """
    low, high = (y_hat - 0.5 - mean) / scale, (y_hat + 0.5 - mean) / scale
    density = (torch.exp(-0.5 * low**2) - torch.exp(-0.5 * high**2)) * (2 * math.pi) ** -0.5
    mass = (_cdf(high) - _cdf(low)).clamp(min=1e-6)
    offset = (mean - y_hat + scale * density / mass).clamp(-0.5, 0.5)
    distance = y_hat - torch.floor(mean + 0.5)
    index = torch.round((torch.log(scale) - LOG_SCALE_0) / LOG_SCALE_STEP).clamp(0, len(centroids) - 1) * CENTROIDS
    # No place for what is not a number: the loss tells of it later.
    place = torch.nan_to_num(index + distance.abs().clamp(1, CENTROIDS) - 1).int()
    return offset + torch.sign(distance) * centroids.flatten().index_select(0, place.flatten()).view_as(offset)


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(x * -(0.5**0.5))
