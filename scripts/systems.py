"""All context models in one table: bits on the same latents, work, time and memory, and what their papers claim.

Measures every section that is asked for, keeps the numbers in a JSON file (results/NAME.json beside the page), and
writes the page from all that this file then holds. Without sections (--sections "") it writes the page only.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import context_speed
import econtextformer_ops
import nlaic_steps
import numpy as np
import systems_page
import torch
from tqdm import tqdm

from lic import atomic, pipeline
from lic.bench import systems
from lic.bench.bdrate import bd_rate
from lic.bench.codec import open_codec
from lic.bench.measure import environment
from lic.bench.metrics import Pixels
from lic.bench.pictures import Picture, find
from lic.exact import exact_arithmetic
from lic.model import store
from lic.model.codec import CodecModel
from lic.model.context import Context, Geometry
from lic.model.context.econtextformer import EContextformer
from lic.model.context.msp import MSP
from lic.model.context.nlaic import Nlaic
from lic.pipeline.codec import latent_boxes
from lic.pipeline.tile import Latents
from lic.quality import code_of, quality_of

SLOW_STEPS = 200  # a model with more of them is measured on fewer pictures
PAPER_CHANNELS = 192  # of NLAIC
STEP_REPEAT = 20  # times that steps of milliseconds are measured
RASTER = ("econtextformer", "msp", "nlaic")  # systems whose networks can be measured in raster order


@dataclass(frozen=True)
class Job:
    """What to measure, and on what."""

    pictures: list[Picture]
    infos: list[store.ModelInfo]
    base: str
    reference: str
    codes: list[int]  # qualities at which bits are counted
    code: int  # quality of what is coded and timed
    coded: int
    coded_slow: int
    threads: int
    repeat: int
    raster_steps: int
    crop: int
    large: tuple[int, int]

    @cached_property
    def first(self) -> Pixels:
        """The picture that single measurements are made on."""
        return self.pictures[0].load()

    def of_system(self, system: str) -> list[store.ModelInfo]:
        return [info for info in self.infos if info.config["system"] == system]

    def coded_with(self, net: CodecModel) -> int:
        """How many pictures are coded with a model."""
        slow = systems.steps_and_streams(net, *_size(self.first))[0] > SLOW_STEPS
        return self.coded_slow if slow else self.coded


def bits(job: Job) -> dict[str, Any]:
    """Bits at equal integers, or BD-rates where the transforms are others than those of the base."""
    base = store.load(job.base)
    loaded = [base if info.name == job.base else store.load_file(info) for info in job.infos]
    sharing = [model for model in loaded if model.info.synthesis_id == base.info.synthesis_id]
    others = [model for model in loaded if model.info.synthesis_id != base.info.synthesis_id]
    own_transforms = {model.info.name: _against(job, base, model) for model in tqdm(others, desc="BD-rate")}
    alone = store.without_dependence(base)
    sharing = [alone if model is base else store.without_dependence(model) for model in sharing]
    return {
        "pictures": len(job.pictures),
        "pixels": sum(height * width for height, width, _ in (picture.load().shape for picture in job.pictures)),
        "base": job.base,
        "reference": job.reference,
        "qualities": [quality_of(code) for code in job.codes],
        "quality": quality_of(job.code),
        "models": _at_equal_integers(job, alone, sharing),
        "own_transforms": own_transforms,
    }


def _at_equal_integers(job: Job, base: store.LoadedModel, models: list[store.LoadedModel]) -> dict[str, dict[str, Any]]:
    """Bits of y and z over all pictures at each quality, and what the coder makes of some pictures at one."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        zeros = [0.0] * len(job.codes)
        found[model.info.name] = {"y": zeros, "z": [*zeros], "checked": 0, "bytes": 0, "estimate": 0.0}
    bar = tqdm(total=len(job.pictures) * len(job.codes) * len(models), desc="bits")
    for picture in job.pictures:
        for i, code in enumerate(job.codes):
            latents = systems.integers(base.net, picture.load(), code)
            for model in models:
                entry = found[model.info.name]
                y_bits, z_bits = systems.ideal_bits(model.net, latents, code)
                entry["y"][i] += y_bits
                entry["z"][i] += z_bits
                bar.update()
    bar.close()
    for i, picture in enumerate(tqdm(job.pictures[: max(job.coded, job.coded_slow)], desc="coded")):
        latents = systems.integers(base.net, picture.load(), job.code)
        for model in models:
            entry = found[model.info.name]
            if i < job.coded_with(model.net):
                entry["checked"] += 1
                entry["bytes"] += systems.coded_bytes(model, latents, job.code)
                entry["estimate"] += sum(systems.ideal_bits(model.net, latents, job.code)) / 8
    return found


