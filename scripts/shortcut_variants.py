"""Linear shortcuts compared: how many bits do their rounded coefficients take, and what is the error?

Usage: python scripts/shortcut_variants.py PICTURES... [--pictures 90]     (needs PyWavelets)

A Karhunen-Loeve transform, fitted to the same pictures, of what a fixed transform makes of every 16x16 pixels: the
pixels themselves (blocks), the lapped orthogonal transform, or the coefficients of four levels of a wavelet. As many
coefficients as the codec has latent channels are rounded at every step; bits are the zero-order entropy of each.
Half of the pictures are scaled down, as in training. BD-rate is that against blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pywt
import torch

from lic.bench.bdrate import Curve, bd_rate
from lic.model.config import BASE, DOWNSAMPLING
from lic.model.transforms import lapped_basis
from lic.train.data import Pictures

SIDE = 512  # of the crops in pixels, after they were mirrored: so they repeat without an edge
STEPS = (64, 32, 16, 8)  # of the quantiser, on the scale of 8-bit samples
LEVELS = 4  # of the wavelets: 16 pixels
WAVELETS = ("bior4.4", "sym8")  # the CDF 9/7 of JPEG 2000, and an orthogonal one


class Variant(NamedTuple):
    """analysis: crops (N, S, S, 3) to vectors (N, S/16, S/16, 768); synthesis: back."""

    analysis: Callable[[np.ndarray], np.ndarray]
    synthesis: Callable[[np.ndarray], np.ndarray]


def _cells(x: np.ndarray, side: int) -> np.ndarray:
    """(N, H, W, 3) to (N, H/side, W/side, side·side·3)."""
    n, height, width, colours = x.shape
    x = x.reshape(n, height // side, side, width // side, side, colours).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // side, width // side, -1)


def _pixels(cells: np.ndarray, side: int) -> np.ndarray:
    n, rows, columns, _ = cells.shape
    x = cells.reshape(n, rows, columns, side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * side, columns * side, 3)


def _lapped() -> Variant:
    basis = lapped_basis(DOWNSAMPLING)  # (16, 32): rows are basis functions
    matrix = np.zeros((SIDE, SIDE))
    for i in range(0, SIDE, DOWNSAMPLING):
        matrix[i : i + DOWNSAMPLING, (np.arange(2 * DOWNSAMPLING) + i - DOWNSAMPLING // 2) % SIDE] = basis

    def apply(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return np.einsum("ij,njkc->nikc", matrix, np.einsum("kl,njlc->njkc", matrix, x, optimize=True), optimize=True)

    return Variant(
        lambda x: _cells(apply(x, matrix), DOWNSAMPLING), lambda v: apply(_pixels(v, DOWNSAMPLING), matrix.T)
    )


def _wavelet(name: str) -> Variant:
    def analysis(x: np.ndarray) -> np.ndarray:
        low, *details = pywt.wavedec2(x, name, mode="periodization", level=LEVELS, axes=(1, 2))
        parts = [_cells(low, 1)]
        for level, bands in enumerate(details):
            parts += [_cells(band, 2**level) for band in bands]
        return np.concatenate(parts, axis=-1)

    def synthesis(v: np.ndarray) -> np.ndarray:
        sizes = [3] + [3 * 4**level for level in range(LEVELS) for _ in range(3)]
        low, *bands = np.split(v, np.cumsum(sizes)[:-1], axis=-1)
        details = [
            tuple(_pixels(band, 2**level) for band in bands[3 * level : 3 * level + 3]) for level in range(LEVELS)
        ]
        return pywt.waverec2([_pixels(low, 1), *details], name, mode="periodization", axes=(1, 2))

    return Variant(analysis, synthesis)


VARIANTS = {
    "16x16 blocks": Variant(lambda x: _cells(x, DOWNSAMPLING), lambda v: _pixels(v, DOWNSAMPLING)),
    "lapped 32x32": _lapped(),
    **{f"wavelet {name}": _wavelet(name) for name in WAVELETS},
}


def _entropy(symbols: np.ndarray) -> float:
    """Bits of all symbols (K, C) with one histogram for each channel."""
    bits = 0.0
    for channel in symbols.T:
        counts = np.unique(channel, return_counts=True)[1]
        bits -= float((counts * np.log2(counts / len(channel))).sum())
    return bits


@click.command(help=__doc__)
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--pictures", "count", default=90, show_default=True, type=click.IntRange(2))
def main(paths: tuple[Path, ...], count: int) -> None:
    source = Pictures(list(paths), torch.device("cpu"), seed=1, watch=False)
    source.wait_for_all(SIDE)
    generator = torch.Generator().manual_seed(1)
    pixels = np.concatenate([pool.crops(count // 2, SIDE // 2, generator).numpy() for pool in source.pools])
    pixels = np.concatenate([pixels, pixels[:, ::-1]], axis=1)
    crops = np.concatenate([pixels, pixels[:, :, ::-1]], axis=2).astype(np.float64) - 128
    source.close()
    curves: list[Curve] = []
    for name, variant in VARIANTS.items():
        vectors = np.concatenate([variant.analysis(crop[None]) for crop in crops])
        flat = vectors.reshape(-1, vectors.shape[-1])
        basis = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, : BASE.latent]
        y = flat @ basis
        rates, qualities = [], []
        for step in STEPS:
            rounded = np.rint(y / step)
            back = (rounded * step @ basis.T).reshape(vectors.shape)
            error = np.mean([
                np.square(variant.synthesis(v[None])[0] - crop).mean() for v, crop in zip(back, crops, strict=True)
            ])  # fmt: skip
            rates.append(_entropy(rounded) / (crops.shape[0] * SIDE * SIDE))
            qualities.append(float(10 * np.log10(255**2 / error)))
        curves.append(Curve(name, tuple(rates[::-1]), tuple(qualities[::-1])))
        points = "".join(f"{rate:8.3f} bpp {quality:.2f} dB" for rate, quality in zip(rates, qualities, strict=True))
        click.echo(f"{name:<18}{points}   BD-rate {bd_rate(curves[0], curves[-1]):+.1f} %")


if __name__ == "__main__":
    main()
