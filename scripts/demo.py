"""`make demo`: encode and decode the bundled picture through the commands a user would type.

Prints size, bits per pixel, PSNR and times. Takes the first model there is if `base` is not installed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "tests" / "data" / "demo.png"
OUTPUT = ROOT / "demo-out"


def lic(*arguments: str) -> tuple[float, dict[str, object]]:
    """Run a command; the wall time in seconds and the JSON line that it ends standard error with."""
    print("$ lic", " ".join(arguments), flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "lic", *arguments, "--json"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr.strip() or f"lic ended with exit code {done.returncode}")
    facts: dict[str, object] = json.loads(done.stderr.splitlines()[-1])
    return seconds, facts


def main() -> None:
    from lic.coder import backend_info
    from lic.model import store

    names = [model.name for model in store.available()]
    if not names:
        sys.exit("no weights found in weights/")
    model = "base" if "base" in names else names[0]
    print("preparing the coder: where there is a C++ compiler, the first run takes half a minute", flush=True)
    print("coder:", backend_info(), flush=True)

    OUTPUT.mkdir(exist_ok=True)
    source, coded = PICTURE.relative_to(ROOT), (OUTPUT / "demo.lic").relative_to(ROOT)
    decoded = coded.with_suffix(".png")
    encode_wall, encoded = lic("encode", str(source), str(coded), "--model", model)
    decode_wall, facts = lic("decode", str(coded), str(decoded))

    before, after = (np.asarray(Image.open(path), dtype=np.float64) for path in (source, decoded))
    error = np.mean((before - after) ** 2)
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    size = coded.stat().st_size
    height, width, _ = before.shape
    print(f"""
picture   {width}x{height}, {source.stat().st_size} bytes as PNG
file      {size} bytes, {8 * size / (width * height):.3f} bpp
PSNR      {psnr:.2f} dB (RGB, of the decoded file)
encode    {encoded["seconds"]:.2f} s, {encode_wall:.2f} s with start-up, model {model} on {encoded["device"]}
decode    {facts["seconds"]:.2f} s, {decode_wall:.2f} s with start-up
look at   {source} and {decoded}""")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
