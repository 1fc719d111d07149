"""What --effort buys: BD-rate against effort 0, and encoding and decoding time, over a folder of pictures.

Usage: python scripts/effort_curve.py PICTURES --output docs/results/effort.json [--set kodak] [--model base]

With --tune ms-ssim, all levels but 0 are tuned for MS-SSIM, and BD-rates are those for MS-SSIM (another output file).

Adds to what is in the output, so that sets, models and levels can be measured one after the other; what has been
measured is not measured again. With --markdown it prints the tables of all that is there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

import lic
from lic.bench.bdrate import Curve, bd_rate
from lic.bench.metrics import ms_ssim
from lic.images import PICTURE_SUFFIXES
from lic.quality import TUNES, Tune

Results = dict[str, dict[str, Any]]


@click.command()
@click.argument("pictures", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--set", "name", default="kodak", show_default=True, help="What to call these pictures.")
@click.option("--model", default="base", show_default=True)
@click.option("--efforts", default="0,1,3,5,7,9", show_default=True)
@click.option("--qualities", default="20,45,70", show_default=True)
@click.option("--tune", type=click.Choice(TUNES), default=TUNES[0], show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--markdown", is_flag=True)
def main(
    pictures: tuple[Path, ...],
    output: Path,
    name: str,
    model: str,
    efforts: str,
    qualities: str,
    tune: Tune,
    threads: int,
    device: str,
    markdown: bool,
) -> None:
    results: Results = json.loads(output.read_text()) if output.exists() else {}
    files = [f for p in pictures for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    files = [f for f in files if f.suffix.lower() in PICTURE_SUFFIXES]
    codec = lic.Codec(model, device, threads=threads)
    tasks = [(int(e), float(q), f) for e in efforts.split(",") for q in qualities.split(",") for f in files]
    for effort, quality, path in tqdm(tasks, unit="encoding"):
        where = threads if device == "cpu" else device
        key = f"{name} {model} {where} {effort} {quality:g} {path.stem}"
        if key not in results:
            results[key] = measure(codec, path, quality, effort, tune)
            output.write_text(json.dumps(results, indent=0) + "\n")
    if markdown:
        print(tables(results, "psnr" if tune == "psnr" else "ms_ssim"))


def measure(codec: lic.Codec, path: Path, quality: float, effort: int, tune: Tune) -> dict[str, float]:
    """Rate, PSNR, MS-SSIM and seconds of one picture."""
    picture = Image.open(path).convert("RGB")
    result = codec.encode_result(picture, quality, tune=tune if effort else "psnr", effort=effort)
    start = time.perf_counter()
    decoded = codec.decode(result.data)
    seconds = time.perf_counter() - start
    bpp = 8 * len(result.data) / (picture.width * picture.height)
    similarity = ms_ssim(np.asarray(picture), np.asarray(decoded))
    return {
        "bpp": bpp,
        "psnr": result.psnr,
        "ms_ssim": similarity,
        "encode": result.seconds,
        "decode": seconds,
    }


def tables(results: Results, metric: str) -> str:
    """A table for each set and model: a row a level. BD-rates are for the metric."""
    points: dict[tuple[str, str, str], dict[int, dict[str, dict[float, dict[str, float]]]]] = {}
    for key, value in results.items():
        name, model, threads, effort, quality, picture = key.split(" ")
        levels = points.setdefault((name, model, threads), {})
        levels.setdefault(int(effort), {}).setdefault(picture, {})[float(quality)] = value
    lines = []
    for (name, model, threads), levels in points.items():
        lines += [
            f"{name}, model {model}, {len(levels[0])} pictures, threads: {threads}",
            "",
            "| effort | BD-rate | worst and best picture | encode, s | decode, s |",
            "|---|---|---|---|---|",
        ]
        for effort, of_pictures in sorted(levels.items()):
            gains = [0.0]
            if effort:
                gains = [bd_rate(_curve(levels[0][p]), _curve(v), metric) for p, v in of_pictures.items()]
            seconds = {
                k: np.mean([point[k] for v in of_pictures.values() for point in v.values()])
                for k in ("encode", "decode")
            }
            lines.append(
                f"| {effort} | {np.mean(gains):+.2f} % | {max(gains):+.1f} %, {min(gains):+.1f} % "
                f"| {seconds['encode']:.1f} | {seconds['decode']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _curve(points: dict[float, dict[str, float]]) -> Curve:
    """Of one picture, from its points by quality."""
    ordered = [points[quality] for quality in sorted(points)]
    rate, psnr, similarity = (tuple(p[k] for p in ordered if k in p) for k in ("bpp", "psnr", "ms_ssim"))
    return Curve("", rate, psnr, similarity or None)


if __name__ == "__main__":
    main()
