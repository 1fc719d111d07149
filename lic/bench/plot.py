"""Rate-distortion charts: SVG text without any library, PNG files with matplotlib."""

from __future__ import annotations

import colorsys
import html
import math
from collections.abc import Sequence
from pathlib import Path

from lic.bench.bdrate import Curve

LABELS = {"psnr": "PSNR (dB)", "ms_ssim": "MS-SSIM (dB)"}
WIDTH, HEIGHT = 940, 560
LEFT, RIGHT, TOP, BOTTOM = 55, 270, 15, 45  # margins; the legend stands in the right one


def svg_chart(curves: Sequence[Curve], metric: str) -> str:
    """An ``<svg>`` element; the first curve is emphasised and sets the range of the axes."""
    drawn = _drawable(curves, metric)
    if not drawn:
        return ""
    (x0, x1), (y0, y1) = _ranges(drawn)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    height = max(HEIGHT, TOP + 16 * len(drawn) + 10)  # a long legend goes on below the axes

    def x(bpp: float) -> float:
        return LEFT + (bpp - x0) / (x1 - x0) * (right - LEFT)

    def y(quality: float) -> float:
        return bottom - (quality - y0) / (y1 - y0) * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="12" '
        'font-family="sans-serif">',
        f'<clipPath id="{metric}"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" '
        f'height="{bottom - TOP}"/></clipPath>',
        '<g stroke="#ddd">',
    ]
    ticks_x, ticks_y = _ticks(x0, x1), _ticks(y0, y1)
    parts += [f'<path d="M{x(t):.1f} {TOP}V{bottom}"/>' for t in ticks_x]
    parts += [f'<path d="M{LEFT} {y(t):.1f}H{right}"/>' for t in ticks_y]
    parts.append("</g>")
    parts += [f'<text x="{x(t):.1f}" y="{bottom + 16}" text-anchor="middle">{t:g}</text>' for t in ticks_x]
    parts += [f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in ticks_y]
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">bits per pixel</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{LABELS[metric]}</text>'
    )
    parts.append(f'<g clip-path="url(#{metric})" fill="none">')
    for index, (_, points) in reversed(list(enumerate(drawn))):  # the emphasised one on top
        line = " ".join(f"{x(rate):.1f},{y(quality):.1f}" for rate, quality in points)
        color, width = _color(index), 3 if index == 0 else 1.3
        parts.append(f'<polyline points="{line}" stroke="{color}" stroke-width="{width}"/>')
        parts += [
            f'<circle cx="{x(rate):.1f}" cy="{y(quality):.1f}" r="{width + 0.7}" fill="{color}"/>'
            for rate, quality in points
        ]
    parts.append("</g>")
    for index, (name, _) in enumerate(drawn):
        row = TOP + 10 + 16 * index
        parts.append(
            f'<path d="M{right + 10} {row}h18" stroke="{_color(index)}" stroke-width="3"/>'
            f'<text x="{right + 34}" y="{row + 4}">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def png_chart(curves: Sequence[Curve], metric: str, path: Path) -> bool:
    """The same chart as a PNG file; False, and no file, without matplotlib or without a point to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    drawn = _drawable(curves, metric)
    if not drawn:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(
        xlabel="bits per pixel", ylabel=LABELS[metric], xlim=_ranges(drawn)[0], ylim=_ranges(drawn)[1]
    )
    for index, (name, points) in enumerate(drawn):
        width = 2.5 if index == 0 else 1
        axes.plot(
            *zip(*points, strict=True), ".-", label=name, color=_color(index), linewidth=width,
            zorder=3 if index == 0 else 2,
        )  # fmt: skip
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
    return True


def _drawable(curves: Sequence[Curve], metric: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Name and points, sorted by rate, of the curves that have the metric."""
    return [
        (curve.name, sorted(zip(curve.bpp, quality, strict=True)))
        for curve in curves
        if (quality := curve.quality(metric))
    ]


Range = tuple[float, float]


def _ranges(drawn: Sequence[tuple[str, list[tuple[float, float]]]]) -> tuple[Range, Range]:
    rates, qualities = zip(*drawn[0][1], strict=True)
    margin = 0.05 * (max(qualities) - min(qualities)) + 0.5
    return (0.0, max(rates) * 1.1), (min(qualities) - margin, max(qualities) + margin)


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers between ``low`` and ``high``."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(index * step, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _color(index: int) -> str:
    if index == 0:
        return "#000000"
    # Steps of the golden angle keep neighbours in the legend apart, however many curves there are.
    hue, saturation, lightness = (index * 137.508) % 360 / 360, 0.7, 0.45
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