def _against(job: Job, base: store.LoadedModel, model: store.LoadedModel) -> dict[str, Any]:
    """Whole files of a model with other transforms than the base, and of the base: BD-rate if the curves overlap."""
    pictures = [picture.load() for picture in job.pictures[: job.coded_with(model.net)]]
    anchor, curve = (systems.curve(each, pictures, job.codes) for each in (base, model))
    points = {"bpp": curve.bpp, "psnr": curve.psnr, "base_bpp": anchor.bpp, "base_psnr": anchor.psnr}
    try:
        rate = bd_rate(anchor, curve)
    except ValueError as error:
        rate = None
        click.echo(f"{model.info.name}: {error}", err=True)
    return {**points, "pictures": len(pictures), "bd_rate": rate}


def costs(job: Job) -> dict[str, Any]:
    """Parameters, operations, steps, times and memory of every model."""
    size, found = _size(job.first), {}
    for info in tqdm(job.infos, desc="times"):
        model = store.load_file(info)
        pictures = [picture.load() for picture in job.pictures[: job.coded_with(model.net)]]
        found[info.name] = {
            **systems.cost(model, *size),
            "shipped": any((folder / info.path.name).exists() for folder in store.own_folders()),
            "times": asdict(systems.times(info.name, pictures, job.code, job.threads)),
            "memory_mb": systems.memory_mb(info.name, job.pictures[0].path, job.code, job.threads),
        }
    return {"size": size, "quality": quality_of(job.code), "models": found}


def groupedmixer(job: Job) -> dict[str, Any] | None:
    """Decoding with the cache and without."""
    found = {}
    for info in tqdm(job.of_system("groupedmixer"), desc="groupedmixer"):
        net = store.without_dependence(store.load_file(info)).net
        latents = systems.integers(net, job.first, job.code)
        found[info.name] = context_speed.compare(net, latents.z, latents.y, job.code, job.repeat)._asdict()
    return {"size": _size(job.first), "models": found} if found else None


def econtextformer(job: Job) -> dict[str, Any] | None:
    """Operations and time of a crop with each saving, and operations of a whole picture."""
    found = {}
    crop = job.first[: job.crop, : job.crop]
    for info in tqdm(job.of_system("econtextformer"), desc="econtextformer"):
        net = store.without_dependence(store.load_file(info)).net
        entry: dict[str, Any] = {}
        for name, rgb, repeat in (("crop", crop, job.repeat), ("whole", job.first, 0)):
            compared = econtextformer_ops.compare(_savings(net, rgb, job.code), job.raster_steps, repeat)
            if not compared.same:
                raise click.ClickException(f"{info.name}: the ways of computing predict differently")
            entry |= {name: [row._asdict() for row in compared.rows], "raster_steps": compared.raster_steps}
        found[info.name] = entry
    return {"crop": _size(crop), "size": _size(job.first), "models": found} if found else None


def nlaic(job: Job) -> dict[str, Any] | None:
    """Steps and times in raster order, row by row and in wavefronts."""
    size = _size(job.first)
    ((geometry, _, _),) = latent_boxes(*size, 0)
    found = {}
    for info in tqdm(job.of_system("nlaic"), desc="nlaic"):
        model = store.without_dependence(store.load_file(info))
        latents = systems.integers(model.net, job.first, job.code)
        channels = model.net.config.latent
        measured = nlaic_steps.measure(model, latents.z, latents.y, job.code, repeat=1)
        rows = nlaic_steps.measure(model, latents.z[:, :1], latents.y[:, :4], job.code, repeat=1)
        found[info.name] = {
            "channels": channels,
            "counts": nlaic_steps.counts(geometry.height, geometry.width, channels),
            "streams": len(measured.held),
            "step_seconds": {
                "raster order": _smallest_grid(model, latents, job.code).seconds_a_step,
                "row by row": rows.seconds_a_step,
                "wavefronts": measured.seconds_a_step,
            },
        }
    paper = nlaic_steps.counts(geometry.height, geometry.width, PAPER_CHANNELS)
    return {"size": size, "paper_channels": PAPER_CHANNELS, "paper_counts": paper, "models": found} if found else None


