"""Store the latents of random crops under a model, for training context models alone on the same integers.

Usage: python scripts/store_latents.py PICTURES... --model base --output-dir runs/latents --megapixels 400

Writes files of 500 crops, named after the seed; what is there already is kept. Several processes with different seeds
can fill one folder. Then: lic train runs/latents/*.safetensors --part context --init weights/base.safetensors ...
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from tqdm import tqdm

from lic.model import store
from lic.train.data import Pictures
from lic.train.latents import SUFFIX, store_latents

CROPS = 500  # in a file


@click.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--output-dir", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", default="base", show_default=True)
@click.option("--megapixels", type=float, default=400.0, show_default=True)
@click.option("--crop", default=256, show_default=True, help="Side, a multiple of 64.")
@click.option("--seed", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    data: tuple[Path, ...],
    output_dir: Path,
    model: str,
    megapixels: float,
    crop: int,
    seed: int,
    device: str,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    net = store.load(model, device).net
    net.requires_grad_(False)
    output_dir.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(list(data), torch.device(device), seed, watch=False)
    pictures.wait_for_all(crop)
    files = round(megapixels * 1e6 / crop**2 / CROPS)
    for i in tqdm(range(files), unit="file"):
        target = output_dir / f"{model}-{crop}-{seed}-{i:03d}{SUFFIX}"
        if not target.exists():
            store_latents(net, pictures, target, CROPS, crop, 10_000 * seed + i)


if __name__ == "__main__":
    main()
