"""How much the attention cache saves: decode the groups of a picture with it, and recomputing every step without.

Usage: python scripts/context_speed.py [--model base] [--size 768x512] [--threads 2]
"""

from __future__ import annotations

import time
from typing import NamedTuple

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from lic.model import store
from lic.model.codec import CodecModel
from lic.model.config import DOWNSAMPLING
from lic.model.context import Geometry


class Comparison(NamedTuple):
    """``difference``: the largest one of a predicted mean, in quantiser steps; ``seconds`` and ``kmac`` by way."""

    steps: int
    difference: float
    seconds: dict[str, float]
    kmac: dict[str, float]  # thousand multiply-adds per pixel


@torch.no_grad()
def compare(net: CodecModel, z: torch.Tensor, y: torch.Tensor, code: int, repeat: int) -> Comparison:
    """All steps of the context model for integers z (1, h/4, w/4, C), y (1, h, w, M); the best time of ``repeat``."""
    context, geometry, codes = net.context, Geometry(*y.shape[:3]), torch.tensor([code])
    psi, unit = net.h_s(z, codes), net.unit(codes)
    steps = context.schedule.steps(geometry)

    def cached() -> torch.Tensor:
        state = context.start(psi, geometry, codes, unit)
        means = torch.zeros_like(y)
        for step in range(steps):
            context.schedule.put(means, step, context.predict(state, step).mean)
            state = context.observe(state, step, context.schedule.take(y, step))
        return means

    def recomputed() -> torch.Tensor:
        known, means = torch.zeros_like(y), torch.zeros_like(y)
        for step in range(steps):
            mean = context.teacher(psi, known, codes, unit).mean
            context.schedule.put(means, step, context.schedule.take(mean, step))
            context.schedule.put(known, step, context.schedule.take(y, step))
        return means

    ways = {"cached": cached, "recomputed": recomputed}
    means, seconds, kmac = {}, {}, {}
    for name, run in ways.items():
        with FlopCounterMode(display=False) as counter:
            means[name] = run()
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
        kmac[name] = counter.get_total_flops() / 2 / (y.shape[1] * y.shape[2] * DOWNSAMPLING**2) / 1000
    difference = float((means["cached"] - means["recomputed"]).abs().max())
    return Comparison(steps, difference, seconds, kmac)


@click.command()
@click.option("--model", default="base", show_default=True)
@click.option("--size", default="768x512", show_default=True, help="Picture size, WIDTHxHEIGHT, multiples of 64.")
@click.option("--threads", default=2, show_default=True)
@click.option("--repeat", default=5, show_default=True)
def main(model: str, size: str, threads: int, repeat: int) -> None:
    torch.set_num_threads(threads)
    net = store.load(model).net
    width, height = (int(n) // DOWNSAMPLING for n in size.split("x"))
    torch.manual_seed(0)
    z = torch.round(torch.randn(1, height // 4, width // 4, net.config.hyper_latent))
    y = torch.round(torch.randn(1, height, width, net.config.latent))
    found = compare(net, z, y, 22_500, repeat)
    click.echo(f"{model}, {size}, {found.steps} steps, {threads} threads, torch {torch.__version__}")
    click.echo(f"largest difference of a predicted mean: {found.difference:.2g} quantiser steps")
    for name, seconds in found.seconds.items():
        click.echo(f"{name:>10}: {seconds:.3f} s (best of {repeat}), {found.kmac[name]:.1f} kMAC/px")


if __name__ == "__main__":
    main()
