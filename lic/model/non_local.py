"""Non-local attention modules of NLAIC (Chen et al. 2021, arXiv 1910.06244).

v + trunk(v)·gate(v): the gate is computed from v and from what v attends to. Attention stays inside blocks of 16x16
positions that are aligned to the grid: at most 256 keys, memory linear in the picture, and windows of a large picture
that never cut a block compute what the whole picture would. In the paper it spans the whole picture, with pooled keys.

The gate is clamp(1/2 + mask, 0, 1), where the paper has a sigmoid: so the same module is exact in integers in h_s.
"""

from __future__ import annotations

from torch import nn

from lic.exact import ACCUMULATOR, Depthwise, Fixed, Grid, Linear, attend
from lic.exact.tables import EXP_LIMIT
from lic.model.context.attention import ATTENTION, Attention, Windows
from lic.model.layers import NARROW, near_zero

BLOCK = 16  # side, in positions: 256 pixels in g_a and g_s, 1024 pixels in h_a and h_s
GATE_BITS = 10  # the gate is a multiple of 1/1024
KEYS_AT_A_TIME = ACCUMULATOR // (EXP_LIMIT * ATTENTION)  # whose weighted sums stay exact


class NonLocal(nn.Module):
    """See the module's description. A fresh one changes nothing: its trunk ends in zeros."""

    def __init__(self, width: int, heads: int) -> None:
        """Raises ValueError if half of ``width`` cannot be shared among the heads."""
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"{heads} heads of non-local attention for {width} channels")
        self.blocks = Windows(BLOCK, BLOCK)
        self.narrow, self.hidden, self.mixed, self.branch, self.joined = (Grid(NARROW) for _ in range(5))
        self.gate = Grid(1 << (GATE_BITS - 1), bits=GATE_BITS)
        self.inner = Linear(width, width)
        self.spatial = Depthwise(width)
        nn.init.normal_(self.spatial.weight, std=0.1)
        self.spatial.weight.data[1, 1] += 1
        self.outer = Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.attention = Attention(width, heads, width // 2)
        self.mask = near_zero(Linear(width, width))

    def forward(self, v: Fixed, wide: Grid) -> Fixed:
        """v (B, H, W, C) on the grid ``wide`` of the residual sum, and so the result."""
        x = self.spatial(self.inner(self.narrow(v), self.hidden, leaky=True), self.mixed)
        trunk = self.outer(x, self.branch)
        mask = self.mask(self.joined(self._attended(v, wide)), self.gate)
        one = 2.0**mask.bits
        gate = (mask.x + one / 2).clamp(0, one)
        return wide.add(v, wide(Fixed(trunk.x * gate, trunk.bits + mask.bits)))

    def _attended(self, v: Fixed, wide: Grid) -> Fixed:
        """v plus what each position attends to in its block."""
        tokens = v._replace(x=v.x.unsqueeze(3))
        q, k, value = (self.blocks.cut(part, self.attention.heads) for part in self.attention.project(tokens))
        inside = self.blocks.inside(v.x)
        mask = None if inside is None else inside[:, :, None, None, None]
        y = attend(q, k, value, q.x.new_zeros(()), mask, wide.exact, block=KEYS_AT_A_TIME)
        y = self.blocks.join(y, tokens.x.shape)
        return wide.add(v, self.attention.out(y._replace(x=y.x.squeeze(3)), wide))
