"""Whether targets are met: every picture of a folder at three kinds of target, and random crops at a target size.

Usage: python scripts/target_check.py KODAK_DIR [--crops-of PICTURES --crops 200 --crop-size 20k]

Prints a line for each target that is missed, then a summary: how much of a size or rate is used, how far a PSNR is
exceeded. A crop whose smallest file is larger, or whose largest is smaller, counts as out of reach.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

import lic
from lic.images import PICTURE_SUFFIXES
from lic.rate import parse_size
from lic.train.data import decode, read_files

TARGETS = (("size", 30_000.0), ("bpp", 0.4), ("psnr", 34.0))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--model", default="base", show_default=True)
@click.option("--effort", default=0, show_default=True)
@click.option("--crops-of", type=click.Path(path_type=Path, exists=True), help="Folder or tar file of pictures.")
@click.option("--crops", default=200, show_default=True)
@click.option("--crop-size", default="20k", show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    folder: Path, model: str, effort: int, crops_of: Path | None, crops: int, crop_size: str, threads: int
) -> None:
    codec = lic.Codec(model, "cpu", threads=threads)
    pictures = [Image.open(p).convert("RGB") for p in sorted(folder.iterdir()) if p.suffix.lower() in PICTURE_SUFFIXES]
    missed = 0
    for kind, value in TARGETS:
        used = []
        for picture in tqdm(pictures, desc=f"{kind} {value:g}", leave=False):
            used.append(_used(codec, picture, lic.Target(kind, value), effort))  # type: ignore[arg-type]
        missed += _report(f"{kind} {value:g}", kind, [u for u in used if u is not None], used.count(None))
    if crops_of is not None:
        target = lic.Target("size", parse_size(crop_size))
        used = [_used(codec, crop, target, effort) for crop in tqdm(_random_crops(crops_of, crops), total=crops)]
        missed += _report(f"random crops, {target}", "size", [u for u in used if u is not None], used.count(None))
    sys.exit(1 if missed else 0)


def _used(codec: lic.Codec, picture: Image.Image, target: lic.Target, effort: int) -> float | None:
    """Of a size or rate, the share that is used; how far a PSNR is exceeded, in dB. None: out of reach."""
    try:
        result = codec.encode_result(picture, target=target, effort=effort)
    except lic.LicError:
        return None
    if target.kind == "psnr":
        return result.psnr - target.value
    size = target.value if target.kind == "size" else target.value * picture.width * picture.height / 8
    if result.quality > 99.9 and len(result.data) <= size:
        return None  # all the quality that there is takes less; at its end sizes wobble by a byte or two
    return len(result.data) / size


def _report(name: str, kind: str, used: list[float], out_of_reach: int) -> int:
    """Print a line; how many targets were missed."""
    low, high = (0.0, 0.02) if kind == "psnr" else (0.985, 1.0)
    missed = sum(not low <= u <= high for u in used)
    shown = f"{min(used):.4f} to {max(used):.4f}, mean {np.mean(used):.4f}" if used else "none"
    print(f"{name}: {len(used)} in reach, {missed} missed, {out_of_reach} out of reach; {shown}", flush=True)
    return missed


def _random_crops(source: Path, count: int) -> Iterator[Image.Image]:
    """Of 16 to 900 pixels a side, from any place of the pictures, the first picture again after the last."""
    random = np.random.default_rng(1)
    done = 0
    while done < count:
        for data in read_files(source):
            if done == count or (pixels := decode(data)) is None:
                break
            height, width = (min(int(16 * 56 ** random.uniform()), side) for side in pixels.shape[:2])
            top, left = (
                int(random.integers(0, a - b + 1)) for a, b in zip(pixels.shape, (height, width), strict=False)
            )
            yield Image.fromarray(pixels[top : top + height, left : left + width])
            done += 1


if __name__ == "__main__":
    main()
