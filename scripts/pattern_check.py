"""What becomes of patterns that photographs do not have: fine stripes and checks, noise, dithering, waves.

Usage: python scripts/pattern_check.py [--model base] [--qualities 10,40,80]

Prints a Markdown table of PSNR and bits per pixel, beside the PSNR of the pattern's mean colour everywhere, and exits
with 1 if a decoded picture is worse than that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
from PIL import Image

import lic
from lic.train.patterns import BAYER

SIDE = 128
PHOTO = Path(__file__).resolve().parent.parent / "tests/data/demo.png"
RED, CYAN = np.array([255, 0, 0]), np.array([0, 255, 255])


def patterns() -> dict[str, np.ndarray]:
    """uint8 (SIDE, SIDE, 3) by name, always the same."""
    y, x = np.mgrid[:SIDE, :SIDE]
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}

    def add(name: str, light: np.ndarray) -> None:
        """light: 0..1, (SIDE, SIDE) or with three channels."""
        light = light if light.ndim == 3 else light[..., None].repeat(3, axis=2)
        found[name] = np.rint(light * 255).astype(np.uint8)

    for cell in (1, 2, 4):
        rows, columns = y // cell, x // cell
        add(f"black and white stripes, {cell} px", columns % 2)
        add(f"black and white checks, {cell} px", (rows + columns) % 2)
        add(f"red and cyan stripes, {cell} px", np.where((columns % 2 == 0)[..., None], RED, CYAN) / 255)
        add(f"black and white noise, {cell} px", random.integers(0, 2, (SIDE, SIDE))[rows, columns])
        add(f"noise of eight colours, {cell} px", random.integers(0, 2, (SIDE, SIDE, 3))[rows, columns])
    add("wave of 0.45 cycles per px", 0.5 + 0.5 * np.sin(2 * np.pi * 0.45 * x))
    add("wave of 0.3 and 0.2 cycles per px", 0.5 + 0.5 * np.sin(2 * np.pi * (0.3 * x + 0.2 * y)))
    photo = Image.open(PHOTO).convert("RGB").crop((60, 100, 60 + SIDE, 100 + SIDE))
    add("photo, diffused to black and white", np.asarray(photo.convert("1").convert("L")) / 255)
    threshold = (np.array(BAYER)[y % 4, x % 4, None] + 0.5) / 16
    add("photo, ordered dithering", (np.asarray(photo) / 255 > threshold).astype(float))
    return found


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-2)))


@click.command()
@click.option("--model", default="base", show_default=True)
@click.option("--qualities", default="10,40,80", show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(model: str, qualities: str, threads: int) -> None:
    codec = lic.Codec(model, "cpu", threads=threads)
    levels = [float(q) for q in qualities.split(",")]
    click.echo(f"| pattern | mean colour | {' | '.join(f'q {q:g}' for q in levels)} |")
    click.echo(f"|---|{'---:|' * (1 + len(levels))}")
    worse = 0
    for name, pixels in patterns().items():
        flat = psnr(pixels, pixels.mean(axis=(0, 1)))
        cells = []
        for quality in levels:
            data = codec.encode(pixels, quality=quality)
            value = psnr(pixels, np.asarray(codec.decode(data).convert("RGB")))
            is_worse = value < flat - 0.01
            worse += is_worse
            cells.append(f"{value:.1f} dB, {8 * len(data) / SIDE**2:.2f} bpp{' (worse)' if is_worse else ''}")
        click.echo(f"| {name} | {flat:.1f} dB | {' | '.join(cells)} |")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
