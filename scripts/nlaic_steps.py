"""Sequential steps of NLAIC in raster order, row by row and in wavefronts, and how long the wavefronts take.

Usage: python scripts/nlaic_steps.py [--size 768x512] [--channels 192,320] [--threads 1]

Random weights; the latents are drawn from what a fresh network predicts. The time depends on neither, but for the
arithmetic coder, whose part grows with the rate.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import torch

from lic.model import store
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS, DOWNSAMPLING, HYPER_DOWNSAMPLING
from lic.model.context import Geometry
from lic.model.context.nlaic import LAG
from lic.pipeline.tile import Latents, Reader, Writer, code_tiles
from lic.quality import code_of

STREAMS = 8


def model_of(channels: int) -> store.LoadedModel:
    """The transforms and hyperprior of `base` for so many latent channels, NLAIC as its context model."""
    slices = [channels // STREAMS + (i < channels % STREAMS) for i in range(STREAMS)]
    context = {"slices": slices, "filters": 24, "features": 8, "widths": [64, 96]}
    config = replace(CONFIGS["base"], name="nlaic", latent=channels, system="nlaic", context=context)
    torch.manual_seed(0)
    net = CodecModel(config).eval().requires_grad_(False)
    net.sigma.copy_(2 / torch.arange(1, channels + 1))
    with net.calibration():
        z, y = latents(net, Geometry(1, 8, 8), 0)
        net.predict(z, torch.round(y), torch.zeros(1))
    net.freeze()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nlaic.safetensors"
        store.write_model(path, net, {"provenance": {}})
        return store.load_file(store.read_info(path))


def latents(net: CodecModel, geometry: Geometry, code: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, y), y not rounded."""
    config, (batch, h, w) = net.config, (geometry.batch, geometry.height, geometry.width)
    z = torch.round(torch.randn(batch, h // 4, w // 4, config.hyper_latent))
    return z, torch.randn(batch, h, w, config.latent) * net.gain(torch.tensor([code])) * net.sigma


def best_of(repeat: int, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds that pass, and seconds of CPU time, which other work on the machine changes less."""
    clocks = (time.perf_counter, time.process_time)
    times = []
    for _ in range(repeat):
        start = [clock() for clock in clocks]
        run()
        times.append([clock() - t for clock, t in zip(clocks, start, strict=True)])
    wall, cpu = (min(column) for column in zip(*times, strict=True))
    return wall, cpu


class Run(NamedTuple):
    """Seconds that pass, and seconds of CPU time, for a whole picture."""

    wall: float
    cpu: float


class Measurement(NamedTuple):
    """Wavefronts of one picture: their streams, and how many steps these hold, the bytes, and the time of each part."""

    steps: int
    held: list[int]
    bytes: int
    runs: dict[str, Run]

    @property
    def seconds_a_step(self) -> dict[str, float]:
        return {name: run.wall / self.steps for name, run in self.runs.items()}


def counts(height: int, width: int, channels: int) -> dict[str, int]:
    """Sequential steps for latents (height, width, channels) by order."""
    wavefronts = height + LAG * (channels - 1)
    return {"raster order": height * width * channels, "row by row": height * channels, "wavefronts": wavefronts}


@torch.no_grad()
def measure(model: store.LoadedModel, z: torch.Tensor, y: torch.Tensor, code: int, repeat: int) -> Measurement:
    """Integers z (1, h/4, w/4, C) and y (1, h, w, M) in wavefronts. Raises ClickException if they do not come back."""
    net, schedule, geometry = model.net, model.net.context.schedule, Geometry(*y.shape[:3])
    steps = schedule.steps(geometry)
    known = Latents(z, y)
    codes = torch.tensor([code])
    psi, unit = net.h_s(z, codes), net.unit(codes)

    def context() -> None:
        state = net.context.start(psi, geometry, codes, unit)
        for step in range(steps):
            net.context.predict(state, step)
            state = net.context.observe(state, step, schedule.take(y, step))

    def encode() -> list[bytes]:
        writer = Writer()
        code_tiles(model, geometry, [code], [writer], known)
        return writer.streams

    streams = encode()

    def decode() -> Latents:
        return code_tiles(model, geometry, [code], [Reader(tuple(streams))], None).latents

    if not torch.equal(decode().y, known.y):
        raise click.ClickException("the latents do not come back")
    held = Counter(schedule.stream_of(step) for step in range(steps))
    ways: dict[str, Callable[[], object]] = {"context alone": context, "encoding": encode, "decoding": decode}
    runs = {name: Run(*best_of(repeat, run)) for name, run in ways.items()}
    return Measurement(steps, list(held.values()), sum(map(len, streams)), runs)


@click.command()
@click.option("--size", default="768x512", show_default=True, help="Picture size, WIDTHxHEIGHT.")
@click.option("--channels", default="192,320", show_default=True, help="Latent channels.")
@click.option("--quality", default=45.0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--repeat", default=3, show_default=True)
@click.option("--counts", "only_counts", is_flag=True, help="Only count.")
def main(size: str, channels: str, quality: float, threads: int, repeat: int, only_counts: bool) -> None:
    torch.set_num_threads(threads)
    width, height = (int(n) for n in size.split("x"))
    per_hyper = HYPER_DOWNSAMPLING // DOWNSAMPLING
    h, w = (per_hyper * -(-n // HYPER_DOWNSAMPLING) for n in (height, width))
    code = code_of(quality)
    click.echo(f"{width}x{height}: {h} x {w} latent positions; {threads} threads, torch {torch.__version__}")
    for count in (int(n) for n in channels.split(",")):
        raster, rows, wavefronts = counts(h, w, count).values()
        click.echo(f"M = {count}: {raster} steps in raster order, {rows} row by row, {wavefronts} wavefronts")
        if not only_counts:
            model = model_of(count)
            z, y = latents(model.net, Geometry(1, h, w), code)
            show(measure(model, z, torch.round(y), code, repeat), h * w * DOWNSAMPLING**2, repeat)


def show(found: Measurement, pixels: int, repeat: int) -> None:
    steps, held, size, runs = found
    span = f"{min(held)} to {max(held)}"
    click.echo(f"  {steps} steps in {len(held)} streams of {span}, {8 * size / pixels:.2f} bpp")
    for name, (wall, cpu) in runs.items():
        a_step = f"{1000 * wall / steps:.2f} ms a step"
        click.echo(f"  {name:>13}: {wall:.2f} s, {a_step}; {cpu:.2f} s of CPU time (best of {repeat})")


if __name__ == "__main__":
    main()
