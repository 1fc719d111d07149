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
from lic.device import check_device, select_device
from lic.errors import LicError, UnsupportedError, UsageError
from lic.quality import DEFAULT_QUALITY, code_of

if TYPE_CHECKING:
    from lic.info import Info
    from lic.model.store import LoadedModel, ModelInfo

Progress = Callable[[int, int], None]

DEFAULT_MODEL = "base"
_PSNR_ROWS = 64  # at a time: memory of a large picture


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
    names. ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; anything else raises UsageError. ``threads``
    sets torch's CPU threads, for the process.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, device: str = "auto", *, threads: int | None = None
    ) -> None:
        self._name = model
        self._device_name = check_device(device)
        self._threads = threads
        self._device: str | None = None
        self._encoder: ModelInfo | None = None
        self._loaded: dict[tuple[bytes, bytes], LoadedModel] = {}  # by entropy and synthesis identity

    def encode(self, image: Image.Image | np.ndarray, quality: float = DEFAULT_QUALITY) -> bytes:
        """``image`` (Pillow, mode RGB, or uint8 (H, W, 3)) as a ``.lic`` file.

        ``quality`` is 0..100. Raises UsageError outside that range, LicError for other kinds of pictures, a
        model that is not installed or a device that is not there.
        """
        return self.encode_result(image, quality).data

    def decode(self, data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
        """The picture of a ``.lic`` file.

        Raises CorruptError when ``data`` is no such file or a damaged one, UnsupportedError when it needs a
        newer version or a model that is not installed, or has more than ``max_pixels``.
        """
        return Image.fromarray(self.decode_result(data, max_pixels=max_pixels).rgb)

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
        model = self._loaded.get(key)
        if model is None:
            from lic.model import store

            model = self._load(store.find_for(header))
        from lic import pipeline

        start = time.perf_counter()
        decoded = pipeline.decode_rgb(model, parsed, progress=progress)
        return DecodeResult(decoded.rgb, decoded.symbols_sha256, time.perf_counter() - start)

    def load_encoder(self) -> LoadedModel:
        """Load the model that encodes, once.

        Raises LicError when the model or the device is not there, or the weights are damaged.
        """
        if self._encoder is None:
            from lic.model import store

            self._encoder = store.find(self._name)
        try:
            return self._load(self._encoder)
        except UnsupportedError as error:  # there is no .lic file that this would be about
            raise LicError(str(error)) from error

    def _load(self, info: ModelInfo) -> LoadedModel:
        key = (info.entropy_id, info.synthesis_id)
        if key not in self._loaded:
            from lic.model import store

            self._loaded[key] = store.load_file(info, self.device)
        return self._loaded[key]

    @property
    def device(self) -> str:
        """The device in use, chosen at first use. Raises LicError when the one asked for is not there."""
        if self._device is None:
            self._device = select_device(self._device_name)
            if self._threads is not None:
                import torch

                torch.set_num_threads(self._threads)
        return self._device


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite if they are equal."""
    error = 0
    for top in range(0, len(a), _PSNR_ROWS):
        difference = a[top : top + _PSNR_ROWS].astype(np.int32) - b[top : top + _PSNR_ROWS]
        error += int(np.sum(np.square(difference), dtype=np.int64))
    return 10 * math.log10(255**2 * a.size / error) if error else math.inf


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


def decode(data: bytes, *, device: str = "auto", max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """One ``.lic`` file to one picture: see :meth:`Codec.decode`."""
    return Codec(device=device).decode(data, max_pixels=max_pixels)


def info(data: bytes) -> Info:
    """What the header of a ``.lic`` file says, without torch and model: see :func:`lic.info.info_of`."""
    from lic.info import info_of

    return info_of(data)
