"""The training loop: time-limited slices, resumable, one loss for all qualities.

L = bits per pixel + λ·MSE(255²) per crop, weighted by λ^-0.4 so that every quality counts alike: the optimal cost
itself grows about as λ^0.4. A crop that costs more than MAX_COST is scaled down to that, gradient and all.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lic.coder import Tables
from lic.errors import LicError
from lic.model.codec import QUANTISERS, CodecModel, lambda_of, step_of
from lic.model.config import CONFIGS, DOWNSAMPLING, HYPER_DOWNSAMPLING, REFINEMENT, Config
from lic.model.dependent import Chains, Dependent
from lic.model.layers import space_to_depth
from lic.model.neighbours import Neighbours
from lic.model.refinement import leave_graphs
from lic.model.store import NEIGHBOURS
from lic.model.transforms import lapped_basis
from lic.pipeline.distortion import DISTORTIONS, MS_SSIM_WORTH, ms_ssim
from lic.quality import TUNES, Tune
from lic.train.calibration import calibrate
from lic.train.data import CHROMA_PART, PATTERN_PART, Pictures, sample
from lic.train.dependent import ToQuantise, quantised
from lic.train.latents import StoredLatents
from lic.train.optimizers import make_optimizers

STATE_VERSION = 10
LOSS_EXPONENT = 0.4
MAX_COST = 20.0  # what one crop adds to a batch's loss: 99 of 100 crops of photographs cost less, patterns up to 20,000
PRECISIONS = ("auto", "float32", "bfloat16")  # auto: bfloat16 on a GPU
ENCODED, ENCODED_USES = 20, 5  # batches of dependently quantised latents at hand, and steps that each serves
NEGLIGIBLE = 0.02  # squared quantiser steps, of the error that a refinement is to lower; of 1 - MS-SSIM about so
MIN_VARIANCE = 1e-8  # of a latent: pictures without colour have channels without any
FIT_CROP = 144  # side of the crops that the shortcut is fitted to: 8 x 8 lapped patches


PARTS = {
    "all": "everything",
    "context": "the context model alone, as a density model of latents that stay as they are",
    "nonlocal": "the non-local attention modules and the context model",
    "transforms": "analysis, hyper-analysis and synthesis for an entropy model that stays as it is",
    "synthesis": "the synthesis transform and its gains, on latents quantised as the encoder does",
    "gains": "the scaling factors of a finished model (log_gain, log_igain)",
    "tables": "these, centroids and the transforms' other tables by quality, the scales and offsets of their stages",
    "vectors": "these and the transforms' biases and depthwise kernels: all of them but their matrices",
    "adapters": "these and additions of low rank to the matrices (--rank)",
    "synthesis-adapters": "all of these that belong to the synthesis, on latents quantised as the encoder does",
    "refinement": "the refinement behind the synthesis, which begins anew if there is none, on the same latents",
}
WITH_ENTROPY_MODEL = ("all", "context", "nonlocal")  # the parts that change it
WITH_ADAPTERS = ("adapters", "synthesis-adapters")  # the parts that have them
OF_SYNTHESIS = ("synthesis", "synthesis-adapters", "refinement")  # those on latents that stay as they are
KEEP_REFINEMENT = ("context", "nonlocal", "gains", "refinement")  # others change the pixels that it is made for
VECTORS, ADAPTERS = (".bias", ".spatial.weight"), (".left", ".right")


def is_trained(part: str, name: str) -> bool:
    """Whether the parameter of this name belongs to one of PARTS."""
    if part == "gains":
        return name.startswith(("log_gain.", "log_igain."))
    if part in ("tables", "vectors", "adapters"):
        if name.startswith(("g_a.", "g_s.")):
            more = {"tables": (), "vectors": VECTORS, "adapters": VECTORS + ADAPTERS}[part]
            return ".quality." in name or name.endswith(more)
        return name.startswith(("log_gain.", "log_igain.", "centroids"))
    if part == "synthesis-adapters":
        return name.startswith(("g_s.", "log_igain.")) and is_trained("adapters", name)
    if part == "refinement":
        return name.startswith("refinement.")
    if part in ("transforms", "synthesis"):
        return name.startswith(("g_s.", "log_igain.", "centroids") + (("g_a.", "h_a.") if part == "transforms" else ()))
    return part == "all" or name.startswith("context.") or (part == "nonlocal" and ".non_local." in name)


@dataclass(frozen=True)
class Settings:
    """One run. Progress through it is trained time over ``schedule_minutes``, or ``steps`` where that is given."""

    model: str = "base"
    part: str = "all"  # one of PARTS
    rank: int = 8  # of adapters
    tune: Tune = "psnr"  # what distortion is: squared error, or 1 - MS-SSIM times MS_SSIM_WORTH
    schedule_minutes: float = 120.0
    steps: int | None = None
    learning_rate: float = 1e-3
    warm_up_steps: int = 200
    quantiser: str = "ste"  # one of QUANTISERS
    optimizer: str = "adamw"  # see make_optimizers
    precision: str = "auto"  # of products: one of PRECISIONS; likelihoods are always in float32
    frozen_part: float = 0.3  # first share of a run of all parts: linear analysis, entropy model as density model
    exact_part: float = 0.0  # last share, with the integers of the exact path in the loop
    refine_part: float = 0.25  # last share: analysis as it is, the rest trained on latents rounded as the encoder does
    batch: int = 4
    crop: int = 192
    late_batch: int = 2  # batch and crop of the last quarter
    late_crop: int = 256
    chroma_part: float = CHROMA_PART  # share of the crops whose chroma is as soft as that of camera JPEGs
    pattern_part: float = PATTERN_PART  # share of the crops that have a pattern drawn over them
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 1


class Phase(NamedTuple):
    """Of a run: crops in a batch and their side, whether y carries no gradient, whether it is quantised for rate.

    Latents of a trained analysis are quantised for rate only if the entropy model, which decides, is finished.
    """

    batch: int
    crop: int
    frozen: bool
    refine: bool


class Trainer:
    """Everything that a slice of training saves and restores.

    Under ``torchrun`` every process trains on its own crops and the gradients are averaged; the first one saves.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        config: Config | None = None,
        refinement: tuple[int, ...] = (),
    ) -> None:
        """``config``: the configuration, if it is not the present one of that name with this ``refinement``.

        The parts that change what a refinement is made for, do without: it is trained again behind them.
        """
        self.settings, self.device = settings, device
        if config is None and settings.model not in CONFIGS:
            raise LicError(f"no configuration named {settings.model!r}; there are: {', '.join(CONFIGS)}")
        if settings.part == "refinement":
            refinement = refinement or REFINEMENT
        elif settings.part not in KEEP_REFINEMENT:
            refinement = ()
        config = config or replace(CONFIGS[settings.model], refinement=refinement)
        if settings.part not in PARTS:
            raise LicError(f"the part to train must be one of {', '.join(PARTS)}, not {settings.part!r}")
        if settings.part == "nonlocal" and not config.non_local_heads:
            raise LicError(f"the model {config.name} has no non-local attention modules")
        if settings.tune not in TUNES:
            raise LicError(f"tune must be one of {', '.join(TUNES)}, not {settings.tune!r}")
        if settings.quantiser not in QUANTISERS:
            raise LicError(f"the quantiser must be one of {', '.join(QUANTISERS)}, not {settings.quantiser!r}")
        if settings.quantiser != QUANTISERS[0] and settings.part not in WITH_ENTROPY_MODEL:
            raise LicError(f"the part {settings.part} quantises as the encoder does, not by {settings.quantiser!r}")
        if settings.precision not in PRECISIONS:
            raise LicError(f"the precision must be one of {', '.join(PRECISIONS)}, not {settings.precision!r}")
        if min(settings.batch, settings.late_batch) < 2:
            raise LicError("a batch needs two crops at least: of pictures as they are, and of scaled ones")
        if settings.crop % HYPER_DOWNSAMPLING or settings.late_crop % HYPER_DOWNSAMPLING:
            raise LicError(f"the sides of crops must be multiples of {HYPER_DOWNSAMPLING}")
        torch.manual_seed(settings.seed)
        self.model = CodecModel(config)
        if settings.part in WITH_ADAPTERS:
            self.model.adapt(settings.rank)
        self.model.to(device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_trained(settings.part, name))
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.generator = torch.Generator(device)
        self.optimizers = make_optimizers(self.model, settings.optimizer)
        fast = device.type == "cuda" if settings.precision == "auto" else settings.precision == "bfloat16"
        # No cache of casts: that of a pass without gradients would serve the next one, in PyTorch before 2.10.
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=fast, cache_enabled=False)
        self.latents: Callable[..., tuple[Tensor, Tensor]] = self.model.latents
        self.encoder: CodecModel | None = None  # that of the latents that a synthesis alone is trained on
        self.encoded: dict[int, tuple[Tensor, ...]] = {}  # what it made of the last batches, with pixels and codes
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step, self.seconds, self.pixels = 0, 0.0, 0
        self._seed_random()
        self.fresh = True  # the shortcut still has to be fitted to the pictures

    def _seed_random(self) -> None:
        """Crops and noise of this process, from here on."""
        seed = self.settings.seed + 1000 * self.rank + self.step
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)

    def save(self, path: Path) -> None:
        """Write the state, atomically; only the first process does."""
        if self.rank > 0:
            return
        state = {
            "version": STATE_VERSION,
            "settings": asdict(self.settings),
            "config": self.model.config.to_json(),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "pixels": self.pixels,
            "generator": self.generator.get_state(),
            "device": self.device.type,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "grids": self.model.grid_bits() if self.model.exact else None,
            "encoder": None if self.encoder is None else self.encoder.state_dict(),
            "encoded": self.encoded,
            "dependent": _stored((self.encoder or self.model).dependent),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    @classmethod
    def restore(cls, path: Path, device: torch.device) -> Trainer:
        """Continue where :meth:`save` was called: exactly, or with new random numbers on another kind of device.

        Raises LicError on a state of another version.
        """
        state = read_state(path)
        trainer = cls(Settings(**state["settings"]), device, Config.from_json(state["config"]))
        trainer.model.load_state_dict(state["model"])
        if (dependent := _dependent(state)) is not None:
            trainer._quantise(state["encoder"], dependent)
            if trainer.rank == 0:  # whose batches they are
                trainer.encoded = {k: tuple(t.to(device) for t in v) for k, v in state["encoded"].items()}
        trainer.average = {k: v.to(device) for k, v in state["average"].items()}
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        trainer.step, trainer.seconds, trainer.pixels = state["step"], state["seconds"], state["pixels"]
        trainer._seed_random()
        if trainer.rank == 0 and state["device"] == device.type:  # the state holds the first process's random numbers
            trainer.generator.set_state(state["generator"])
            torch.set_rng_state(state["random"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(state["random_cuda"], device)
        trainer.fresh = False
        if state["grids"] is not None:
            trainer.model.set_grid_bits(state["grids"])
            trainer.model.set_exact(True)
        return trainer

    def start_from(self, weights: dict[str, Tensor], dependent: Dependent | None = None) -> None:
        """Continue from weights alone, for instance the shipped ones; the optimiser warms up anew.

        ``dependent`` is their quantiser, with which parts that leave the entropy model as it is quantise; others know
        scalar quantisation only.

        With the part context or nonlocal a context model begins anew if the weights are those of another one, and
        non-local modules do if the weights have none, as do adapters with that part, and what these have of a higher
        rank. Raises LicError if the weights have adapters that the run has not.
        """
        own = self.model.state_dict()
        theirs = {k: v for k, v in weights.items() if k.endswith(ADAPTERS)}
        if any(k not in own or len(v) > len(own[k]) for k, v in theirs.items()):
            rank = max(map(len, theirs.values()))
            raise LicError(f"weights with adapters of rank {rank}: --part adapters --rank {rank} trains them further")
        for name, rows in theirs.items():
            weights = weights | {name: torch.cat([rows, torch.zeros_like(own[name][len(rows) :])])}
        for name in (k for k in theirs if k.endswith(".right") and is_trained(self.settings.part, k)):
            idle = (weights[name] == 0).all(dim=1) & (weights[name.removesuffix(".right") + ".left"] == 0).all(dim=1)
            weights[name][idle] = own[name][idle]  # where both halves are zeros neither has a gradient
        if self.settings.part in ("context", "nonlocal"):
            shapes = [{k: v.shape for k, v in d.items() if k.startswith("context.")} for d in (own, weights)]
            fresh = {k: v for k, v in own.items() if ".non_local." in k}
            if shapes[0] != shapes[1]:
                weights = {k: v for k, v in weights.items() if not k.startswith("context.")}
                fresh |= {k: v for k, v in own.items() if k.startswith("context.")}
            weights = fresh | weights
        elif self.settings.part in WITH_ADAPTERS:
            weights = {k: v for k, v in own.items() if k.endswith(ADAPTERS)} | weights
        elif self.settings.part == "refinement":
            if dependent is None:
                raise LicError("a refinement (--part refinement) is for weights with dependent quantisation")
            weights = {k: v for k, v in own.items() if k.startswith("refinement.")} | weights
        if self.model.refinement is None:
            weights = {k: v for k, v in weights.items() if not k.startswith("refinement.")}
        self.model.load_state_dict(weights)
        if self.settings.part not in WITH_ENTROPY_MODEL and dependent is not None:
            if self.settings.exact_part:
                raise LicError("integers in the loop (--exact-part) are for parts that change the entropy model")
            self._quantise(weights, dependent)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.fresh = False

    def _quantise(self, weights: dict[str, Tensor], dependent: Dependent) -> None:
        """Train on dependent quantisation, with the entropy model of these weights.

        The synthesis alone is trained on what they make of pixels, not on what the weights in training make of them:
        these correct latents by their synthesis, which then learns from what itself has shifted, and drifts. Other
        parts quantise their own latents, whose rate holds them.
        """
        if self.settings.part not in OF_SYNTHESIS:
            self.model.quantise(dependent)
            self.model.unit_tables = None  # of the gains as they are, not as they were
            return
        self.encoder = CodecModel(self.model.config)
        if self.settings.part in WITH_ADAPTERS:
            self.encoder.adapt(self.settings.rank)
        self.encoder.to(self.device).requires_grad_(False)
        self.encoder.load_state_dict(weights)
        self.encoder.g_s.limit = self.model.g_s.limit
        self.encoder.quantise(dependent)

    def run(
        self, source: Pictures | StoredLatents, minutes: float, state: Path, log: Callable[[dict[str, Any]], None]
    ) -> None:
        """Train for so many minutes or to the end of the schedule, saving every two minutes and at the end.

        Stored latents serve a context model that is trained alone, in floating point. Raises LicError if they are
        given for anything else.
        """
        if isinstance(source, Pictures):
            source.wait(max(self.settings.crop, self.settings.late_crop, FIT_CROP))
            if self.fresh:
                self.fit_shortcut(source)
        elif self.settings.part != "context" or self.settings.exact_part:
            raise LicError("stored latents train a context model alone (--part context), and not its integers")
        else:
            self.model.spacing = source.spacing
        end = time.monotonic() + minutes * 60
        last = saved = since = time.monotonic()
        pixels = self.pixels
        sums: Tensor | None = None
        loss_of: Callable[..., Any] = self.objective()
        compiles = self.device.type == "cuda"
        if compiles:  # for every size anew: graphs for any size take ten times as long to make
            leave_graphs()
            loss_of = torch.compile(loss_of, dynamic=False)
            self.latents = torch.compile(self.model.latents, dynamic=False)
        compiled: set[Phase] = set()
        while True:
            if isinstance(source, Pictures) and self.progress() > 1 - self.settings.exact_part and not self.model.exact:
                self.make_exact(source)
                compiled.clear()
            phase = self.phase()
            metrics = self.train_step(source, loss_of)
            sums = metrics if sums is None else sums + metrics
            now = time.monotonic()
            if phase in compiled or not compiles:  # the first step of a phase compiles it: that is no trained time
                self.seconds += now - last
            compiled.add(phase)
            last = now
            progress = self.progress()
            finished = self._agree(progress >= 1 or now >= end)
            if self.step % 50 == 0 or finished:
                source.refresh()
                loss, bpp, z_bpp, distortion = (sums[:-1] / sums[-1]).tolist()
                if not math.isfinite(loss):
                    raise LicError(f"the loss is not finite at step {self.step}; the state of the last save is intact")
                entry = {"step": self.step, "minutes": round(self.seconds / 60, 2), "mpx": round(self.pixels / 1e6, 1)}
                entry |= {"mpx_per_s": round((self.pixels - pixels) / 1e6 / (now - since), 2)}
                pixels, since = self.pixels, now
                entry |= {"progress": round(progress, 4), "lr": self.learning_rate(), "pictures": source.count}
                entry |= {"loss": round(loss, 5), "bpp": round(bpp, 4), "z_bpp": round(z_bpp, 4)}
                entry["distortion"] = round(distortion, 3)
                log(entry)
                sums = None
                if finished or now - saved > 120:
                    self.save(state)
                    saved = now
            if finished:
                return

    def make_exact(self, pictures: Pictures) -> None:
        """From here on, train with the integers of the exact path."""
        calibrate(self.model, pictures)
        if self.processes > 1:
            names = list(self.model.grid_bits())
            bits = torch.tensor([self.model.grid_bits()[name] for name in names], device=self.device)
            dist.broadcast(bits, 0)
            self.model.set_grid_bits(dict(zip(names, bits.tolist(), strict=True)))
        self.model.set_exact(True)

    def _agree(self, finished: bool) -> bool:
        """The first process's clock decides for all, and all go on with its time."""
        if self.processes > 1:
            clock = torch.tensor([float(finished), self.seconds], dtype=torch.float64, device=self.device)
            dist.broadcast(clock, 0)
            finished, self.seconds = bool(clock[0]), float(clock[1])
        return finished

    def _average_gradients(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.processes
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def progress(self) -> float:
        """Part of the schedule that is over."""
        if self.settings.steps is not None:
            return self.step / self.settings.steps
        return self.seconds / (60 * self.settings.schedule_minutes)

    def phase(self) -> Phase:
        """What the next step does."""
        s, progress = self.settings, self.progress()
        batch, crop = (s.late_batch, s.late_crop) if progress >= 0.75 else (s.batch, s.crop)
        refine = s.part in OF_SYNTHESIS or progress >= 1 - s.refine_part
        frozen = refine or (s.part == "all" and progress < s.frozen_part)
        return Phase(batch, crop, frozen, refine or s.part not in WITH_ENTROPY_MODEL)

    def learning_rate(self) -> float:
        """Linear warm-up, then cosine to zero."""
        warm = min(1.0, (self.step + 1) / self.settings.warm_up_steps)
        return self.settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))

    def objective(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The loss of the part that is trained, of what :meth:`train_step` gives it."""
        if self.settings.part == "context":
            return self.rate_loss
        if self.settings.part == "refinement":
            return self.refinement_loss
        return self.loss if self.encoder is None else self.error_loss

    def loss(self, x: Tensor, code: Tensor, frozen: bool, refine: bool) -> tuple[Tensor, Tensor]:
        """Loss of pixels x (B, H, W, 3) and metrics (loss, bpp, bpp of z, distortion, 1)."""
        worth = self._worth(x) if refine else None
        with self.autocast():
            out = self.model(
                x,
                code,
                frozen_latents=frozen,
                optimised_rounding=refine,
                worth=worth,
                corrections=DISTORTIONS[self.settings.tune].in_training,
                quantiser=self.settings.quantiser,
                choose=None if self.model.dependent is None else self._choose,
            )
        return _weighted(out.y_bits, out.z_bits, self._distortion(out.x_hat, x), code, x.shape[1] * x.shape[2])

    def error_loss(self, x: Tensor, latents: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`loss`, of dequantised latents (B, h, w, M) that stay as they are; their bits are left out."""
        with self.autocast():
            x_hat = self.model.synthesis(latents, code)
        distortion = self._distortion(x_hat, x)
        nothing = torch.zeros_like(distortion)
        return _weighted(nothing, nothing, distortion, code, x.shape[1] * x.shape[2])

    def refinement_loss(self, x: Tensor, latents: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`error_loss`: the error relative to that without a refinement, so that all qualities count alike.

        Refined pixels beyond the range of samples count as they are, which keeps a gradient.
        """
        with self.autocast():
            plain, x_hat = self.model.plain_and_refined(latents, code)
        before, distortion = self._distortion(plain, x), self._distortion(x_hat, x)
        loss = (distortion / (before + NEGLIGIBLE * step_of(code).square())).mean()
        nothing = torch.zeros_like(loss)
        return loss, torch.stack([loss, nothing, nothing, distortion.mean(), loss.new_ones(())]).detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _choose(self, y: Tensor, z: Tensor, code: Tensor, worth: Tensor | None) -> tuple[Tensor, Tensor]:
        """Dependent quantisation with the entropy model, which stays as it is."""
        return quantised(self.model, y, z, code, worth)

    @torch.no_grad()
    def _worth(self, x: Tensor) -> Tensor | None:
        """Of the errors of the latents of pixels x, for rounding, as :meth:`CodecModel.rounded` wants it."""
        if DISTORTIONS[self.settings.tune].is_squared_error:
            return None
        return DISTORTIONS[self.settings.tune].weight(self.model.shortcut, (x + 0.5) * 255)

    def _distortion(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Of each image, (B,), both in pixels -0.5..0.5."""
        shown, seen = (x_hat + 0.5) * 255, (x + 0.5) * 255
        if self.settings.tune == "psnr":
            return (shown - seen).square().mean(dim=(1, 2, 3))
        return MS_SSIM_WORTH * (1 - ms_ssim(shown, seen))

    def rate_loss(self, y_hat: Tensor, z: Tensor, code: Tensor, halves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`loss`, of latents that cost bits only, as :meth:`CodecModel.rate` wants them."""
        with self.autocast():
            y_bits, z_bits = self.model.rate(y_hat, z, code, halves)
        pixels = y_hat.shape[1] * y_hat.shape[2] * DOWNSAMPLING**2
        return _weighted(y_bits, z_bits, torch.zeros_like(y_bits), code, pixels)

    def train_step(self, source: Pictures | StoredLatents, loss_of: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        """One optimiser step; returns the metrics of :meth:`loss`."""
        s = self.settings
        batch, crop, frozen, refine = self.phase()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            # The decoder shares these with the analysis: without rate in their gradient they would run away.
            held = frozen and group["name"] in ("shortcut", "log_gain")
            group["lr"] = 0.0 if held else self.learning_rate() * group["factor"]
        inputs: tuple[Any, ...]
        if isinstance(source, StoredLatents):
            crop = source.side
            inputs = source.batch(batch, self.generator)
        elif self.encoder is not None:
            inputs = self._encoded(source, self.encoder, batch, crop)
        else:
            x, code = self._sample(source, batch, crop)
            if s.part == "context":
                with self.autocast():
                    inputs = (*self.latents(x, code), code)
            else:
                inputs = (x, code, frozen, refine)
        loss, metrics = loss_of(*inputs)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        if self.processes > 1:
            self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.pixels += self.processes * batch * crop * crop
        decay = min(s.ema, 1 - 1 / (1 + 0.1 * (self.step + 1)))
        with torch.no_grad():
            trained = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
            torch._foreach_lerp_([self.average[k] for k in trained], list(trained.values()), 1 - decay)
        return metrics

    def _sample(self, pictures: Pictures, batch: int, crop: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, H, W, 3) and their codes (B,)."""
        parts = {"chroma_part": self.settings.chroma_part, "pattern_part": self.settings.pattern_part}
        return sample(pictures, batch, crop, self.generator, **parts)

    def _encoded(self, pictures: Pictures, encoder: CodecModel, batch: int, crop: int) -> tuple[Tensor, ...]:
        """Pixels, what a decoder gets for them, and codes, each batch in ENCODED_USES steps, ENCODED apart.

        Encoding costs more than what is learnt from it.
        """
        turn, place = divmod(self.step, ENCODED)
        known = place in self.encoded and self.encoded[place][0].shape[:2] == (batch, crop)
        if not known or turn % ENCODED_USES == place % ENCODED_USES:
            x, code = self._sample(pictures, batch, crop)
            worth, corrections = self._worth(x), DISTORTIONS[self.settings.tune].corrections
            with self.autocast():
                to_quantise = ToQuantise.of(encoder, x, code, worth, corrections)
            self.encoded[place] = x, quantised(encoder, *to_quantise, worth)[1], code
        return self.encoded[place]

    @torch.no_grad()
    def fit_shortcut(self, pictures: Pictures) -> None:
        """Choose the shortcut's basis from the covariance of lapped coefficients of random crops."""
        lapped = torch.from_numpy(lapped_basis(DOWNSAMPLING)).float()
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        covariance, count = np.zeros((768, 768)), 0
        for _ in range(64):
            for pool in pictures.pools:
                x = pool.crops(8, FIT_CROP, generator).cpu().float() / 255 - 0.5
                blocks = space_to_depth(x, DOWNSAMPLING).unflatten(-1, (16, 16, 3))
                four = torch.stack([blocks[:, i : i + 8, j : j + 8] for i in (0, 1) for j in (0, 1)], dim=3)
                four = four.unflatten(3, (2, 2)).permute(0, 1, 2, 3, 5, 4, 6, 7).reshape(8, 8, 8, 32, 32, 3)
                y = torch.einsum("kp,lq,bijpqc->bijklc", lapped, lapped, four).reshape(-1, 768).double()
                covariance += (y.T @ y).numpy()
                count += len(y)
        variance = self.model.shortcut.set_basis(covariance / count).clip(min=MIN_VARIANCE)
        self.model.sigma.copy_(torch.from_numpy(np.sqrt(variance)))
        if self.processes > 1:
            for tensor in self.model.state_dict().values():
                dist.broadcast(tensor, 0)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.fresh = False


def _weighted(y_bits: Tensor, z_bits: Tensor, distortion: Tensor, code: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    bpp = (y_bits + z_bits) / pixels
    weight = lambda_of(code)
    cost = (bpp + weight * distortion) * weight**-LOSS_EXPONENT
    loss = (cost * (MAX_COST / cost.detach()).clamp(max=1)).mean() / 10
    metrics = torch.stack([loss, bpp.mean(), z_bits.mean() / pixels, distortion.mean(), loss.new_ones(())])
    return loss, metrics.detach()


def read_state(path: Path) -> dict[str, Any]:
    """What :meth:`Trainer.save` wrote, on the CPU. Raises LicError on a state of another version."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("version") != STATE_VERSION:
        raise LicError(f"{path}: state version {state.get('version')}, this lic needs {STATE_VERSION}")
    return state


def _stored(dependent: Dependent | None) -> dict[str, Tensor] | None:
    """As tensors, which is all that is read back from a state."""
    if dependent is None:
        return None
    arrays = {"offsets": dependent.offsets, "trellis": dependent.trellis} | dependent.tables.to_arrays()
    if dependent.neighbours is not None:
        arrays |= {NEIGHBOURS + name: array for name, array in vars(dependent.neighbours).items()}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return tensors | {"chains": torch.tensor([-1 if n is None else n for n in astuple(dependent.chains)])}


def _dependent(state: dict[str, Any]) -> Dependent | None:
    """What :func:`_stored` was given."""
    if state["dependent"] is None:
        return None
    arrays = {name: tensor.numpy() for name, tensor in state["dependent"].items()}
    offsets, trellis, (least, large, share) = (arrays.pop(name) for name in ("offsets", "trellis", "chains"))
    chains = Chains(int(least), int(large), None if share < 0 else int(share))
    theirs = {name.removeprefix(NEIGHBOURS): arrays.pop(name) for name in list(arrays) if name.startswith(NEIGHBOURS)}
    neighbours = Neighbours(**theirs) if theirs else None
    return Dependent(Tables.from_arrays(arrays), offsets, trellis, chains, neighbours)


def averaged_model(state_path: Path) -> tuple[CodecModel, dict[str, Any]]:
    """The model with the averaged weights of a saved state, on the CPU, and the state's bookkeeping.

    Raises LicError on a state of another version.
    """
    state = read_state(state_path)
    model = CodecModel(Config.from_json(state["config"]))
    if state["settings"]["part"] in WITH_ADAPTERS:
        model.adapt(state["settings"]["rank"])
    model.load_state_dict(state["average"])
    model.quantise(_dependent(state))
    if state["grids"] is not None:
        model.set_grid_bits(state["grids"])
        model.set_exact(True)
    return model.eval(), {k: state[k] for k in ("settings", "step", "seconds", "pixels")}


def append_log(path: Path) -> Callable[[dict[str, Any]], None]:
    """A function that appends one JSON line per call."""

    def write(entry: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    return write
