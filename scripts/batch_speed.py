"""How fast a batch is: against one process per picture, and against the time that the networks and the coder take.

Writes pictures (crops of the demo picture, or of those in --pictures) into a temporary folder, encodes and decodes
them in one batch and in a process each, and prints the throughput of both. "computing" is the sum of the seconds that
the report gives for the pictures; "start" is what a batch of one picture takes beyond them. Then the same with --jobs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from PIL import Image

from lic import images

DEMO = Path(__file__).parent.parent / "tests" / "data" / "demo.png"


def write_pictures(sources: list[Path], folder: Path, count: int, side: int) -> None:
    """``count`` crops of ``side`` x ``side`` pixels, from places that differ."""
    folder.mkdir()
    for i in range(count):
        with Image.open(sources[i % len(sources)]) as picture:
            x, y = (i * 37 % max(1, size - side) for size in picture.size)
            picture.convert("RGB").crop((x, y, x + side, y + side)).save(folder / f"{i:03}.png")


def lic(*arguments: str) -> float:
    """Seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lic", *arguments], check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def computing(report: Path) -> float:
    return sum(json.loads(line)["seconds"] for line in report.read_text().splitlines())


def measure(
    command: str, files: list[Path], folder: Path, suffix: str, processes: int, jobs: int, options: list[str]
) -> None:
    """A command on all files: as a batch, in processes, with --jobs."""
    names = [str(path) for path in files]
    report = folder / f"{command}.jsonl"
    first = folder / f"{command}-first.jsonl"
    single = lic(command, names[0], "--output-dir", str(folder / "first"), "--report", str(first), *options)
    start = single - computing(first)
    batch = lic(command, *names, "--output-dir", str(folder / command), "--report", str(report), *options)
    compute = computing(report)
    each = sum(lic(command, name, str(folder / f"one{suffix}"), *options) for name in names[:processes])
    rates = len(names) / batch, len(names[:processes]) / each
    several = lic(command, *names, "--output-dir", str(folder / "jobs"), "--jobs", str(jobs), *options)
    print(
        f"{command}: one batch {batch:.1f} s ({rates[0]:.2f} images/s), a process each {rates[1]:.2f} images/s: "
        f"{rates[0] / rates[1]:.1f} times faster\n"
        f"{command}: computing {compute:.1f} s, start {start:.1f} s, everything else {batch - start - compute:+.1f} s "
        f"({100 * (batch - start - compute) / compute:+.0f} % of computing)\n"
        f"{command}: with --jobs {jobs} {several:.1f} s ({len(names) / several:.2f} images/s)",
        flush=True,
    )


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder to crop from.")
@click.option("--count", default=50, show_default=True)
@click.option("--side", default=256, show_default=True, help="Of the crops, in pixels.")
@click.option("--processes", default=10, show_default=True, help="How many are also done in a process each.")
@click.option("--jobs", default=2, show_default=True)
@click.option("--model", default="base", show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(pictures: Path | None, count: int, side: int, processes: int, jobs: int, model: str, device: str) -> None:
    sources = [DEMO] if pictures is None else sorted(pictures.iterdir())
    sources = [path for path in sources if path.suffix.lower() in images.PICTURE_SUFFIXES]
    if not sources:
        raise click.UsageError(f"no pictures in {pictures}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(sources, folder / "in", count, side)
        print(f"{count} pictures of {side}x{side}, model {model}", flush=True)
        files = sorted((folder / "in").iterdir())
        measure("encode", files, folder, ".lic", processes, jobs, ["--model", model, "--device", device])
        measure("decode", sorted((folder / "encode").iterdir()), folder, ".png", processes, jobs, ["--device", device])


if __name__ == "__main__":
    main()