def msp(job: Job) -> dict[str, Any] | None:
    """Steps at several sizes, and decoding a large picture, against networks in raster order."""
    width, height = job.large
    columns, rows = _size(job.first)
    large = np.tile(job.first, (-(-height // rows), -(-width // columns), 1))[:height, :width]
    sizes = [(256, 256), (columns, rows), (width, height)]
    ((geometry, _, _),) = latent_boxes(width, height, tile=0)
    found, raster = {}, {}
    for info in tqdm([i for i in job.infos if i.config["system"] in RASTER], desc="msp"):
        model = store.without_dependence(store.load_file(info))
        groups = len(parts_of(model.net.context))
        steps = geometry.height * geometry.width * groups
        raster[info.name] = {"steps": steps, "step_seconds": raster_step(model, job)}
        if info.config["system"] != "msp":
            continue
        coded = pipeline.encode_rgb(model, large, job.code).container
        found[info.name] = {
            "kmac": info.kmac["context"],
            "decoder_kmac": info.kmac["decoder"],
            "steps": [systems.steps_and_streams(model.net, *size)[0] for size in sizes],
            "decode": nlaic_steps.best_of(job.repeat, partial(pipeline.decode_rgb, model, coded))[0],
        }
    return {"sizes": sizes, "models": found, "raster": raster} if found else None


def parts_of(context: Context) -> Sequence[object]:
    """The channels, or groups of channels, that a raster order codes one after the other at each position."""
    if isinstance(context, Nlaic):
        return range(context.schedule.channels)
    assert isinstance(context, MSP | EContextformer)
    return context.schedule.channels


@torch.no_grad()
def raster_step(model: store.LoadedModel, job: Job) -> float:
    """Seconds of the network of a model for a step that predicts one part of the channels at one position."""
    net, code = model.net, job.code
    if isinstance(net.context, EContextformer):
        measured = _savings(net, job.first[: job.crop, : job.crop], code)
        with exact_arithmetic():
            return nlaic_steps.best_of(job.repeat, lambda: measured.raster(job.raster_steps))[0] / job.raster_steps
    latents = systems.integers(net, job.first[:64, :64], code)
    if isinstance(net.context, Nlaic):
        return _smallest_grid(model, latents, code).seconds_a_step["context alone"]
    assert isinstance(net.context, MSP)
    return _one_cell(net, latents, code) / net.context.schedule.places


def _smallest_grid(model: store.LoadedModel, latents: Latents, code: int) -> nlaic_steps.Measurement:
    """NLAIC on 4 x 4 positions, where a step holds 4 or 8 latents: its time is overhead, as if it held one."""
    return nlaic_steps.measure(model, latents.z[:, :1, :1], latents.y[:, :4, :4], code, repeat=2)


def _one_cell(net: CodecModel, latents: Latents, code: int) -> float:
    """Seconds of MSP's network for all steps of the coarsest cells, on a grid so small that there is one."""
    context, codes = net.context, torch.tensor([code])
    assert isinstance(context, MSP)
    schedule, side = context.schedule, 2**context.schedule.levels
    psi = net.h_s(latents.z, codes)
    psi, y = psi._replace(x=psi.x[:, :side, :side]), latents.y[:, :side, :side]

    def steps() -> None:
        state = context.start(psi, Geometry(1, side, side), codes, net.unit(codes))
        for step in range(1, 1 + schedule.places):
            context.predict(state, step)
            context.observe(state, step, schedule.take(y, step))

    return nlaic_steps.best_of(STEP_REPEAT, steps)[0]


@torch.no_grad()
def _savings(net: CodecModel, rgb: Pixels, code: int) -> econtextformer_ops.Measured:
    assert isinstance(net.context, EContextformer)
    latents, codes = systems.integers(net, rgb, code), torch.tensor([code])
    return econtextformer_ops.Measured(net.context, net.h_s(latents.z, codes), latents.y, codes, net.unit(codes))


def _size(rgb: Pixels) -> tuple[int, int]:
    """Width and height."""
    return rgb.shape[1], rgb.shape[0]


SECTIONS: dict[str, Callable[[Job], dict[str, Any] | None]] = {
    "bits": bits,
    "costs": costs,
    "groupedmixer": groupedmixer,
    "econtextformer": econtextformer,
    "nlaic": nlaic,
    "msp": msp,
}


def made(job: Job) -> dict[str, Any]:
    """When, where and how a section was measured."""
    facts = environment(open_codec(job.base, "cpu", job.threads))
    kept = ("date", "cpu", "cores", "threads", "torch")
    return {"command": command_line(sys.argv[1:]), **{key: facts[key] for key in kept}}


def command_line(arguments: list[str]) -> str:
    """The command as it was typed, without the folders of this machine."""
    return shlex.join(["python", "scripts/systems.py", *map(_shown, arguments)])


def _shown(argument: str) -> str:
    path = Path(argument)
    if path.is_dir():
        return f"{path.resolve().name}/"
    return path.name if os.sep in argument else argument


def _sections(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [name for name in value.split(",") if name]
    if unknown := set(names) - set(SECTIONS):
        raise click.BadParameter(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return names


def _quality(context: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        return code_of(float(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _qualities(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    return [_quality(context, parameter, part) for part in value.split(",")]


def _width_and_height(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    width, _, height = value.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise click.BadParameter("must be WIDTHxHEIGHT")
    return int(width), int(height)


@click.command(help=__doc__)
@click.argument("pictures", nargs=-1, metavar="PICTURES", type=click.Path(exists=True, path_type=Path))
@click.option("--output", default="docs/systems.md", show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sections", default=",".join(SECTIONS), show_default=True, callback=_sections, metavar="NAME,...")
@click.option("--models", metavar="NAME,...", help="Default: all beside the base's weights.")
@click.option("--base", default="base", show_default=True, help="Whose transforms make the integers.")
@click.option("--reference", default="hyperprior", show_default=True, help="What bits are compared with.")
@click.option("--qualities", default="0,12,25,40,55,75,100", show_default=True, callback=_qualities)
@click.option("--quality", default="40", show_default=True, callback=_quality, help="Of what is coded and timed.")
@click.option("--coded", default=6, show_default=True, type=click.IntRange(1), help="Pictures coded and timed.")
@click.option("--coded-slow", default=2, show_default=True, type=click.IntRange(1),
              help=f"The same for models of more than {SLOW_STEPS} steps.")  # fmt: skip
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--repeat", default=2, show_default=True, type=click.IntRange(1), help="The best of so many times.")
@click.option("--raster-steps", default=32, show_default=True, type=click.IntRange(1),
              help="Steps of eContextformer in raster order that are measured.")  # fmt: skip
@click.option("--crop", default=256, show_default=True, help="Side of the crop for eContextformer, in pixels.")
@click.option("--large", default="2048x1080", show_default=True, callback=_width_and_height, help="Picture for MSP.")
def main(
    pictures: tuple[Path, ...], output: Path, sections: list[str], models: str | None, quality: int,
    qualities: list[int], **options: Any,
) -> None:  # fmt: skip
    if sections and not pictures:
        raise click.UsageError("measuring needs pictures")
    results = output.parent / "results" / f"{output.stem}.json"
    kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    if sections:
        torch.set_num_threads(options["threads"])
        infos = systems.installed(options["base"], models.split(",") if models else None)
        job = Job(find(pictures), infos, codes=qualities, code=quality, **options)
        facts = made(job)
        results.parent.mkdir(parents=True, exist_ok=True)
    for name in sections:
        found = SECTIONS[name](job)
        if found is None:
            click.echo(f"{name}: no such model", err=True)
            continue
        kept[name] = {"made": facts, **found}
        atomic.write(results, (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode())
    atomic.write(output, systems_page.page(kept, results.relative_to(output.parent).as_posix()).encode())


if __name__ == "__main__":
    main()
