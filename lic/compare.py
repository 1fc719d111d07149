"""A page that shows pictures over each other, with everything in one HTML file."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lic import container, images
from lic.errors import LicError

if TYPE_CHECKING:
    from lic.api import Codec
    from lic.images import Picture


@dataclass(frozen=True)
class Entry:
    """One picture of the page: 8 bits per sample, its name, and the size of its file in bytes."""

    name: str
    bytes: int
    picture: Picture


def entry_of(codec: Codec, name: str, data: bytes, *, max_pixels: int) -> Entry:
    """The picture in a file's bytes: a ``.lic`` file, by its signature, or another picture.

    Raises what :meth:`lic.Codec.decode_result` raises, or LicError as :func:`lic.images.picture_of`.
    """
    if data.startswith(container.MAGIC):
        picture = codec.decode_result(data, bits=8, max_pixels=max_pixels).picture
    else:
        picture = images.picture_of(data, max_pixels=max_pixels).at_bits(8)
    return Entry(name, len(data), picture)


def page(entries: Sequence[Entry]) -> bytes:
    """The HTML file. Of the metadata only colour profiles are in it. Raises LicError for pictures of several sizes."""
    first = entries[0].picture
    for entry in entries:
        width, height = entry.picture.width, entry.picture.height
        if (width, height) != (first.width, first.height):
            raise LicError(
                f"{entry.name} has {width}x{height} pixels and {entries[0].name} {first.width}x{first.height}: "
                "only pictures of one size can be compared"
            )
    rows, shown = [], []
    for number, entry in enumerate(entries):
        name = html.escape(entry.name)
        facts = [f"{entry.bytes:,}", f"{8 * entry.bytes / (first.width * first.height):.3f}", _psnr(entries[0], entry)]
        choices = "".join(f'<td><input type=radio name={side} value={number} title="{side}">' for side in _SIDES)
        rows.append(f"<tr>{choices}<td>{number + 1}<td>{name}" + "".join(f"<td>{fact}" for fact in facts))
        shown.append(f'<img alt="{name}" src="data:image/png;base64,{_png(entry.picture)}">')
    return _PAGE.format(
        title=html.escape(" | ".join(entry.name for entry in entries)),
        rows="\n".join(rows),
        images="\n".join(shown),
        size=json.dumps([first.width, first.height]),
        style=_STYLE,
        script=_SCRIPT,
    ).encode(errors="replace")  # names need not be UTF-8


def _png(picture: Picture) -> str:
    """In base64, with the colour profile and without EXIF and XMP: a page that is passed on tells no places."""
    metadata = container.Metadata(icc=picture.metadata.icc)
    return base64.b64encode(images.picture_bytes(replace(picture, metadata=metadata), "png")).decode()


def _psnr(reference: Entry, entry: Entry) -> str:
    if entry is reference or reference.picture.alpha is not None or entry.picture.alpha is not None:
        return ""
    a, b = (np.broadcast_to(e.picture.colour, (*e.picture.colour.shape[:2], 3)) for e in (reference, entry))
    value = images.psnr(a, b)
    return f"{value:.2f} dB" if math.isfinite(value) else "identical"


_SIDES = ("left", "right")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style></head><body>
<header><table><tr><th>left<th>right<th><th>picture<th>bytes<th>bpp<th>PSNR to the first
{rows}
</table>
<p><button id="fit">fit</button> <button id="full">100 %</button> <output id="zoom"></output>
Drag the line; drag the picture to move it, turn the wheel to zoom. Click or press space to swap, 1 to 9 to choose.</p>
</header>
<div id="stage">
{images}
<div id="line"></div></div>
<script>const size = {size};{script}</script></body></html>
"""

_STYLE = """
html,body{height:100%;margin:0}
body{display:flex;flex-direction:column;background:#777;font:14px sans-serif}
header{background:#eee;padding:.4em .8em}p{margin:.4em 0}
table{border-collapse:collapse}td,th{padding:.1em .7em;text-align:right}td:nth-child(4),th:nth-child(4){text-align:left}
#stage{flex:1;min-height:0;position:relative;overflow:hidden;touch-action:none;cursor:grab}
img{position:absolute;left:0;top:0;transform-origin:0 0;pointer-events:none}
#line{position:absolute;top:0;bottom:0;width:2px;margin-left:-1px;background:#fff;box-shadow:0 0 3px #000;
cursor:ew-resize}#line::after{content:"";position:absolute;top:0;bottom:0;left:-8px;right:-8px}
"""

_SCRIPT = """
const stage = document.getElementById("stage"), line = document.getElementById("line");
const pictures = [...stage.querySelectorAll("img")];
const view = {left: 0, right: 1, scale: 1, x: 0, y: 0, split: 0.5};

function draw() {
  const at = view.split * stage.clientWidth, cut = (at - view.x) / view.scale;
  const inside = Math.min(Math.max(cut, 0), size[0]);
  pictures.forEach((picture, i) => {
    picture.hidden = i !== view.left && i !== view.right;
    picture.style.imageRendering = view.scale * devicePixelRatio > 1 ? "pixelated" : "auto";
    picture.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
    const all = view.left === view.right;
    picture.style.clipPath = all ? "none" : i === view.right ? `inset(0 0 0 ${inside}px)`
      : `inset(0 ${size[0] - inside}px 0 0)`;
  });
  line.style.left = `${at}px`;
  document.getElementById("zoom").value = `${Math.round(100 * view.scale * devicePixelRatio)} %`;
  for (const side of ["left", "right"]) document.getElementsByName(side)[view[side]].checked = true;
}

function zoom(scale, x, y) {
  scale = Math.min(Math.max(scale, 0.02), 64);
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  view.scale = scale;
  draw();
}

function centre(scale) {
  view.scale = scale;
  view.x = (stage.clientWidth - size[0] * scale) / 2;
  view.y = (stage.clientHeight - size[1] * scale) / 2;
  draw();
}

const fit = () => centre(Math.min(stage.clientWidth / size[0], stage.clientHeight / size[1], 1 / devicePixelRatio));
const full = () => centre(1 / devicePixelRatio);
const swap = () => { [view.left, view.right] = [view.right, view.left]; draw(); };

let drag = null;
stage.addEventListener("pointerdown", event => {
  drag = {x: event.clientX, y: event.clientY, line: event.target === line, moved: false};
  stage.setPointerCapture(event.pointerId);
});
stage.addEventListener("pointermove", event => {
  if (!drag) return;
  const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  if (!drag.moved && Math.hypot(dx, dy) < 4) return;
  drag.moved = true;
  if (drag.line) view.split = Math.min(Math.max(event.clientX / stage.clientWidth, 0), 1);
  else { view.x += dx; view.y += dy; drag.x = event.clientX; drag.y = event.clientY; }
  draw();
});
stage.addEventListener("pointerup", () => { if (drag && !drag.moved && !drag.line) swap(); drag = null; });
stage.addEventListener("pointercancel", () => { drag = null; });
stage.addEventListener("wheel", event => {
  event.preventDefault();
  const box = stage.getBoundingClientRect();
  zoom(view.scale * 2 ** (-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
}, {passive: false});
addEventListener("keydown", event => {
  const number = Number(event.key) - 1;
  if (event.key === " ") { event.preventDefault(); swap(); }
  else if (number in pictures) { view.right = number; draw(); }
});
addEventListener("change", event => { view[event.target.name] = Number(event.target.value); draw(); });
addEventListener("resize", draw);
document.getElementById("fit").onclick = fit;
document.getElementById("full").onclick = full;
fit();
"""
