"""Hyperprior (Ballé et al. 2018): h_a makes z, h_s turns its rounded value into features psi; the prior of z."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lic.exact import Fixed, Grid, Linear, QualityTable
from lic.model.config import Config
from lic.model.layers import NARROW, WIDE, PlainResidual, depth_to_space, leaky, space_to_depth
from lic.model.non_local import NonLocal
from lic.quality import MAX_CODE

Z_LIMIT = 63  # |z| is clamped to it
Z_GAIN = 32.0  # makes a fresh z span more than one integer: one that rounds to zero everywhere never learns


class HyperAnalysis(nn.Module):
    """h_a: context inputs of the unquantised latents (B, h, w, 2·M), code (B,) -> z (B, h/4, w/4, hyper_latent)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hyper_width
        self.first = nn.Linear(2 * config.latent, width)
        self.quality = QualityTable(config.knots, width)
        self.block16 = PlainResidual(width)
        self.down32 = nn.Linear(4 * width, width)
        self.block32 = PlainResidual(width)
        self.down64 = nn.Linear(4 * width, width)
        self.block64 = PlainResidual(width)
        self.non_local = NonLocal(width, config.non_local_heads) if config.non_local_heads else None
        self.last = nn.Linear(width, config.hyper_latent)
        self.floating = Grid(WIDE)  # the encoder's half is never exact

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        x = self.first(x) + self.quality(code)[:, None, None].to(x.dtype)
        x = self.down32(space_to_depth(leaky(self._block(self.block16, x)), 2))
        x = self.down64(space_to_depth(leaky(self._block(self.block32, x)), 2))
        x = self._block(self.block64, x)
        if self.non_local is not None:
            x = self._block(self.non_local, x)
        return (Z_GAIN * self.last(leaky(x)).float()).clamp(-Z_LIMIT, Z_LIMIT)

    def _block(self, block: PlainResidual | NonLocal, x: Tensor) -> Tensor:
        return block(Fixed(x), self.floating).x


class HyperSynthesis(nn.Module):
    """h_s: integer z (B, h, w, hyper_latent), code (B,) -> psi (B, 4·h, 4·w, psi). Part of the entropy path."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hyper_width
        half = width // 2
        self.first = Linear(config.hyper_latent, width)
        self.quality = QualityTable(config.knots, width)
        self.non_local = NonLocal(width, config.non_local_heads) if config.non_local_heads else None
        self.block64 = PlainResidual(width)
        self.up32 = Linear(width, 4 * width)
        self.block32 = PlainResidual(width)
        self.up16 = Linear(width, 4 * half)
        self.block16 = PlainResidual(half)
        self.last = Linear(half, config.psi)
        self.wide64, self.wide32, self.wide16 = (Grid(WIDE) for _ in range(3))
        self.narrow64, self.narrow32, self.narrow16 = (Grid(NARROW) for _ in range(3))
        self.psi = Grid(NARROW)

    def forward(self, z: Tensor, code: Tensor) -> Fixed:
        x = self.first(Fixed(z, 0, Z_LIMIT), self.wide64)
        quality = self.quality.fixed(code, self.wide64)
        x = self.wide64.add(x, quality._replace(x=quality.x[:, None, None]))
        if self.non_local is not None:
            x = self.non_local(x, self.wide64)
        x = _doubled(self.up32(self.narrow64(self.block64(x, self.wide64)), self.wide32))
        x = _doubled(self.up16(self.narrow32(self.block32(x, self.wide32)), self.wide16))
        return self.last(self.narrow16(self.block16(x, self.wide16)), self.psi)


def _doubled(v: Fixed) -> Fixed:
    return v._replace(x=depth_to_space(v.x, 2))


class HyperPrior(nn.Module):
    """Prior of z: a mixture of three logistics per quality bucket and channel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = (config.hyper_buckets, config.hyper_latent, 3)
        self.mean = nn.Parameter(torch.linspace(-1, 1, 3).expand(shape).clone())
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.logit = nn.Parameter(torch.zeros(shape))

    def bucket(self, code: Tensor) -> Tensor:
        """Quality bucket (B,) of code (B,)."""
        buckets = self.mean.shape[0]
        return (code.long() * buckets // (MAX_CODE + 1)).clamp(0, buckets - 1)

    def bits(self, z: Tensor, code: Tensor, constant: bool = False) -> Tensor:
        """-log2 of the probability of the unit interval around each z (B, h, w, C).

        With ``constant`` the prior's own parameters get no gradient.
        """
        bucket = self.bucket(code)
        parameters = (p.detach() if constant else p for p in (self.mean, self.log_scale, self.logit))
        mean, log_scale, logit = (p[bucket][:, None, None] for p in parameters)
        return -torch.log2(_mass(z.unsqueeze(-1), mean, log_scale, logit).clamp(min=1e-9))

    @torch.no_grad()
    def pmf(self) -> Tensor:
        """Probabilities (buckets, C, 2·Z_LIMIT + 1) of the integers -Z_LIMIT..Z_LIMIT."""
        z = torch.arange(-Z_LIMIT, Z_LIMIT + 1, dtype=torch.float64)[:, None]
        mean, log_scale, logit = (p.double().unsqueeze(2) for p in (self.mean, self.log_scale, self.logit))
        return _mass(z, mean, log_scale, logit)


def _mass(z: Tensor, mean: Tensor, log_scale: Tensor, logit: Tensor) -> Tensor:
    inverse = torch.exp(-log_scale.clamp(-4, 4))
    upper, lower = torch.sigmoid((z + 0.5 - mean) * inverse), torch.sigmoid((z - 0.5 - mean) * inverse)
    return (torch.softmax(logit, dim=-1) * (upper - lower)).sum(dim=-1)
