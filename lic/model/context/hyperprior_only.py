"""No context at all: every latent from the hyperprior alone, in one step. The reference for every context model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lic.exact import Fixed, Grid, Linear, QualityTable
from lic.model.config import Config
from lic.model.context.base import Context, Geometry, Options, Prediction, Unit
from lic.model.layers import NARROW, WIDE, near_zero


@dataclass(frozen=True)
class HyperpriorOptions(Options):
    """Sizes of the model."""

    width: int


class AllAtOnce:
    """One step, one stream: all latents, in the order (row, column, channel)."""

    def steps(self, geometry: Geometry) -> int:
        return 1

    def stream_of(self, step: int) -> int:
        return 0

    def first_grid(self, geometry: Geometry) -> tuple[int, int]:
        return geometry.height, geometry.width

    def take(self, y: Tensor, step: int) -> Tensor:
        return y.flatten(1, 2)

    def put(self, y: Tensor, step: int, values: Tensor) -> None:
        y.copy_(values.reshape(y.shape))


class PsiHead(nn.Module):
    """Answers for all channels from psi and the quality: two layers."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.wide, self.narrow, self.hidden = Grid(WIDE), Grid(NARROW), Grid(NARROW)
        self.quality = QualityTable(config.knots, config.psi)
        self.first = Linear(config.psi, width)
        # A fresh model predicts each channel's own standard deviation.
        self.last = near_zero(Linear(width, 2 * config.latent))

    def forward(self, psi: Fixed, code: Tensor, answer: Grid) -> Fixed:
        """psi (B, h, w, psi), code (B,) -> (B, h·w, 2·M) on ``answer``: means, then log-scales."""
        quality = self.quality.fixed(code, self.wide)
        x = self.wide.add(self.wide(psi), quality._replace(x=quality.x[:, None, None]))
        y = self.last(self.first(self.narrow(x), self.hidden, leaky=True), answer)
        return y._replace(x=y.x.flatten(1, 2))


@dataclass
class HyperpriorOnlyState:
    """prediction: (B, h·w, M), of everything."""

    prediction: Prediction


class HyperpriorOnly(Context):
    """See the module's description."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.schedule: AllAtOnce = AllAtOnce()
        self.channels = slice(0, config.latent)
        self.head = PsiHead(config, HyperpriorOptions.of(config).width)

    def start(self, psi: Fixed, geometry: Geometry, code: Tensor, unit: Unit) -> HyperpriorOnlyState:
        return HyperpriorOnlyState(unit.of(self.channels).prediction(self.head(psi, code, self.answer)))

    def predict(self, state: HyperpriorOnlyState, step: int) -> Prediction:
        return state.prediction

    def observe(self, state: HyperpriorOnlyState, step: int, y_hat: Tensor) -> HyperpriorOnlyState:
        return state

    def teacher(self, psi: Fixed, y_hat: Tensor, code: Tensor, unit: Unit) -> Prediction:
        whole = self.start(psi, Geometry(*y_hat.shape[:3]), code, unit).prediction
        return Prediction(*(part.reshape(y_hat.shape) for part in whole))
