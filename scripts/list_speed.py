"""How fast lists of pictures are encoded and decoded, against the same pictures one by one (docs/recipes.md).

The pictures are crops of the demo picture, or of those in --pictures. Each way is timed --rounds times, in turns, and
the fastest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from lic import Codec, images

DEMO = Path(__file__).parent.parent / "tests" / "data" / "demo.png"


def crops(sources: list[Path], count: int, width: int, height: int) -> list[np.ndarray]:
    """``count`` arrays (height, width, 3) from places that differ."""
    found = []
    for i in range(count):
        with Image.open(sources[i % len(sources)]) as picture:
            x, y = (i * 37 % max(1, size - side) for size, side in zip(picture.size, (width, height), strict=True))
            found.append(np.asarray(picture.convert("RGB").crop((x, y, x + width, y + height))))
    return found


def seconds(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder to crop from.")
@click.option("--count", default=32, show_default=True)
@click.option("--width", default=128, show_default=True, help="Of the crops, in pixels.")
@click.option("--height", default=96, show_default=True, help="Of the crops, in pixels.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--model", default="base", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    pictures: Path | None, count: int, width: int, height: int, rounds: int, model: str, device: str, threads: int
) -> None:
    sources = [DEMO] if pictures is None else sorted(pictures.iterdir())
    sources = [path for path in sources if path.suffix.lower() in images.PICTURE_SUFFIXES]
    if not sources:
        raise click.UsageError(f"no pictures in {pictures}")
    codec = Codec(model, device, threads=threads)
    originals = crops(sources, count, width, height)
    files = codec.encode(originals)
    print(f"{count} pictures of {width}x{height}, model {model}, {codec.device}, threads: {threads}", flush=True)
    for name, alone, together in (
        ("encode", lambda: [codec.encode(one) for one in originals], lambda: codec.encode(originals)),
        ("decode", lambda: [codec.decode(one) for one in files], lambda: codec.decode(files)),
    ):
        times = [[seconds(way) for way in (alone, together)] for _ in range(rounds)]
        one, many = (min(turn[way][0] for turn in times) for way in (0, 1))
        same = sum(a == b for a, b in zip(times[0][0][1], times[0][1][1], strict=True))
        print(f"{name}: one by one {one:.2f} s, as a list {many:.2f} s: {one / many:.2f} times as fast; {same} alike")


if __name__ == "__main__":
    main()
