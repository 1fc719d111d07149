"""What exact arithmetic costs: bytes and decoding time of the integer entropy path against the same network in floats.

Usage: python scripts/exactness_cost.py KODAK_DIR [--model base] [--qualities 0,20,40,60,80,100] [--threads 2]
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from lic import container, pipeline
from lic.images import PICTURE_SUFFIXES
from lic.model import store
from lic.quality import code_of


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--model", default="base", show_default=True)
@click.option("--qualities", default="0,20,40,60,80,100", show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(folder: Path, model: str, qualities: str, threads: int) -> None:
    torch.set_num_threads(threads)
    loaded = store.load(model)
    pictures = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in PICTURE_SUFFIXES]
    click.echo(f"{len(pictures)} pictures, model {model}, {threads} threads, torch {torch.__version__}")
    click.echo(
        f"{'q':>5} {'float, bytes':>14} {'exact, bytes':>14} {'cost':>8} {'float, s':>10} {'exact, s':>10} {'cost':>8}"
    )
    for quality in (float(q) for q in qualities.split(",")):
        size, seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}
        for path in pictures:
            rgb = np.asarray(Image.open(path).convert("RGB"))
            for exact in (False, True):
                loaded.net.set_exact(exact)
                coded = pipeline.encode_rgb(loaded, rgb, code_of(quality)).container
                size[exact] += len(container.pack(coded))
                start = time.perf_counter()
                pipeline.decode_rgb(loaded, coded)
                seconds[exact] += time.perf_counter() - start
        bytes_cost, time_cost = (100 * (cost[True] / cost[False] - 1) for cost in (size, seconds))
        click.echo(
            f"{quality:>5g} {size[False]:>14} {size[True]:>14} {bytes_cost:>+7.2f}% "
            f"{seconds[False] / len(pictures):>10.3f} {seconds[True] / len(pictures):>10.3f} {time_cost:>+7.1f}%"
        )


if __name__ == "__main__":
    main()
