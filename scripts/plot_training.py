"""Plot the log of a run: loss, rate and distortion over minutes, averaged over 10 entries.

Usage: python scripts/plot_training.py runs/base/log.jsonl docs/results/training.png
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@click.command()
@click.argument("log", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--width", default=10, show_default=True, help="Entries in the moving average.")
def main(log: Path, target: Path, width: int) -> None:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    kernel = np.ones(width) / width
    minutes = np.convolve([e["minutes"] for e in entries], kernel, "valid")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for axis, key in zip(axes, ("loss", "bpp", "distortion"), strict=True):
        axis.plot([e["minutes"] for e in entries], [e[key] for e in entries], color="0.85")
        axis.plot(minutes, np.convolve([e[key] for e in entries], kernel, "valid"))
        axis.set(title=key, xlabel="minutes")
    figure.savefig(target, dpi=70)


if __name__ == "__main__":
    main()
