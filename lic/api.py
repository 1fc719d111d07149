"""The Python API: pictures to bytes and back. torch is imported when the first picture is coded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from PIL import Image

from lic import container, images
from lic.container import DEFAULT_MAX_PIXELS
from lic.device import check_device, select_device
from lic.errors import CorruptError, LicError, UnsupportedError, UsageError
from lic.grouping import CPU_PIXELS, CUDA_PIXELS, Size, in_batches, padded_size
from lic.images import Picture, psnr, samples_at_bits
from lic.part import Preview, Region, preview_of, region_of
from lic.quality import DEFAULT_QUALITY, MAX_EFFORT, TUNES, Tune, code_of, quality_of
from lic.rate import Target, search

if TYPE_CHECKING:
    from lic.inspection import Info
    from lic.model.store import LoadedModel, ModelInfo
    from lic.pipeline import Decoded, Encoded

Progress = Callable[[int, int], None]
AnyPicture: TypeAlias = Image.Image | np.ndarray | Picture

DEFAULT_MODEL = "base"
_TRIES_WITH_EFFORT = 3  # that a target takes as a rule, when the first is near
_ANY_SIZE = 2**64  # pixels: what is in memory has been let in before


@dataclass(frozen=True)
class EncodeResult:
    """One encoded picture.

    ``data``: the ``.lic`` file. ``quality``: at which it was encoded, with which ``effort``. ``estimated_bits``: the
    model's own estimate of the coded size. ``symbols_sha256``: as in DecodeResult. ``seconds``: without loading the
    model and, unless a target of PSNR needed it, the reconstruction. ``notes``: in words, what was lost before coding
    began.
    """

    data: bytes
    quality: float
    effort: int
    estimated_bits: float
    symbols_sha256: str
    seconds: float
    notes: tuple[str, ...]
    _colour: np.ndarray = field(repr=False)  # as it was coded
    _encoded: Encoded = field(repr=False)

    @property
    def reconstruction(self) -> np.ndarray:
        """The colour that decoding ``data`` gives on this machine, uint8 or uint16 as the source.

        (H, W, 3), or (H, W, 1) if gray. Computed by the synthesis transform when it is first asked for.
        """
        return self._encoded.reconstruction

    @property
    def psnr(self) -> float:
        """Of the reconstruction, in dB over all samples; infinite if it is exact.

        Under full transparency it is against the colour that was coded there.
        """
        return psnr(self._colour, self.reconstruction)


@dataclass(frozen=True)
class DecodeResult:
    """One decoded picture or region, with its transparency and metadata; ``seconds`` is without loading the model.

    ``symbols_sha256`` is the hash of the decoded integers, the same on every machine; None where not all of them
    were decoded, or where a preview shows wrong ones. ``notes``: in words, what a preview lacks.
    """

    picture: Picture
    symbols_sha256: str | None
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def rgb(self) -> np.ndarray:
        """The colour alone: uint8 or uint16, (H, W, 3), or (H, W, 1) if gray."""
        return self.picture.colour


@dataclass(frozen=True)
class _ToEncode:
    """A picture, its colour as it will be coded, what goes beside it, and since when the time is taken."""

    picture: Picture
    colour: np.ndarray
    sections: tuple[container.Section, ...]
    start: float

    def file(self, encoded: Encoded) -> bytes:
        header = replace(encoded.container.header, reduced=self.picture.reduced)
        sections = encoded.container.sections + self.sections
        return container.pack(replace(encoded.container, header=header, sections=sections))

    def result(self, encoded: Encoded, effort: int) -> EncodeResult:
        return EncodeResult(
            data=self.file(encoded),
            quality=quality_of(encoded.container.header.quality),
            effort=effort,
            estimated_bits=encoded.estimated_bits,
            symbols_sha256=encoded.symbols_sha256,
            seconds=time.perf_counter() - self.start,
            notes=self.picture.notes,
            _colour=self.colour.copy(),  # whose pixels are the caller's, to use again
            _encoded=encoded,
        )


@dataclass(frozen=True)
class _ToDecode:
    """A file, whole or not, with what is beside its colour (:func:`_beside_colour`), the model and depth for that."""

    file: container.Leading
    alpha: np.ndarray | None
    metadata: container.Metadata
    lost: list[str]
    model: LoadedModel
    bits: int

    def picture(self, decoded: Decoded, area: Region | None = None) -> Picture:
        alpha = self.alpha
        if alpha is not None:
            alpha = samples_at_bits(alpha if area is None else area.of(alpha), self.bits)
        return Picture(decoded.rgb, alpha, self.metadata, self.file.container.header.reduced)


class Codec:
    """Encodes and decodes pictures, loading each model once.

    ``model`` names the model that encodes (``lic models`` lists them); decoding takes the one that the file
    names. ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; anything else raises UsageError. ``threads``
    sets torch's CPU threads, for the process.
    """

    def __init__(self, model: str = DEFAULT_MODEL, device: str = "auto", *, threads: int | None = None) -> None:
        self._name = model
        self._device_name = check_device(device)
        self._threads = threads
        self._device: str | None = None
        self._encoders: dict[Tune, ModelInfo] = {}
        self._loaded: dict[tuple[bytes, bytes], LoadedModel] = {}  # by entropy and synthesis identity

    @overload
    def encode(
        self,
        image: AnyPicture,
        quality: float | None = ...,
        *,
        target: Target | None = ...,
        tune: Tune = ...,
        effort: int = ...,
        effort_seconds: float | None = ...,
        strip: bool = ...,
    ) -> bytes: ...
    @overload
    def encode(
        self,
        image: Sequence[AnyPicture],
        quality: float | None = ...,
        *,
        target: Target | None = ...,
        tune: Tune = ...,
        effort: int = ...,
        effort_seconds: float | None = ...,
        strip: bool = ...,
    ) -> list[bytes]: ...
    def encode(
        self,
        image: AnyPicture | Sequence[AnyPicture],
        quality: float | None = None,
        *,
        target: Target | None = None,
        tune: Tune = "psnr",
        effort: int = 0,
        effort_seconds: float | None = None,
        strip: bool = False,
    ) -> bytes | list[bytes]:
        """A picture as a ``.lic`` file; a sequence of pictures as a list of files.

        Small pictures of like size in a sequence go through the networks together, unless there is a target or effort.
        A file may then differ from that of the picture alone, by what the last bits of floating-point numbers change.
        If several pictures fail, the error is that of the first one in order.

        ``image``: of Pillow's, in any mode but F, upright or with an EXIF orientation, which is applied; or
        uint8 or uint16 of shape (H, W) for gray or (H, W, 1..4) for gray, gray and alpha, RGB, RGB and alpha.
        ``quality`` is 0..100, 40 by default; ``target`` is a size, rate or PSNR instead, for which several
        encodings are tried. ``tune`` is the measure to be good in, squared error or MS-SSIM: the model MODEL-ms-ssim
        encodes where there is one, and rounding and effort serve that measure. ``effort``, 0..9, is how long to look
        for a smaller file at the same quality (docs/effort.md); ``effort_seconds`` bounds that time for each picture.
        A Pillow picture's colour profile, EXIF and XMP are kept, unless ``strip``. Raises UsageError for other
        qualities, tunes or efforts and for a quality beside a target, LicError for other pictures, a target out of
        reach, a model that is not installed or a device that is not there.
        """
        options: dict[str, Any] = {
            "target": target,
            "tune": tune,
            "effort": effort,
            "effort_seconds": effort_seconds,
            "strip": strip,
        }
        if isinstance(image, Image.Image | np.ndarray | Picture | str | bytes):  # the last two are refused there
            return self.encode_result(image, quality, **options).data
        code = _checked_options(quality, target, tune, effort, effort_seconds)
        if target is not None or effort != 0:
            return [self.encode_result(one, quality, **options).data for one in image]

        def prepare(one: AnyPicture) -> tuple[None, Size, _ToEncode]:
            source = self._to_encode(one, strip, tune)
            return None, padded_size(source.picture.width, source.picture.height), source

        def encode_together(sources: list[_ToEncode]) -> list[bytes]:
            from lic import pipeline

            colours = [source.colour for source in sources]
            encoded = pipeline.encode_rgbs(self.load_encoder(tune), colours, [code] * len(sources), tune=tune)
            return [source.file(one) for source, one in zip(sources, encoded, strict=True)]

        return in_batches(image, prepare, encode_together, self._batch_pixels)

    @overload
    def decode(
        self,
        data: bytes,
        *,
        region: Sequence[int] | None = ...,
        preview: Preview | None = ...,
        max_pixels: int = ...,
    ) -> Image.Image: ...
    @overload
    def decode(
        self,
        data: Sequence[bytes],
        *,
        region: Sequence[int] | None = ...,
        preview: Preview | None = ...,
        max_pixels: int = ...,
    ) -> list[Image.Image]: ...
    def decode(
        self,
        data: bytes | Sequence[bytes],
        *,
        region: Sequence[int] | None = None,
        preview: Preview | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> Image.Image | list[Image.Image]:
        """The picture of a ``.lic`` file; of a sequence of files, a list.

        Its mode is L, LA, RGB or RGBA, or I;16 for gray from a source of more than 8 bits; ``info`` holds the
        metadata as for Pillow's own formats. Pillow has no other 16-bit modes: see :meth:`decode_array`.

        ``region`` (x, y, width, height): only these pixels, decoded from the tiles that they need and equal to those of
        the whole picture. ``preview``: only so many groups; "auto": those that a truncated or damaged file holds as a
        whole. :meth:`decode_result` says what a preview lacks.

        Files of a sequence with small pictures of like size go through the networks together, unless there is a region
        or preview. Pixels may then differ by 1 from those of a file alone. If several files fail, the error is that of
        the first one in order.

        Raises CorruptError when ``data`` is no such file or a damaged one, UnsupportedError when it needs a
        newer version or a model that is not installed; UsageError for a region or preview that makes no sense, LicError
        for a region that is not inside the picture and for more pixels than ``max_pixels``, before any work.
        """
        if isinstance(data, bytes | bytearray | memoryview | str):
            data = _checked(data)
            bits = _pillow_bits(data)
            result = self.decode_result(data, bits=bits, region=region, preview=preview, max_pixels=max_pixels)
            return result.picture.to_image()
        if region is not None or preview is not None:
            return [self.decode(one, region=region, preview=preview, max_pixels=max_pixels) for one in data]

        def prepare(one: bytes) -> tuple[tuple[bytes, bytes, int], Size, _ToDecode]:
            source = self._to_decode(one, _pillow_bits(_checked(one)), None, max_pixels)
            header = source.file.container.header
            like = (header.entropy_id, header.synthesis_id, header.tile)
            return like, padded_size(header.width, header.height), source

        def decode_together(sources: list[_ToDecode]) -> list[Image.Image]:
            from lic import pipeline

            containers = [source.file.container for source in sources]
            decoded = pipeline.decode_rgbs(sources[0].model, containers, [source.bits for source in sources])
            return [source.picture(one).to_image() for source, one in zip(sources, decoded, strict=True)]

        return in_batches(data, prepare, decode_together, self._batch_pixels)

    def decode_array(
        self,
        data: bytes,
        *,
        bits: int | None = None,
        region: Sequence[int] | None = None,
        preview: Preview | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> np.ndarray:
        """The samples of a ``.lic`` file: uint8 or uint16, (H, W), or (H, W, 2..4) as for :meth:`encode`.

        ``bits`` is 8 or 16; None: 16 if the source had more than 8. ``region`` and ``preview`` as for :meth:`decode`,
        which raises the same.
        """
        result = self.decode_result(data, bits=bits, region=region, preview=preview, max_pixels=max_pixels)
        return result.picture.to_array()

    def encode_result(
        self,
        image: AnyPicture,
        quality: float | None = None,
        *,
        target: Target | None = None,
        tune: Tune = "psnr",
        effort: int = 0,
        effort_seconds: float | None = None,
        strip: bool = False,
        progress: Progress | None = None,
    ) -> EncodeResult:
        """As :meth:`encode`, with what the encoder knows besides.

        ``progress(done, total)`` is called now and then; with a target, from the start for every encoding.
        """
        code = _checked_options(quality, target, tune, effort, effort_seconds)
        source = self._to_encode(image, strip, tune)
        model = self.load_encoder(tune)
        from lic import pipeline

        def encode_at(code: int, effort: int = effort, seconds: float | None = effort_seconds) -> EncodeResult:
            limit = math.inf if seconds is None else seconds
            encoded = pipeline.encode_rgb(
                model, source.colour, code, effort=effort, tune=tune, seconds=limit, progress=progress
            )
            return source.result(encoded, effort)

        if target is None:
            return encode_at(code)
        value_of = (lambda result: result.psnr) if target.kind == "psnr" else (lambda result: len(result.data))
        pixels = source.picture.width * source.picture.height
        if effort == 0:
            found = search(encode_at, value_of, target, pixels)
        else:
            # Where it lies without effort is cheap to know, and near.
            near = search(lambda code: encode_at(code, 0), value_of, target, pixels, or_nearest=True)
            seconds = None
            if effort_seconds is not None:
                seconds = max(0.0, effort_seconds - (time.perf_counter() - source.start)) / _TRIES_WITH_EFFORT
            found = search(lambda code: encode_at(code, effort, seconds), value_of, target, pixels, first=near.code)
        return replace(found.result, seconds=time.perf_counter() - source.start)

    def decode_result(
        self,
        data: bytes,
        *,
        bits: int | None = None,
        region: Sequence[int] | None = None,
        preview: Preview | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        progress: Progress | None = None,
    ) -> DecodeResult:
        """As :meth:`decode_array`, with everything else that the file holds."""
        if bits not in (None, 8, 16):
            raise UsageError(f"bits must be 8 or 16, not {bits}")
        area = None if region is None else region_of(region)
        wanted = None if preview is None else preview_of(preview)
        source = self._to_decode(data, bits, area, max_pixels, partial=wanted is not None)
        file = source.file
        groups = file.container.header.streams - 1
        if wanted is not None and file.problem is None and (wanted == "auto" or wanted >= groups):
            wanted = None
        from lic import pipeline

        start = time.perf_counter()
        decoded = pipeline.decode_rgb(
            source.model, file.container, bits=source.bits, region=area, preview=wanted, progress=progress
        )
        picture = source.picture(decoded, area)
        notes = () if wanted is None else _preview_notes(decoded, file, source.lost)
        return DecodeResult(picture, decoded.symbols_sha256, time.perf_counter() - start, notes)

    def _to_encode(self, image: AnyPicture, strip: bool, tune: Tune) -> _ToEncode:
        """Loads the model besides, so that this takes no part in the time."""
        if not isinstance(image, Image.Image | np.ndarray | Picture):
            raise UsageError(f"a picture is an image of Pillow's or a NumPy array, not {type(image).__name__}")
        picture = images.picture_of(image, max_pixels=_ANY_SIZE, strip=strip)
        self.load_encoder(tune)
        start = time.perf_counter()
        colour = images.with_hidden_filled(picture.colour, picture.alpha)
        sections = container.metadata_sections(picture.metadata)
        if picture.alpha is not None:
            sections = (images.alpha_section(picture.alpha), *sections)
        return _ToEncode(picture, colour, sections, start)

    def _to_decode(
        self, data: bytes, bits: int | None, area: Region | None, max_pixels: int, *, partial: bool = False
    ) -> _ToDecode:
        """``partial``: what there is of a file will do."""
        if partial:
            file = container.parse_leading(_checked(data), max_pixels=max_pixels)
        else:
            file = container.Leading(container.parse(_checked(data), max_pixels=max_pixels), (), None)
        header = file.container.header
        if area is not None:
            area.check_inside(header.width, header.height)
        alpha, metadata, lost = _beside_colour(file)
        model = self._loaded.get((header.entropy_id, header.synthesis_id))
        if model is None:
            from lic.model import store

            model = self._load(store.find_for(header))
        return _ToDecode(file, alpha, metadata, lost, model, bits or (16 if header.deep else 8))

    @property
    def _batch_pixels(self) -> int:
        return CPU_PIXELS if self.device == "cpu" else CUDA_PIXELS

    def load_encoder(self, tune: Tune = "psnr") -> LoadedModel:
        """Load the model that encodes, once: NAME-TUNE, where there is one (:func:`lic.model.store.find`).

        Raises LicError when the model or the device is not there, or the weights are damaged.
        """
        if tune not in self._encoders:
            from lic.model import store

            self._encoders[tune] = store.find(self._name, tune)
        try:
            return self._load(self._encoders[tune])
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


def encode(
    image: AnyPicture,
    quality: float | None = None,
    *,
    target: Target | None = None,
    tune: Tune = "psnr",
    effort: int = 0,
    effort_seconds: float | None = None,
    strip: bool = False,
    model: str = DEFAULT_MODEL,
    device: str = "auto",
) -> bytes:
    """One picture to one ``.lic`` file: see :meth:`Codec.encode`.

    For several, a Codec loads the model once.
    """
    codec = Codec(model, device)
    return codec.encode(
        image, quality, target=target, tune=tune, effort=effort, effort_seconds=effort_seconds, strip=strip
    )


def decode(
    data: bytes,
    *,
    region: Sequence[int] | None = None,
    preview: Preview | None = None,
    device: str = "auto",
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Image.Image:
    """One ``.lic`` file to one picture: see :meth:`Codec.decode`."""
    return Codec(device=device).decode(data, region=region, preview=preview, max_pixels=max_pixels)


def info(data: bytes) -> Info:
    """What the header of a ``.lic`` file says, without torch and model: see :func:`lic.inspection.info_of`."""
    from lic.inspection import info_of

    return info_of(_checked(data))


def _checked_options(
    quality: float | None, target: Target | None, tune: Tune, effort: int, effort_seconds: float | None
) -> int:
    """The quality code of the options of :meth:`Codec.encode`. Raises UsageError."""
    if quality is not None and target is not None:
        raise UsageError("a quality and a target exclude each other")
    if target is not None and not isinstance(target, Target):
        raise UsageError(f"a target is a lic.Target, for instance lic.Target('size', 100_000), not {target!r}")
    if tune not in TUNES:
        raise UsageError(f"tune must be one of {', '.join(TUNES)}, not {tune!r}")
    if effort not in range(MAX_EFFORT + 1):
        raise UsageError(f"effort must be a whole number from 0 to {MAX_EFFORT}, not {effort}")
    if effort_seconds is not None and not effort_seconds >= 0:  # also refuses NaN
        raise UsageError(f"the seconds of an effort must not be negative: {effort_seconds}")
    try:
        return code_of(DEFAULT_QUALITY if quality is None else quality)
    except TypeError:
        raise UsageError(f"quality must be a number from 0 to 100, not {quality!r}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _pillow_bits(data: bytes) -> int | None:
    """The depth at which Pillow can hold a file's picture; None: that of the source."""
    return None if container.parse_header(data).header.gray else 8


