"""How much the attention cache saves: decode the groups of a picture with it, and recomputing every step without.

Usage: python scripts/context_speed.py [--model base] [--size 768x512] [--threads 2]
"""

from __future__ import annotations

import time

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from lic.model import store
from lic.model.context import Geometry


@click.command()
@click.option("--model", default="base", show_default=True)
@click.option("--size", default="768x512", show_default=True, help="Picture size, WIDTHxHEIGHT, multiples of 64.")
@click.option("--threads", default=2, show_default=True)
@click.option("--repeat", default=5, show_default=True)
def main(model: str, size: str, threads: int, repeat: int) -> None:
    torch.set_num_threads(threads)
    net = store.load(model).net
    width, height = (int(n) // 16 for n in size.split("x"))
    config, context = net.config, net.context
    geometry = Geometry(1, height, width)
    torch.manual_seed(0)
    code = torch.tensor([22_500])
    z = torch.round(torch.randn(1, height // 4, width // 4, config.hyper_latent))
    psi, unit = net.h_s(z, code), net.unit(code)
    y = torch.round(torch.randn(1, height, width, config.latent))

    def cached() -> torch.Tensor:
        state = context.start(psi, geometry, code, unit)
        means = torch.zeros_like(y)
        for step in range(context.schedule.steps(geometry)):
            context.schedule.put(means, step, context.predict(state, step).mean)
            state = context.observe(state, step, context.schedule.take(y, step))
        return means

    def recomputed() -> torch.Tensor:
        known, means = torch.zeros_like(y), torch.zeros_like(y)
        for step in range(context.schedule.steps(geometry)):
            mean = context.teacher(psi, known, code, unit).mean
            context.schedule.put(means, step, context.schedule.take(mean, step))
            context.schedule.put(known, step, context.schedule.take(y, step))
        return means

    with torch.no_grad():
        difference = (cached() - recomputed()).abs().max()
        click.echo(
            f"{model}, {size}, {context.schedule.steps(geometry)} steps, {threads} threads, torch {torch.__version__}"
        )
        click.echo(f"largest difference of a predicted mean: {difference:.2g} quantiser steps")
        for name, run in (("cached", cached), ("recomputed", recomputed)):
            with FlopCounterMode(display=False) as counter:
                run()
            times = []
            for _ in range(repeat):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            macs = counter.get_total_flops() / 2 / (256 * height * width) / 1000
            click.echo(f"{name:>10}: {min(times):.3f} s (best of {repeat}), {macs:.1f} kMAC/px")


if __name__ == "__main__":
    main()
