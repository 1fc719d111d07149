"""The Python API: pictures to bytes and back. torch is imported when the first picture is coded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lic import container, images
from lic.container import DEFAULT_MAX_PIXELS
from lic.errors import UsageError
from lic.quality import DEFAULT_QUALITY, code_of

if TYPE_CHECKING:
    from lic.info import Info
    from lic.model.store import LoadedModel

Progress = Callable[[int, int], None]

DEFAULT_MODEL = "base"


@dataclass(frozen=True)
class EncodeResult:
    """One encoded picture.

    ``data``: the ``.lic`` file. ``reconstruction``: uint8 (H, W, 3), what decoding ``data`` gives on this
    machine; ``psnr``: of it, in dB over RGB, infinite if it is exact. ``estimated_bits``: the model's own
    estimate of the coded size. ``symbols_sha256``: as in DecodeResult. ``seconds``: without loading the
    model.
    """

    data: bytes
    reconstruction: np.ndarray
    psnr: float
    estimated_bits: float
    symbols_sha256: str
    seconds: float


@dataclass(frozen=True)
class DecodeResult:
    """One decoded picture: ``rgb`` is uint8 (H, W, 3); ``seconds`` is without loading the model.

    ``symbols_sha256`` is the hash of the decoded integers, the same on every machine.
    """

    rgb: np.ndarray
    symbols_sha256: str
    seconds: float


class Codec:
    """Encodes and decodes pictures, loading each model once.

    ``model`` names the model that encodes (``lic models`` lists them); decoding takes the one that the file
    names. ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``threads`` sets torch's CPU threads, for
    the process.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, device: str = "auto", *, threads: int | None = None
    ) -> None:
        self._name = model
        self._device_name = device
        self._threads = threads
        self._device: str | None = None
        self._encoder: LoadedModel | None = None
        self._decoders: dict[tuple[bytes, bytes], LoadedModel] = {}

    def encode(self, image: Image.Image | np.ndarray, quality: float = DEFAULT_QUALITY) -> bytes:
        """``image`` (Pillow, mode RGB, or uint8 (H, W, 3)) as a ``.lic`` file.

        ``quality`` is 0..100. Raises UsageError outside that range, LicError for other kinds of pictures, a
        model that is not installed or a device that is not there.
        """
        return self.encode_result(image, quality).data

    def decode(self, data: bytes) -> Image.Image:
        """The picture of a ``.lic`` file.

        Raises CorruptError when ``data`` is no such file or a damaged one, UnsupportedError when it needs a
        newer version or a model that is not installed.
        """
        return Image.fromarray(self.decode_result(data).rgb)

    def encode_result(
        self,
        image: Image.Image | np.ndarray,
        quality: float = DEFAULT_QUALITY,
        *,
        progress: Progress | None = None,
    ) -> EncodeResult:
        """As :meth:`encode`, with what the encoder knows besides.

        ``progress(done, total)`` is called now and then.
        """
        try:
            code = code_of(quality)
        except ValueError as error:
            raise UsageError(str(error)) from None
        rgb = images.rgb_of(image)
        model = self.load_encoder()
        from lic import pipeline

        start = time.perf_counter()
        encoded = pipeline.encode_rgb(model, rgb, code, progress=progress)
        data = container.pack(encoded.container)
        seconds = time.perf_counter() - start
        return EncodeResult(
            data=data,
            reconstruction=encoded.reconstruction,
            psnr=psnr(rgb, encoded.reconstruction),
            estimated_bits=encoded.estimated_bits,
            symbols_sha256=encoded.symbols_sha256,
            seconds=seconds,
        )

    def decode_result(
        self, data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, progress: Progress | None = None
    ) -> DecodeResult:
        """As :meth:`decode`, with the hash of the symbols.

        Also UnsupportedError above ``max_pixels``, before any work.
        """
        parsed = container.parse(data, max_pixels=max_pixels)
        header = parsed.header
        key = (header.entropy_id, header.synthesis_id)
        if key not in self._decoders:
            from lic.model import store

            store.find_for(header)  # before self.device, which imports torch
            self._decoders[key] = store.load_for(header, self.device)
        from lic import pipeline

        start = time.perf_counter()
        decoded = pipeline.decode_rgb(self._decoders[key], parsed, progress=progress)
        return DecodeResult(decoded.rgb, decoded.symbols_sha256, time.perf_counter() - start)

    def load_encoder(self) -> LoadedModel:
        """Load the model that encodes, once. Raises LicError when the model or the device is not there."""
        if self._encoder is None:
            from lic.model import store

            store.find(self._name)  # before self.device, which imports torch
            self._encoder = store.load(self._name, self.device)
        return self._encoder

    @property
    def device(self) -> str:
        """The device in use, chosen at first use. Raises LicError when the one asked for is not there."""
        if self._device is None:
            from lic import pipeline

            self._device = pipeline.select_device(self._device_name)
            if self._threads is not None:
                import torch

                torch.set_num_threads(self._threads)
        return self._device


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite if they are equal."""
    error = float(np.mean(np.square(a.astype(np.float32) - b.astype(np.float32)), dtype=np.float64))
    return 10 * math.log10(255**2 / error) if error else math.inf


def encode(
    image: Image.Image | np.ndarray,
    quality: float = DEFAULT_QUALITY,
    *,
    model: str = DEFAULT_MODEL,
    device: str = "auto",
) -> bytes:
    """One picture to one ``.lic`` file: see :meth:`Codec.encode`.

    For several, a Codec loads the model once.
    """
    return Codec(model, device).encode(image, quality)


def decode(data: bytes, *, device: str = "auto") -> Image.Image:
    """One ``.lic`` file to one picture: see :meth:`Codec.decode`."""
    return Codec(device=device).decode(data)


def info(data: bytes) -> Info:
    """What the header of a ``.lic`` file says, without torch and model: see :func:`lic.info.info_of`."""
    from lic.info import info_of

    return info_of(data)
