"""Fit dependent quantisation for a model and give it to all that share its transforms.

Usage: python scripts/fit_quantiser.py OLD NEW PICTURES... --megapixels 16

OLD is a folder of weights files, NEW another one, which gets all of them with the tables and offsets of dependent
quantisation (lic/train/dependent.py) that are fitted to what BASE makes of random crops of the pictures, with what the
first step of each learns from neighbours, and with units that count in its integers. Networks stay what they are.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import click
import torch

from lic.model import store
from lic.train.data import Pictures, sample
from lic.train.dependent import ToQuantise, fit, fit_neighbours

CROPS, SIDE = 4, 256


@click.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("new", type=click.Path(path_type=Path, file_okay=False))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--base", default="base", show_default=True)
@click.option("--megapixels", type=float, default=16.0, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True)
@torch.no_grad()
def main(old: Path, new: Path, data: tuple[Path, ...], base: str, megapixels: float, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    pictures = Pictures(list(data), torch.device("cpu"), seed, watch=False)
    pictures.wait_for_all(SIDE)
    generator = torch.Generator().manual_seed(seed)
    crops = [sample(pictures, CROPS, SIDE, generator) for _ in range(round(megapixels * 1e6 / SIDE**2 / CROPS))]
    parent = store.read_info(old / (base + store.SUFFIX))
    net = store.load_file(parent).net
    net.quantise(None)
    latents = [ToQuantise.of(net, *crop) for crop in crops]
    quantiser = fit(net, latents)
    of_base = fit_neighbours(net, latents)
    new.mkdir(parents=True, exist_ok=True)
    target, today = new / parent.path.name, datetime.date.today().isoformat()
    for info in (parent, *(store.read_info(path) for path in sorted(old.glob("*" + store.SUFFIX)))):
        if info is not parent and info.shared_from != parent.path.name:
            continue
        net = store.load_file(info).net
        net.quantise(quantiser)
        if info is parent or "context." in info.shared:
            net.quantise(of_base)
        else:
            fit_neighbours(net, latents)
        provenance = info.provenance | {"quantiser": {"date": today, "megapixels": round(megapixels)}}
        meta = {"provenance": provenance, "rate_range": info.rate_range}
        store.write_model(new / info.path.name, net, meta, None if info is parent else store.read_info(target))
        click.echo(info.name)


if __name__ == "__main__":
    main()
