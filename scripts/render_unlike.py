"""Render pictures unlike photographs: charts, a text page, a window of a program, flat drawings. From fixed seeds.

python scripts/render_unlike.py FOLDER

They serve to measure what encoder-side optimisation does for pictures that the training set has few of
(docs/effort.md).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import click
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

SIZE = (480, 320)
INCHES = (4.8, 3.2)
TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one were
all their there been if more when will would who so no she other its may these what them than some him time into
"""
WORDS = TEXT.split()


def picture_of(figure: Figure) -> Image.Image:
    """A figure of INCHES as a picture of SIZE."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


def line_chart() -> Image.Image:
    random = np.random.default_rng(1)
    figure, axis = plt.subplots(figsize=INCHES, layout="constrained")
    for i in range(5):
        axis.plot(np.cumsum(random.normal(0.05 * i, 1, 200)), label=f"series {i + 1}", linewidth=1.2)
    axis.grid(alpha=0.3)
    axis.legend()
    axis.set(title="Five random walks", xlabel="step", ylabel="position")
    return picture_of(figure)


def bar_chart() -> Image.Image:
    random = np.random.default_rng(2)
    figure, axes = plt.subplots(2, 2, figsize=INCHES, layout="constrained")
    axes[0, 0].bar(range(12), random.uniform(1, 9, 12), color="tab:blue")
    axes[0, 1].pie(random.uniform(1, 5, 6), labels=list("ABCDEF"))
    axes[1, 0].scatter(*random.normal(0, 1, (2, 300)), s=6, c=random.uniform(0, 1, 300))
    axes[1, 1].imshow(random.uniform(0, 1, (12, 18)), cmap="viridis")
    return picture_of(figure)


def text_page() -> Image.Image:
    random = np.random.default_rng(3)
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((24, 12), "On the length of descriptions", fill="black", font=ImageFont.load_default(22))
    body = ImageFont.load_default(13)
    for row in range(16):
        line = ""
        while draw.textlength(line, body) < 380:
            line += str(random.choice(WORDS)) + " "
        draw.text((24, 46 + 17 * row), line, fill=(20, 20, 20), font=body)
    return picture


def window() -> Image.Image:
    """A dark editor with a side bar and coloured words."""
    random = np.random.default_rng(4)
    picture = Image.new("RGB", SIZE, (30, 30, 38))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    draw.rectangle((0, 0, SIZE[0], 28), fill=(52, 54, 66))
    for i, colour in enumerate(((237, 106, 94), (245, 191, 79), (98, 197, 84))):
        draw.ellipse((10 + 20 * i, 8, 22 + 20 * i, 20), fill=colour)
    draw.rectangle((0, 28, 110, SIZE[1]), fill=(38, 39, 49))
    for row in range(14):
        draw.text(
            (14 + 10 * (row % 3 > 0), 40 + 20 * row), f"{random.choice(WORDS)}.py", fill=(180, 184, 200), font=font
        )
    colours = ((220, 220, 230), (130, 170, 255), (195, 232, 141), (255, 203, 107), (199, 146, 234))
    for row in range(17):
        draw.text((118, 38 + 16 * row), f"{row + 1:3d}", fill=(90, 94, 110), font=font)
        x = 146 + 20 * int(random.integers(0, 4))
        for _ in range(int(random.integers(0, 6))):
            word = str(random.choice(WORDS))
            draw.text((x, 38 + 16 * row), word, fill=colours[int(random.integers(len(colours)))], font=font)
            x += int(draw.textlength(word + " ", font))
    return picture


def drawing() -> Image.Image:
    """Flat shapes with smooth edges, as in a cartoon."""
    random = np.random.default_rng(5)
    picture = Image.new("RGB", (1536, 1024), (164, 212, 244))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((1150, 90, 1350, 290), fill=(255, 221, 87), outline="black", width=5)
    for i, colour in enumerate(((112, 173, 71), (84, 140, 60), (60, 110, 48))):
        x = np.linspace(0, 1536, 80)
        y = 560 + 120 * i + 70 * np.sin(x / (150 + 60 * i) + 2 * i)
        draw.polygon([(0, 1024), *zip(x, y, strict=True), (1536, 1024)], fill=colour, outline="black", width=5)
    for _ in range(14):
        x, y = random.uniform(60, 1480), random.uniform(680, 960)
        r = random.uniform(25, 60)
        draw.rectangle((x - 6, y, x + 6, y + 2 * r), fill=(101, 67, 33), outline="black", width=3)
        shade = tuple(int(v) for v in random.integers((140, 30, 30), (255, 160, 120)))
        draw.ellipse((x - r, y - 2 * r, x + r, y), fill=shade, outline="black", width=5)
    return picture.resize(SIZE, Image.Resampling.LANCZOS)


def mosaic() -> Image.Image:
    """Areas of one colour each, nearest of 60 points, as in a map."""
    random = np.random.default_rng(6)
    points = random.uniform((0, 0), SIZE, (60, 2))
    colours = random.integers(60, 250, (60, 3)).astype(np.uint8)
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    distance = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    first, second = np.sort(distance, axis=-1)[..., :2].transpose(2, 0, 1)
    pixels = colours[distance.argmin(axis=-1)]
    pixels[second - first < 2] = 40
    return Image.fromarray(pixels)


PICTURES: tuple[Callable[[], Image.Image], ...] = (line_chart, bar_chart, text_page, window, drawing, mosaic)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for render in PICTURES:
        render().save(folder / f"{render.__name__}.png")


if __name__ == "__main__":
    main()
