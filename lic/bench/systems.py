"""The context models side by side: bits on the same integers, work, time and memory of each."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lic import api, container, pipeline
from lic.bench.bdrate import Curve
from lic.bench.measure import peak_memory_mb
from lic.bench.metrics import Pixels, psnr
from lic.bench.pictures import Picture
from lic.exact import exact_arithmetic
from lic.model import store
from lic.model.codec import CodecModel
from lic.model.config import CONFIGS
from lic.model.context import Geometry
from lic.pipeline import windows
from lic.pipeline.codec import latent_boxes
from lic.pipeline.tile import Latents, Writer, code_tiles
from lic.quality import TUNES, quality_of

_WARM_UP = 128  # pixels a side of the picture that is coded before times are taken


@dataclass(frozen=True)
class Times:
    """Medians over the pictures, in seconds, with the model loaded."""

    encode: float
    decode: float
    pictures: int


def installed(base: str, names: Sequence[str] | None = None) -> list[store.ModelInfo]:
    """The models of these names, in the order of CONFIGS.

    By default all whose weights lie beside those of ``base``, but for those that are one of them tuned otherwise.
    Raises LicError if one is not installed.
    """
    first = store.find(base)
    if names is not None:
        found = [store.find(name) for name in names]
    else:
        tuned = tuple(f"-{tune}" for tune in TUNES)
        found = [info for info in store.available() if info.path.parent == first.path.parent]
        found = [info for info in found if not info.name.endswith(tuned)]
    order = list(CONFIGS)
    return sorted(found, key=lambda info: order.index(info.name) if info.name in order else len(order))


@torch.no_grad()
def integers(net: CodecModel, rgb: Pixels, quality_code: int) -> Latents:
    """z and y of a picture, uint8 (H, W, 3), as one tile, rounded for rate in one pass as in training.

    Of a network with scalar quantisation, :func:`store.without_dependence`: only such integers are open to all models.
    """
    height, width, _ = rgb.shape
    ((geometry, _, _),) = latent_boxes(width, height, tile=0)
    code = torch.tensor([float(quality_code)], device=net.sigma.device)
    with exact_arithmetic():
        y = windows.analysis(net, [rgb], geometry, code)
        z = torch.round(net.hyper_analysis(y, code))
        return Latents(z, net.rounded(y, z, code))


@torch.no_grad()
def ideal_bits(net: CodecModel, latents: Latents, quality_code: int) -> tuple[float, float]:
    """Bits of y and of z without a coder: the Gaussian of each latent, all predicted in one exact pass."""
    code = torch.tensor([quality_code], device=net.sigma.device)
    with exact_arithmetic():
        y_bits, z_bits = net.rate(latents.y, latents.z, code)
    return float(y_bits[0]), float(z_bits[0])


def coded_bytes(model: store.LoadedModel, latents: Latents, quality_code: int) -> int:
    """Bytes of all streams that the coder writes of the same integers, step by step."""
    writer = Writer()
    code_tiles(model, Geometry(*latents.y.shape[:3]), [quality_code], [writer], latents)
    return sum(map(len, writer.streams))


def curve(model: store.LoadedModel, pictures: Sequence[Pixels], quality_codes: Sequence[int]) -> Curve:
    """Whole files and what they decode to, means over pictures uint8 (H, W, 3) at each quality."""
    points = []
    for code in quality_codes:
        rates, psnrs = [], []
        for rgb in pictures:
            encoded = pipeline.encode_rgb(model, rgb, code)
            rates.append(8 * len(container.pack(encoded.container)) / (rgb.shape[0] * rgb.shape[1]))
            psnrs.append(psnr(rgb, encoded.reconstruction))
        points.append((statistics.fmean(rates), statistics.fmean(psnrs)))
    bpp, psnr_db = zip(*points, strict=True)
    return Curve(model.info.name, bpp, psnr_db)


def steps_and_streams(net: CodecModel, width: int, height: int) -> tuple[int, int]:
    """Sequential steps of the context model, and its streams, for a picture of one tile."""
    ((geometry, _, _),) = latent_boxes(width, height, tile=0)
    schedule = net.context.schedule
    steps = schedule.steps(geometry)
    return steps, len({schedule.stream_of(step) for step in range(steps)})


def times(name: str, pictures: Sequence[Pixels], quality_code: int, threads: int) -> Times:
    """Pictures uint8 (H, W, 3) to ``.lic`` files and back through the Python API, on the CPU."""
    codec = api.Codec(name, "cpu", threads=threads)
    quality = quality_of(quality_code)
    codec.decode_array(codec.encode(np.ascontiguousarray(pictures[0][:_WARM_UP, :_WARM_UP]), quality))
    encode, decode = [], []
    for rgb in pictures:
        start = time.perf_counter()
        data = codec.encode(rgb, quality)
        middle = time.perf_counter()
        codec.decode_array(data)
        encode.append(middle - start)
        decode.append(time.perf_counter() - middle)
    return Times(statistics.median(encode), statistics.median(decode), len(pictures))


def memory_mb(name: str, picture: Path, quality_code: int, threads: int) -> float | None:
    """The peak of a process of its own that encodes and decodes a picture, in 10^6 bytes; None on Windows.

    With Python, torch and the model. Raises CalledProcessError if the process fails.
    """
    arguments = [name, str(picture), str(quality_code), str(threads)]
    command = [sys.executable, "-c", "from lic.bench.systems import _probe; _probe()", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said) if said.strip() else None


def _probe() -> None:
    """What the process of :func:`memory_mb` runs."""
    name, path, quality_code, threads = sys.argv[1:]
    codec = api.Codec(name, "cpu", threads=int(threads))
    codec.decode_array(codec.encode(Picture(Path(path), "").load(), quality_of(int(quality_code))))
    peak = peak_memory_mb()
    print("" if peak is None else peak)


def cost(model: store.LoadedModel, width: int, height: int) -> dict[str, Any]:
    """What a model is and was, without measuring: parameters, kMAC/px, steps, streams, training."""
    info, net = model.info, model.net
    steps, streams = steps_and_streams(net, width, height)
    training = {key: info.provenance[key] for key in ("steps", "minutes", "megapixels") if key in info.provenance}
    return {
        "parameters": sum(p.numel() for p in net.context.parameters()),
        "kmac": info.kmac["context"],
        "decoder_kmac": info.kmac["decoder"],
        "steps": steps,
        "streams": streams,
        "training": {**training, "part": info.provenance.get("settings", {}).get("part", "all")},
    }