def _checked(data: Any) -> bytes:
    """The bytes of a file. Raises UsageError for what is no bytes, say its name."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UsageError(f"the data of a .lic file is bytes, not {type(data).__name__}")
    return bytes(data)


def _beside_colour(file: container.Leading) -> tuple[np.ndarray | None, container.Metadata, list[str]]:
    """Transparency and metadata, and which of them a truncated or damaged file has lost.

    Raises CorruptError or UnsupportedError where a file that is whole holds some that cannot be read.
    """
    header, sections = file.container.header, file.container.sections
    lost = ["transparency"] if container.ALPHA in file.missing else []
    lost += [kind.upper() for kind in container.metadata_kinds(file.missing)]
    alpha, metadata = None, container.Metadata()
    try:
        for section in sections:
            if section.kind == container.ALPHA:
                alpha = images.alpha_of(section, header.width, header.height)
    except (CorruptError, UnsupportedError):
        if file.problem is None:
            raise
        lost.append("transparency")
    try:
        metadata = container.metadata_of(sections)
    except CorruptError:
        if file.problem is None:
            raise
        lost.append("metadata")
    return alpha, metadata, lost


def _preview_notes(decoded: Decoded, file: container.Leading, lost: Sequence[str]) -> tuple[str, ...]:
    """In words, what a preview shows and what it lacks."""
    shown = sorted(set(decoded.groups) - {0})
    several = f"{shown[0]} to {shown[-1]}" if len(shown) > 1 else f"{shown[0]}"
    notes = [f"preview of {several} of {file.container.header.streams - 1} groups"]
    if file.problem is not None:
        notes.append(file.problem)
    if missing := decoded.groups.count(0):
        notes.append(f"{missing} of {len(decoded.groups)} tiles are missing, and gray")
    if decoded.all_symbols and decoded.symbols_sha256 is None:
        notes.append("the symbols fail their checksum: part of the picture is wrong")
    if decoded.all_symbols and container.FILTER in file.missing:
        lost = [*lost, "filter"]
    if lost:
        notes.append(f"without its {', '.join(lost)}")
    return tuple(notes)
