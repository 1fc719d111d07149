"""What each saving of eContextformer saves: operations and time of the context model for one picture.

Usage: python scripts/econtextformer_ops.py [--size 256] [--segments 8,16,24,48] [--width 64] [--layers 2] [--threads 1]

The network has random weights and computes on integers. The first row has no parallel groups: one step for each token
in raster order, which computes the window around it; all its steps cost the same, and a part of them is measured. Each
further row adds one saving, and all of these must predict the same.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lic.exact import Fixed, arithmetic, attend, exact_arithmetic
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, DOWNSAMPLING
from lic.model.context import Geometry, Unit
from lic.model.context.attention import Windows
from lic.model.context.econtextformer import BLOCK, EContextformer, Layer, positions_of


class Measured:
    """A context model, and one picture for it."""

    def __init__(self, context: EContextformer, psi: Fixed, y: Tensor, code: Tensor, unit: Unit) -> None:
        self.context, self.psi, self.y, self.code, self.unit = context, psi, y, code, unit
        self.groups, self.geometry = context.schedule.groups, Geometry(*y.shape[:3])
        self.serial = copy.deepcopy(context)  # with one window, wherever it is
        side = context.layers[0].windows.height
        for layer in self.serial.layers:
            layer.windows = Windows(side, side // 2)

    def cached(self) -> Tensor:
        """As files are coded."""
        context = self.context
        means = torch.zeros_like(self.y)
        state = context.start(self.psi, self.geometry, self.code, self.unit)
        for step in range(len(self.groups)):
            context.schedule.put(means, step, context.predict(state, step).mean)
            state = context.observe(state, step, context.schedule.take(self.y, step))
        return means

    def recomputed(self, span: bool, skip: bool) -> Tensor:
        """Every step computes all groups, or only the ``span`` up to its own; ``skip``: attention without the first."""
        context, means = self.context, torch.zeros_like(self.y)
        tokens = context.input_tokens(self.psi, self.code)
        known = torch.zeros_like(tokens.x)
        for step in range(len(self.groups)):
            n = step + 1 if span else len(self.groups)
            x, embedding = (t._replace(x=t.x[:, :, :, :n]) for t in (tokens, tokens._replace(x=known)))
            group = torch.arange(n * context.layers[0].positions) // context.layers[0].positions
            for layer in context.layers:
                x = masked(context, layer, x, embedding, group[:, None] > group, skip)
            context.schedule.put(means, step, context.prediction(x, step, step, self.unit).mean)
            y_step = context.schedule.take(self.y, step)
            known[:, :, :, step] = context.embedding(y_step, step, self.unit).x.reshape(known[:, :, :, step].shape)
        return means

    def raster(self, steps: int) -> None:
        """The first ``steps`` tokens in raster order, all segments of a position in turn; for its cost, on zeros."""
        context, (h, w) = self.serial, self.y.shape[1:3]
        windows, segments = context.layers[0].windows, len(context.schedule.channels)
        side, number = windows.height, torch.arange(h * w * segments).reshape(1, h, w, segments)
        for step in range(steps):
            r, c = divmod(step // segments, w)
            top, left = (min(max(a, 0), b - side) for a, b in ((r - side + 1, h), (c - side // 2, w)))
            window = number[:, top : top + side, left : left + side]
            parts = [positions_of(window[..., s : s + 1], half) for s, half in self.groups]
            order = windows.cut(Fixed(torch.stack(parts, dim=3)), 1).x.flatten()
            x = context.wide.wrap(torch.zeros(1, side, side // 2, len(self.groups), context.group.shape[1]))
            for layer in context.layers:
                x = masked(context, layer, x, x, order[:, None] > order, skip=False)
            own = self.groups.index((step % segments, (r + c) % 2))
            context.prediction(x._replace(x=x.x[:, :1, :1]), 0, own, self.unit)


def masked(context: EContextformer, layer: Layer, x: Fixed, known: Fixed, mask: Tensor, skip: bool) -> Fixed:
    """A layer on the first groups x (B, h, w/2, n, d) at once: ``mask`` (n·P, n·P) says what a token attends to."""
    attention, wide, first, n = layer.attention, context.wide, int(skip), x.x.shape[3]
    later = x._replace(x=x.x[:, :, :, first:])
    if n > first:
        q = layer.cut(attention.q(attention.narrow(later), attention.q_grid))
        token = wide.add(x, known)
        k, v = layer.keys_and_values(token._replace(x=token.x[:, :, :, : n - first]))
        queries, keys = slice(first * layer.positions, None), slice(0, (n - first) * layer.positions)
        allowed, inside = mask[queries, keys], layer.windows.inside(x.x)
        if inside is not None:
            allowed = allowed & inside.repeat(1, 1, n - first)[:, :, None, None]
        bias = layer.bias[layer.index[: len(mask), : len(mask)][queries, keys]].permute(2, 0, 1)
        y = attend(q, k, v, bias, allowed, wide.exact, BLOCK)
        y = y._replace(x=y.x.unflatten(4, (n - first, -1)).transpose(3, 4))
        attended = wide.add(later, attention.out(layer.windows.join(y, later.x.shape), wide)).x
        start = [x.x[:, :, :, :1], attended if skip else attended[:, :, :, 1:]]
        x = x._replace(x=torch.cat(start, dim=3))
    return layer.feed(x, wide)


class Row(NamedTuple):
    """One way of computing all steps; ``seconds`` is None where only operations are counted."""

    name: str
    steps: int
    attention: float  # products inside attention, thousand multiply-adds per pixel
    linear: float  # everything else
    seconds: float | None


class Comparison(NamedTuple):
    """``raster_steps``: how many of them were measured; ``same``: whether all other rows predict the same."""

    rows: list[Row]
    raster_steps: int
    same: bool


@torch.no_grad()
def compare(measured: Measured, raster_steps: int, repeat: int) -> Comparison:
    """From the most expensive way to the cheapest one; the best time of ``repeat``, which may be 0."""
    h, w = measured.y.shape[1:3]
    tokens = h * w * len(measured.context.schedule.channels)
    part = min(raster_steps, tokens)
    groups = len(measured.groups)
    ways: list[tuple[str, int, float, Callable[[], Tensor | None]]] = [
        ("raster order", tokens, tokens / part, lambda: measured.raster(part)),
        ("groups, all of them at every step", groups, 1, lambda: measured.recomputed(span=False, skip=False)),
        ("+ only groups coded so far", groups, 1, lambda: measured.recomputed(span=True, skip=False)),
        ("+ first group skipped", groups, 1, lambda: measured.recomputed(span=True, skip=True)),
        ("+ keys and values kept", groups, 1, measured.cached),
    ]
    rows, answers = [], []
    with exact_arithmetic():
        for name, steps, factor, run in ways:
            with FlopCounterMode(display=False) as counter, _counting_attention() as attention:
                answers.append(run())
            counts = sum(attention), counter.get_total_flops() / 2 - sum(attention)
            products, linear = (n * factor / (h * w * DOWNSAMPLING**2) / 1000 for n in counts)
            seconds = factor * min(_timed(run) for _ in range(repeat)) if repeat else None
            rows.append(Row(name, steps, products, linear, seconds))
    same = all(a is not None and torch.equal(a, answers[-1]) for a in answers[1:])
    return Comparison(rows, part, same)


@click.command()
@click.option("--size", default=256, show_default=True, help="Side of the picture in pixels, a multiple of 64.")
@click.option("--segments", default="8,16,24,48", show_default=True, help="Channels of each segment.")
@click.option("--order", default="spatial", show_default=True)
@click.option("--width", default=64, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--window", default=8, show_default=True)
@click.option("--raster-steps", default=32, show_default=True, help="Steps in raster order that are measured.")
@click.option("--threads", default=1, show_default=True)
@click.option("--repeat", default=3, show_default=True)
def main(size: int, segments: str, raster_steps: int, threads: int, repeat: int, **options: Any) -> None:
    if size % 64 or size < DOWNSAMPLING * options["window"]:
        raise click.UsageError("the size must be a multiple of 64, and at least a window")
    torch.set_num_threads(threads)
    measured = _measured(size // DOWNSAMPLING, {"segments": [int(n) for n in segments.split(",")], **options})
    parameters = sum(p.numel() for p in measured.context.parameters())
    click.echo(f"{size}x{size}, {parameters} parameters, {threads} threads, torch {torch.__version__}")
    click.echo(f"{'':34} {'steps':>6} {'attention':>10} {'linear':>10} kMAC/px {'time':>9} s")
    found = compare(measured, raster_steps, repeat)
    for row in found.rows:
        click.echo(f"{row.name:34} {row.steps:6} {row.attention:10.4f} {row.linear:10.4f}         {row.seconds:9.3f}")
    click.echo(
        f"raster order: {found.raster_steps} of its steps measured; "
        f"the others predict {'the same' if found.same else 'DIFFERENTLY'}"
    )
    if not found.same:
        raise SystemExit(1)


@contextlib.contextmanager
def _counting_attention() -> Iterator[list[int]]:
    """A list that grows by the multiply-adds of every matrix product inside attention."""
    plain, counts = arithmetic.matmul, []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        counts.append(a.numel() * b.shape[-1])
        return plain(a, b)

    arithmetic.matmul = counted
    try:
        yield counts
    finally:
        arithmetic.matmul = plain


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def _measured(side: int, options: dict[str, Any]) -> Measured:
    torch.manual_seed(0)
    config = replace(CONFIGS["tiny"], latent=sum(options["segments"]), system="econtextformer", context=options)
    net = CodecModel(config).eval().requires_grad_(False)
    for parameter in net.context.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    z = torch.round(torch.randn(1, side // 4, side // 4, config.hyper_latent) * 3)
    y = torch.round(torch.randn(1, side, side, config.latent) * 3)
    code = torch.tensor([22_500])
    with net.calibration():
        net.predict(z, y, code)
    net.freeze()
    assert isinstance(net.context, EContextformer)
    return Measured(net.context, net.h_s(z, code), y, code, net.unit(code))


if __name__ == "__main__":
    main()
