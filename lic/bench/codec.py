"""The codec under test: model, pipeline and container behind the few calls a measurement needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lic.bench.metrics import Pixels
from lic.quality import Tune


class Codec(Protocol):
    """What :func:`lic.bench.measure.measure` calls; tests bring a small one of their own."""

    @property
    def name(self) -> str: ...

    @property
    def weights_sha256(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...

    def encode(self, rgb: Pixels, quality_code: int) -> Any:
        """``lic.pipeline.Encoded`` of an image (H, W, 3)."""

    def decode(self, container: Any) -> Any:
        """``lic.pipeline.Decoded`` of a container."""

    def pack(self, container: Any) -> bytes:
        """The bytes of the file."""

    def parse(self, data: bytes) -> Any:
        """Inverse of ``pack``."""


@dataclass(frozen=True)
class LicCodec:
    """A loaded model; :func:`open_codec` makes one."""

    name: str
    weights_sha256: str
    device: str
    threads: int
    model: Any
    tune: Tune

    def encode(self, rgb: Pixels, quality_code: int) -> Any:
        from lic import pipeline

        return pipeline.encode_rgb(self.model, rgb, quality_code, tune=self.tune)

    def decode(self, container: Any) -> Any:
        from lic import pipeline

        return pipeline.decode_rgb(self.model, container)

    def pack(self, container: Any) -> bytes:
        from lic.container import pack

        return pack(container)

    def parse(self, data: bytes) -> Any:
        from lic.container import parse

        return parse(data, max_pixels=None)


def open_codec(name: str, device: str, threads: int | None, tune: Tune = "psnr") -> LicCodec:
    """Load a model by name on "auto", "cpu", "cuda" or "cuda:N"; imports torch.

    ``threads`` of torch on the CPU, None for torch's own choice. With a ``tune`` it is NAME-TUNE if there is one, and
    called so in any case. Raises LicError if there is no such model or device.
    """
    import torch

    from lic.api import Codec

    codec = Codec(name, device, threads=threads)
    loaded = codec.load_encoder(tune)
    called = name if tune == "psnr" else f"{name}-{tune}"
    return LicCodec(called, loaded.info.sha256, codec.device, torch.get_num_threads(), loaded, tune)
