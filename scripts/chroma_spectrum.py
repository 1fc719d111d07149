"""How fine the chroma of pictures is: its power against luma's, by spatial frequency.

Usage: python scripts/chroma_spectrum.py kodak/ PICTURES.tar [--pictures 60]

Prints a Markdown table with a row for each folder or tar file, and a second one for its pictures with the chroma that
training gives most crops (`lic/train/chroma.py`): decibels of (Cb + Cr) / 2 against Y in bands of frequency.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch

from lic.train.chroma import soften_chroma
from lic.train.data import decode, read_files

BLOCK = 64
EDGES = np.arange(0.05, 0.5, 0.1)  # of the bands, in cycles per pixel
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])  # ITU-R BT.601


def power(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Mean power of Y, Cb and Cr in each band, (3, bands), over all blocks of BLOCK² pixels of (H, W, 3)."""
    window = np.hanning(BLOCK)
    total, count = np.zeros((3, BLOCK, BLOCK)), 0
    for picture in pictures:
        h, w = (n // BLOCK for n in picture.shape[:2])
        planes = np.moveaxis(picture[: h * BLOCK, : w * BLOCK] @ YCBCR.T, -1, 0)
        blocks = planes.reshape(3, h, BLOCK, w, BLOCK).transpose(0, 1, 3, 2, 4).reshape(3, -1, BLOCK, BLOCK)
        blocks = (blocks - blocks.mean(axis=(2, 3), keepdims=True)) * window[:, None] * window
        total += np.square(np.abs(np.fft.fft2(blocks))).sum(axis=1)
        count += h * w
    frequency = np.fft.fftfreq(BLOCK)
    distance = np.hypot(frequency[:, None], frequency)
    bands = [(distance >= low) & (distance < high) for low, high in pairwise(EDGES)]
    return np.stack([total[:, band].mean(axis=1) for band in bands], axis=1) / max(count, 1)


def softened(picture: np.ndarray, generator: torch.Generator) -> np.ndarray:
    h, w = (n // 2 * 2 for n in picture.shape[:2])
    return soften_chroma(torch.from_numpy(picture[None, :h, :w].copy()), generator)[0].numpy()


@click.command()
@click.argument("sets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--pictures", default=60, show_default=True, help="Of each set, at most.")
def main(sets: tuple[Path, ...], pictures: int) -> None:
    bands = [f"{low:.2f} to {high:.2f}" for low, high in pairwise(EDGES)]
    click.echo(f"| cycles per pixel | {' | '.join(bands)} |\n|---|{'---|' * len(bands)}")
    for source in sets:
        decoded = [
            p for data, _ in zip(read_files(source), range(pictures), strict=False) if (p := decode(data)) is not None
        ]
        generator = torch.Generator().manual_seed(0)
        for name, those in (
            (source.name, decoded),
            (f"{source.name}, soft", [softened(p, generator) for p in decoded]),
        ):
            y, cb, cr = power(those)
            level = " | ".join(f"{x:.1f} dB" for x in 10 * np.log10((cb + cr) / 2 / y))
            click.echo(f"| {name} | {level} |")


if __name__ == "__main__":
    main()
