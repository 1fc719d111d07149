"""Patterns that photographs do not have: fine stripes and checks, noise of two colours, dithering, waves.

Without them in training, the synthesis once answered latents of such strength with numbers without bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CELLS = (1, 1, 1, 2, 3, 4, 8, 16)  # sides of a pattern's cells in pixels, one of them for each crop
_DIRECTIONS = ((1, 0), (0, 1), (1, 1))  # in which stripes change: down, across, both, which makes them checks
BAYER = ((0, 8, 2, 10), (12, 4, 14, 6), (3, 11, 1, 9), (15, 7, 13, 5))  # thresholds of ordered dithering, sixteenths


def draw_patterns(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a pattern over each of the crops, uint8 (B, S, S, 3): over all of it or over a rectangle."""
    batch, side = crops.shape[:2]
    device = crops.device

    def random(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    def one_of(values: tuple[object, ...]) -> Tensor:
        table = torch.tensor(values, device=device)
        return table[(random() * len(values)).long()]

    line = torch.arange(side, device=device)
    cell = (line // one_of(_CELLS)[:, None])[:, :, None]  # (B, S, 1), down; transposed, across
    row, column = cell, cell.transpose(1, 2)
    each = torch.arange(batch, device=device)[:, None, None]
    noise = random(side, side, 3)[each, row, column]
    noise = torch.where(random(1, 1, 1) < 0.5, noise, noise[..., :1])
    bayer = (torch.tensor(BAYER, device=device)[row % 4, column % 4].unsqueeze(-1) + 0.5) / 16
    down, across = one_of(_DIRECTIONS)[:, :, None, None].unbind(1)
    waves = random(2, 1, 1) * math.pi * line.view(1, 1, side, 1)  # up to half a cycle per pixel
    light = crops / 255
    kinds = [
        ((row * down + column * across) % 2).unsqueeze(-1).expand_as(noise),
        noise < random(1, 1, 1),
        light > noise,
        light > bayer,
        (0.5 + 0.5 * torch.sin(waves[:, 0] + waves[:, 1].transpose(1, 2))).unsqueeze(-1).expand_as(noise),
    ]
    kind = (random(1, 1, 1) * len(kinds)).long()
    amount = sum(pattern * (kind == i) for i, pattern in enumerate(kinds))
    low, high = torch.where(random(1, 1) < 0.5, random(2, 3), torch.tensor([[0.0], [1.0]], device=device)).unbind(1)
    drawn = low[:, None, None] + amount * (high - low)[:, None, None]
    start, end = (random(2, 2) * side).sort(-1).values.unbind(-1)  # of a rectangle, down and across
    whole = random(1, 1) < 0.5
    inside = (line >= start[..., None]) & (line < end[..., None])  # (B, 2, S)
    inside = whole | (inside[:, 0, :, None] & inside[:, 1, None, :])
    return torch.where(inside.unsqueeze(-1), torch.round(drawn * 255).to(torch.uint8), crops)
