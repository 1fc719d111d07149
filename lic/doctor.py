"""`lic doctor`: is this installation whole? Each check runs by itself: one failure hides no other."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from lic import __version__

PACKAGES = ("torch", "torchac", "numpy", "pillow", "safetensors", "click", "tqdm", "ninja", "setuptools")
NOT_NEEDED = ("torchac", "ninja", "setuptools")  # without them, our own coder is used


def run(write: Callable[[str], None], every_model: bool = False) -> bool:
    """Run all checks, one line or more each through ``write``. True when nothing is broken.

    ``every_model``: check that all of them are exact, and not the default one alone.
    """
    whole = True
    for name, check in (
        ("lic", _system),
        ("packages", _packages),
        ("devices", _devices),
        ("coder", _coder),
        ("weights", _weights),
        ("round trip", _round_trip),
        ("exactness", partial(_exactness, every_model)),
    ):
        head = f"{name}:"
        try:
            for line in check():
                write(f"{head:<12}{line}")
                head = ""
        except Exception as error:
            whole = False
            write(f"{head:<12}BROKEN: {type(error).__name__}: {' '.join(str(error).split())}")
    write("everything works" if whole else "something is broken: see above")
    return whole


def synthetic_picture(width: int = 192, height: int = 128) -> np.ndarray:
    """uint8 (H, W, 3): smooth gradients, an edge and a texture, the same on every machine."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    texture = 0.06 * np.sin(60 * x) * np.sin(47 * y)
    disc = (x - 0.6) ** 2 + (y - 0.45) ** 2 < 0.06
    red = 0.25 + 0.5 * x + texture
    green = 0.35 + 0.4 * y + texture
    blue = np.where(disc, 0.7, 0.3) + 0.2 * x * y
    return np.rint(255 * np.clip(np.stack([red, green, blue], axis=-1), 0, 1)).astype(np.uint8)


def _system() -> Iterator[str]:
    system = f"{platform.system()} {platform.machine()}"
    yield f"{__version__}, Python {platform.python_version()}, {system}"


def _packages() -> Iterator[str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name not in NOT_NEEDED:
                raise RuntimeError(f"{name} is not installed") from None
            versions[name] = "missing"
    half = (len(versions) + 1) // 2
    words = [f"{name} {version}" for name, version in versions.items()]
    yield ", ".join(words[:half])
    yield ", ".join(words[half:])


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu ({torch.get_num_threads()} threads)"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"


def _coder() -> Iterator[str]:
    from lic import coder

    yield coder.backend_info()


def _weights() -> Iterator[str]:
    from lic.model import store

    models = store.available()
    if not models:
        raise RuntimeError("no models found")
    for model in models:
        yield f"{model.name} ({model.sha256[:16]}, {model.path})"


def _round_trip() -> Iterator[str]:
    from lic.api import Codec
    from lic.model import store

    picture = synthetic_picture()
    height, width = picture.shape[:2]
    for model in store.available():
        codec = Codec(model.name)
        encoded = codec.encode_result(picture)
        decoded = codec.decode_result(encoded.data)
        if decoded.symbols_sha256 != encoded.symbols_sha256:
            raise RuntimeError(f"{model.name}: decoded symbols differ from the encoded ones")
        if np.abs(decoded.rgb.astype(int) - encoded.reconstruction).max(initial=0) > 1:
            raise RuntimeError(f"{model.name}: decoded pixels differ from the encoder's")
        if not math.isfinite(encoded.estimated_bits):
            raise RuntimeError(f"{model.name}: the networks give no numbers")
        bpp = 8 * len(encoded.data) / (width * height)
        yield f"{model.name}: {width}x{height}, {bpp:.2f} bpp, {encoded.psnr:.1f} dB on {codec.device}"


def _exactness(every_model: bool) -> Iterator[str]:
    """The same symbols in several ways of computing them: the short form of scripts/conformance.py."""
    from lic import conformance, pipeline
    from lic.api import DEFAULT_MODEL
    from lic.model import store
    from lic.quality import DEFAULT_QUALITY, code_of

    picture = synthetic_picture()
    for info in store.available() if every_model else [store.find(DEFAULT_MODEL)]:
        model = store.load_file(info)
        file = conformance.decoded(model, pipeline.encode_rgb(model, picture, code_of(DEFAULT_QUALITY)).container)
        expected = conformance.measure(model, file)
        ways = conformance.variants(short=True)
        found = conformance.differences(model, file, expected, ways)
        if found:
            raise RuntimeError(f"{info.name}: {'; '.join(found)}")
        yield f"{info.name}: same symbols in {len(ways)} ways of computing them"
