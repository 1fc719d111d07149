"""Pictures through the commands that a user types, each in a process of its own: sizes, PSNR, memory, time.

For every quality, one `lic encode`, one `lic decode` and one `lic verify` of all pictures. The decoded pictures must
have the size of the originals, and all three commands must agree on the symbols. Peak memory is that of the whole
process, with Python, torch and the model. Exit code 1 if anything fails. Linux and macOS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from lic import api, images
from lic.errors import LicError

MAX_PIXELS = 1 << 30


class Failed(Exception):
    """What went wrong, in one line."""


def lic(*arguments: str) -> tuple[list[dict[str, Any]], float]:
    """Run a command with --json; its JSON lines and the peak memory of its process in 10^6 bytes.

    Raises Failed with what it said if it does not exit with 0.
    """
    command = [sys.executable, "-m", "lic", *arguments, "--json"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if process.returncode:
        words = "; ".join(line for line in lines if not line.startswith("{"))
        raise Failed(f"lic {arguments[0]} ended with {process.returncode}: {words}")
    unit = 1 if sys.platform == "darwin" else 1024
    return [json.loads(line) for line in lines if line.startswith("{")], usage.ru_maxrss * unit / 1e6


def pixels(path: Path) -> np.ndarray:
    """uint8 (H, W, 3), upright."""
    return images.rgb_of(images.picture_of(path.read_bytes(), max_pixels=MAX_PIXELS))


def check(pictures: list[Path], quality: str, model: str, device: list[str], folder: Path) -> str:
    """All pictures at one quality; a row of the table. Raises Failed."""
    coded, back = folder / "coded", folder / "back"
    names = [path.stem for path in pictures]
    files = [str(coded / f"{name}.lic") for name in names]
    options = ["--output-dir", str(coded), "-q", quality, "--model", model, *device]
    encoded, encode_memory = lic("encode", *map(str, pictures), *options)
    decoded, decode_memory = lic("decode", *files, "--output-dir", str(back), "--format", "png", *device)
    verified, _ = lic("verify", *files, *device)
    symbols = [[line["symbols_sha256"] for line in lines] for lines in (encoded, decoded, verified)]
    if len(symbols[0]) != len(pictures) or not symbols[0] == symbols[1] == symbols[2]:
        raise Failed("encode, decode and verify do not agree on the symbols")
    sizes, rates, psnrs = [], [], []
    for path, name in zip(pictures, names, strict=True):
        before, after = pixels(path), pixels(back / f"{name}.png")
        if before.shape != after.shape:
            raise Failed(f"{name}: decoded to {after.shape}, not {before.shape}")
        sizes.append((coded / f"{name}.lic").stat().st_size)
        rates.append(8 * sizes[-1] / (before.shape[0] * before.shape[1]))
        psnrs.append(api.psnr(before, after))
    seconds = [line["seconds"] for line in decoded]
    return (
        f"{quality:>7} {sum(sizes):>10} {np.mean(rates):>8.4f} {np.mean(psnrs):>7.2f} {encode_memory:>10.0f} "
        f"{decode_memory:>10.0f} {np.mean(seconds):>9.3f} {max(seconds):>9.3f}"
    )


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--qualities", default="10,25,40,55,70,85", show_default=True, metavar="Q,Q,...")
@click.option("--model", default="base", show_default=True)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]")
@click.option("--threads", metavar="N", help="CPU threads (default: torch's choice).")
def main(folder: Path, qualities: str, model: str, device: str, threads: str | None) -> None:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in images.PICTURE_SUFFIXES)
    if not pictures:
        raise click.ClickException(f"no pictures in {folder}")
    where = ["--device", device, *(["--threads", threads] if threads else [])]
    failures = 0
    print(f"{len(pictures)} pictures, model {model}; means over the pictures, memory of each process in MB")
    print("quality      bytes      bpp    PSNR  encode MB  decode MB  decode s   slowest", flush=True)
    for quality in qualities.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            try:
                print(check(pictures, quality, model, where, Path(temporary)), flush=True)
            except (Failed, LicError, OSError) as error:
                failures += 1
                print(f"{quality:>7} FAILED: {error}", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
