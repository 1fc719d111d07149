"""Encoding and decoding of the colour of pictures, RGB or gray.

Pictures of one padded grid, that is with the same sides in units of 64 pixels, can go through the networks together.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lic.container import Container, Header, tile_boxes
from lic.errors import CorruptError, UnsupportedError
from lic.model.config import DOWNSAMPLING, HYPER_DOWNSAMPLING
from lic.model.context import Geometry
from lic.model.store import LoadedModel
from lic.part import Preview, Region
from lic.pipeline import windows
from lic.pipeline.distortion import DISTORTIONS
from lic.pipeline.optimise import EFFORTS, Box, optimise, quarter
from lic.pipeline.restoration import VERSION, Restoration
from lic.pipeline.tile import CodedTiles, Latents, LeadingReader, Reader, Writer, code_tiles
from lic.quality import Tune, lambda_of

TILE = 1024  # side of the tiles of an image with more pixels than LARGEST_TILE, counted with its padding
LARGEST_TILE = 1536 * 1536

Progress = Callable[[int, int], None]  # units of work done, and in all: tiles, times the passes over them


@dataclass(frozen=True)
class Encoded:
    """A coded picture, and the float model's estimate of its streams in bits."""

    container: Container
    synthesised: Callable[[], np.ndarray] = field(repr=False)  # computes the reconstruction, once
    estimated_bits: float
    symbols_sha256: str

    @property
    def reconstruction(self) -> np.ndarray:
        """What the decoder will show, of the shape and type of what was encoded; the first call takes a synthesis."""
        return self.synthesised()

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which need not have the model: with the reconstruction itself."""
        return self.__dict__ | {"synthesised": functools.partial(np.asarray, self.reconstruction)}


@dataclass(frozen=True)
class Decoded:
    """A decoded picture or region. ``rgb``: uint8 or uint16, (H, W, 3), or (H, W, 1) if gray.

    ``symbols_sha256``: None unless all symbols were decoded and are those that were coded; ``all_symbols``: whether
    all were decoded. ``groups``: how many of each tile that was needed; 0 where a tile is missing, and gray.
    """

    rgb: np.ndarray
    symbols_sha256: str | None
    all_symbols: bool
    groups: tuple[int, ...]


class SymbolChecks:
    """Checksums of all symbols: per tile z then y, each (C, h, w) in raster order as little-endian int32."""

    def __init__(self) -> None:
        self.crc, self._sha = 0, hashlib.sha256()

    def add(self, latents: Latents, index: int = 0) -> None:
        """The tile with this index in its batch."""
        for tensor in (latents.z, latents.y):
            data = tensor[index].permute(2, 0, 1).to(torch.int32).cpu().contiguous().numpy().astype("<i4").tobytes()
            self.crc = zlib.crc32(data, self.crc)
            self._sha.update(data)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


@torch.no_grad()
def encode_rgb(
    model: LoadedModel,
    rgb: np.ndarray,
    quality_code: int,
    *,
    effort: int = 0,
    tune: Tune = "psnr",
    seconds: float = math.inf,
    progress: Progress | None = None,
) -> Encoded:
    """Encode uint8 or uint16, (H, W, 3) or gray (H, W, 1), at a quality code of :mod:`lic.quality`.

    ``effort``, 0..9, is how long to look for integers that cost less (:mod:`lic.pipeline.optimise`); what comes out
    has never more bits + λ·error than with effort 0. ``tune`` says what error is.
    ``seconds`` bounds the time of the whole: no pass begins that would probably end later.
    """
    began = time.monotonic()
    code = _code_tensor(model, [quality_code])
    grid = _one_grid([(rgb.shape[1], rgb.shape[0])])
    tile, boxes = _tiles_of(grid)
    passes = EFFORTS[effort].passes
    # The work of a pass is about that of coding everything once; coding is done twice if there are passes.
    units = len(boxes) * (1 if passes == 0 else 2 + passes + 1)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, units)

    y, weight = _to_round(model, [rgb], grid, code, tune)
    (encoded,), known = _coded(model, [rgb], [quality_code], tile, boxes, y, None, weight, tune, report)
    if passes == 0:
        return encoded
    coded_once = time.monotonic() - began

    def is_over(pass_seconds: float) -> bool:
        return time.monotonic() - began + pass_seconds + coded_once > seconds

    with model.net.in_floating_point():
        found = optimise(
            model.net,
            rgb,
            code,
            boxes,
            y,
            weight,
            known,
            encoded.estimated_bits,
            EFFORTS[effort],
            DISTORTIONS[tune],
            is_over=is_over,
            progress=lambda done: report(len(boxes) * (1 + done)),
        )
    (better,), _ = _coded(
        model, [rgb], [quality_code], tile, boxes, *found, weight, tune, lambda done: report(units - len(boxes) + done)
    )
    best = min(encoded, better, key=lambda e: _cost(model, e, rgb, tune))
    header = replace(best.container.header, effort=effort)
    return replace(best, container=replace(best.container, header=header))


@torch.no_grad()
def encode_rgbs(
    model: LoadedModel, rgbs: Sequence[np.ndarray], quality_codes: Sequence[int], *, tune: Tune = "psnr"
) -> list[Encoded]:
    """Encode pictures of one padded grid together, each as :func:`encode_rgb` does, at its own quality code.

    Each is uint8 or uint16, (H, W, 3) or gray (H, W, 1). Its latents may differ from those that it has alone in the
    last bits, and symbols with them. Raises ValueError if the padded grids differ.
    """
    grid = _one_grid([(rgb.shape[1], rgb.shape[0]) for rgb in rgbs])
    code = _code_tensor(model, quality_codes)
    y, weight = _to_round(model, rgbs, grid, code, tune)
    return _coded(model, rgbs, quality_codes, *_tiles_of(grid), y, None, weight, tune, lambda done: None)[0]


def _to_round(
    model: LoadedModel, rgbs: Sequence[np.ndarray], grid: Geometry, code: Tensor, tune: Tune
) -> tuple[Tensor, Tensor]:
    """Latents of pictures of one padded grid, not rounded, and their weight: (B, h, w, M) each, as in `Latents`."""
    distortion = DISTORTIONS[tune]
    worth = windows.rounding_worth(model.net, rgbs, grid, code, distortion)
    y = windows.analysis(model.net, rgbs, grid, code, worth, distortion.corrections)
    return y, worth * model.net.rounding_weight(code, distortion.is_squared_error)[:, None, None]


def _one_grid(sizes: Sequence[tuple[int, int]]) -> Geometry:
    """The padded grid of pictures of these widths and heights. Raises ValueError if they have several."""
    grids = {_geometry(*size) for size in sizes}
    if len(grids) != 1:
        raise ValueError(f"pictures of {len(grids)} padded grids do not go through the networks together")
    return grids.pop()


def _tiles_of(grid: Geometry) -> tuple[int, list[Box]]:
    """The side of the tiles that an encoder cuts pictures of a padded grid into, 0 for none, and their boxes."""
    width, height = grid.width * DOWNSAMPLING, grid.height * DOWNSAMPLING
    tile = TILE if width * height > LARGEST_TILE else 0
    return tile, list(latent_boxes(width, height, tile))


def _code_tensor(model: LoadedModel, quality_codes: Sequence[int]) -> Tensor:
    return torch.tensor(quality_codes, dtype=torch.float32, device=model.device)


def _cost(model: LoadedModel, encoded: Encoded, rgb: np.ndarray, tune: Tune) -> float:
    """Bits of the streams and sections + λ·error."""
    container = encoded.container
    bits = 8 * sum(len(stream) for streams in container.tiles for stream in streams)
    bits += 8 * sum(len(section.data) for section in container.sections)
    error = windows.error_between(model.net, encoded.reconstruction, rgb, DISTORTIONS[tune])
    return bits + lambda_of(container.header.quality) * error


def _coded(
    model: LoadedModel,
    rgbs: Sequence[np.ndarray],
    quality_codes: Sequence[int],
    tile: int,
    boxes: Sequence[Box],
    y: Tensor,
    z: Tensor | None,
    weight: Tensor,
    tune: Tune,
    report: Callable[[int], None],
) -> tuple[list[Encoded], tuple[Tensor, Tensor, Tensor]]:
    """Code latents y (B, h, w, M) of pictures of one padded grid, z made of them if it is None.

    ``weight`` is that of :class:`Latents`. Also returns the integers y and z that were coded, and the dequantised
    latents. ``report`` is told how many tiles are done.
    """
    net, batch = model.net, len(rgbs)
    code = _code_tensor(model, quality_codes)
    integers = torch.empty_like(y)
    hyper = y.new_empty(batch, y.shape[1] // 4, y.shape[2] // 4, net.config.hyper_latent)
    dequantised = torch.empty_like(y)
    checks = [SymbolChecks() for _ in rgbs]
    bits = [0.0] * batch
    tiles: list[list[tuple[bytes, ...]]] = [[] for _ in rgbs]
    for done, (geometry, rows, columns) in enumerate(boxes):
        at, at_z = (slice(None), rows, columns), (slice(None), quarter(rows), quarter(columns))
        known_z = torch.round(net.hyper_analysis(y[at], code)) if z is None else z[at_z]
        writers = [Writer() for _ in rgbs]
        known = Latents(known_z, y[at], weight[at])
        coded = code_tiles(model, replace(geometry, batch=batch), quality_codes, writers, known)
        for b, estimated_bits in enumerate(coded.estimated_bits.tolist()):
            checks[b].add(coded.latents, b)
            bits[b] += estimated_bits
            tiles[b].append(tuple(writers[b].streams))
        integers[at], hyper[at_z], dequantised[at] = coded.latents.y, coded.latents.z, coded.dequantised
        report(done + 1)
    containers = []
    found = windows.restorations(net, dequantised, code, rgbs, DISTORTIONS[tune])
    for rgb, quality_code, check, streams, restoration in zip(rgbs, quality_codes, checks, tiles, found, strict=True):
        header = Header(
            width=rgb.shape[1],
            height=rgb.shape[0],
            quality=quality_code,
            model=model.info.name,
            entropy_id=model.info.entropy_id,
            synthesis_id=model.info.synthesis_id,
            tile=tile,
            streams=len(streams[0]),
            symbols_crc=check.crc,
            gray=rgb.shape[2] == 1,
            deep=rgb.dtype == np.uint16,
            version=1 if restoration is None else VERSION,
        )
        sections = () if restoration is None else (restoration.section(),)
        containers.append(Container(header, tuple(streams), sections))
    synthesised = [
        functools.cache(functools.partial(_reconstruction, model, dequantised[b : b + 1], container))
        for b, container in enumerate(containers)
    ]
    hashes = [check.hexdigest() for check in checks]
    encoded = [Encoded(*parts) for parts in zip(containers, synthesised, bits, hashes, strict=True)]
    return encoded, (integers, hyper, dequantised)


@torch.no_grad()
def _reconstruction(model: LoadedModel, dequantised: Tensor, container: Container) -> np.ndarray:
    """The whole picture from its dequantised latents (1, h, w, M), with the bits of its source."""
    header = container.header
    restoration = Restoration.of(container)
    (pixels,) = _pixels(model, dequantised, [header], [16 if header.deep else 8], [restoration], None)
    return pixels


@torch.no_grad()
def decode_rgb(
    model: LoadedModel,
    container: Container,
    *,
    bits: int = 8,
    region: Region | None = None,
    preview: Preview | None = None,
    progress: Progress | None = None,
) -> Decoded:
    """Decode a container made with this model to 8 or 16 bits per sample.

    ``region``: only these pixels, which must be inside the picture: the same as those of the whole picture, from the
    tiles and windows that they need. ``preview``: only so many groups, of a container whose tiles may lack streams
    at the end; "auto" takes of each tile what decodes. Latents that are not decoded become what is predicted of them.

    Raises CorruptError if the symbols are not those that were coded; for a region only where a stream does not decode.
    A preview raises it if a tile has fewer groups than asked for, and with "auto" if no tile has any.
    """
    return _decoded(model, [container], [bits], region, preview, progress)[0]


@torch.no_grad()
def decode_rgbs(model: LoadedModel, containers: Sequence[Container], bits: Sequence[int]) -> list[Decoded]:
    """Decode containers of one padded grid and one tile size together, each as :func:`decode_rgb` does, to its bits.

    The symbols are the same as alone. Raises what :func:`decode_rgb` raises if that is so for any of them, and
    ValueError if the padded grids or tile sizes differ.
    """
    return _decoded(model, containers, bits, None, None, None)


def _decoded(
    model: LoadedModel,
    containers: Sequence[Container],
    bits: Sequence[int],
    region: Region | None,
    preview: Preview | None,
    progress: Progress | None,
) -> list[Decoded]:
    """The body of :func:`decode_rgb` and :func:`decode_rgbs`; ``region`` and ``preview`` are for one container only."""
    net, headers = model.net, [container.header for container in containers]
    full = _one_grid([(header.width, header.height) for header in headers])
    first = headers[0]
    if any(header.tile != first.tile for header in headers):
        raise ValueError("pictures of several tile sizes do not go through the networks together")
    for header in headers:
        if (header.entropy_id, header.synthesis_id) != (model.info.entropy_id, model.info.synthesis_id):
            raise UnsupportedError(f"made with other weights: {header.model} {header.entropy_id.hex()}")
        if header.streams != 1 + net.context.schedule.stream_of(net.context.schedule.steps(full) - 1) + 1:
            raise CorruptError(f"damaged: {header.streams} streams do not fit the model {header.model}")
    area = windows.Area(0, 0, full.height, full.width) if region is None else _latents_of(region)
    given = windows.input_of(net, area, full)
    needed = given if net.config.non_local_heads else area.grown(windows.HALO, full)
    tiles = []
    for (geometry, rows, columns), *streams in zip(
        latent_boxes(first.width, first.height, first.tile), *(container.tiles for container in containers), strict=True
    ):
        box = windows.Area(rows.start, columns.start, rows.stop, columns.stop)
        if box.overlap(needed):
            tiles.append((replace(geometry, batch=len(containers)), box, streams))
    size = (given.bottom - given.top, given.right - given.left)
    dequantised = torch.zeros(len(containers), *size, net.config.latent, device=model.device)
    checks, groups = [SymbolChecks() for _ in containers], []
    for done, (geometry, box, streams) in enumerate(tiles):
        coded, count = _read_tiles(model, geometry, headers, streams, preview)
        groups.append(count)
        if coded is not None:
            for b, check in enumerate(checks):
                check.add(coded.latents, b)
            part = box.overlap(given)
            assert part is not None  # what is needed is part of what is given
            part.of(dequantised, given).copy_(part.of(coded.dequantised, box))
        if progress:
            progress(done + 1, len(tiles))
    all_symbols = len(tiles) == len(containers[0].tiles) and min(groups) == first.streams - 1
    sound = [all_symbols and check.crc == header.symbols_crc for check, header in zip(checks, headers, strict=True)]
    if all_symbols and not all(sound) and preview is None:
        raise CorruptError("the decoded symbols fail their checksum: damaged, or this machine computes differently")
    if not any(groups):
        raise CorruptError("no group is whole: there is nothing to show")
    complete = min(groups) == first.streams - 1  # a filter is made for what all groups give
    restorations = [_restoration(container, preview) if complete else None for container in containers]
    pictures = _pixels(model, dequantised, headers, bits, restorations, region)
    origin = region or Region(0, 0, first.width, first.height)
    for (_, box, _), count in zip(tiles, groups, strict=True):
        if not count:
            rows, columns = _pixels_of(box.top, box.bottom, origin.y), _pixels_of(box.left, box.right, origin.x)
            pictures[0][rows, columns] = 2 ** (bits[0] - 1)
    return [
        Decoded(pixels, check.hexdigest() if is_sound else None, all_symbols, tuple(groups))
        for pixels, check, is_sound in zip(pictures, checks, sound, strict=True)
    ]


def _read_tiles(
    model: LoadedModel,
    geometry: Geometry,
    headers: Sequence[Header],
    streams_of: Sequence[tuple[bytes, ...]],
    preview: Preview | None,
) -> tuple[CodedTiles | None, int]:
    """A tile of each picture and how many groups of it are decoded; None and 0 if that is none. A preview is of one."""
    if preview is None:
        readers = [Reader(streams) for streams in streams_of]
        codes = [header.quality for header in headers]
        return code_tiles(model, geometry, codes, readers, None), headers[0].streams - 1
    (header,), (streams,) = headers, streams_of
    if preview != "auto":
        wanted = min(preview, header.streams - 1)
        if len(streams) <= wanted:
            whole = max(0, len(streams) - 1)
            raise CorruptError(f"truncated: {whole} of {wanted} groups are whole; --preview auto takes what there is")
        streams = streams[: 1 + wanted]
    while len(streams) > 1:
        reader = LeadingReader(streams)
        try:
            return code_tiles(model, geometry, [header.quality], [reader], None), len(streams) - 1
        except CorruptError:
            if preview != "auto":
                raise
            streams = streams[: reader.stream]
    return None, 0


def _restoration(container: Container, preview: Preview | None) -> Restoration | None:
    """The filter of a picture; a preview, which may be of a damaged file, does without one that cannot be read."""
    try:
        return Restoration.of(container)
    except CorruptError:
        if preview is None:
            raise
        return None


def _pixels(
    model: LoadedModel,
    dequantised: Tensor,
    headers: Sequence[Header],
    bits: Sequence[int],
    restorations: Sequence[Restoration | None],
    region: Region | None,
) -> list[np.ndarray]:
    """The pixels of a region, or of the whole of each picture, from the latents that its windows are given."""
    grid = _geometry(headers[0].width, headers[0].height)
    area = windows.Area(0, 0, grid.height, grid.width) if region is None else _latents_of(region)
    code = _code_tensor(model, [header.quality for header in headers])
    samples = [windows.Samples(header.gray, depth) for header, depth in zip(headers, bits, strict=True)]
    pictures = windows.synthesis(model.net, dequantised, code, samples, restorations=restorations, grid=grid, area=area)
    found = []
    for header, pixels in zip(headers, pictures, strict=True):
        wanted = region or Region(0, 0, header.width, header.height)
        top, left = wanted.y - area.top * DOWNSAMPLING, wanted.x - area.left * DOWNSAMPLING
        found.append(pixels[top : top + wanted.height, left : left + wanted.width].cpu().numpy())
    return found


def _latents_of(region: Region) -> windows.Area:
    """The positions of the latent grid whose pixels are in a region."""
    n = DOWNSAMPLING
    bottom, right = region.y + region.height, region.x + region.width
    return windows.Area(region.y // n, region.x // n, -(-bottom // n), -(-right // n))


def _pixels_of(start: int, end: int, origin: int) -> slice:
    """The pixels of latents start..end - 1 along one axis of a region that begins at pixel ``origin``."""
    return slice(max(0, start * DOWNSAMPLING - origin), max(0, end * DOWNSAMPLING - origin))


def _geometry(width: int, height: int) -> Geometry:
    """Latent grid of so many pixels, padded to whole hyper-latent positions."""
    n = HYPER_DOWNSAMPLING // DOWNSAMPLING
    return Geometry(1, -(-height // HYPER_DOWNSAMPLING) * n, -(-width // HYPER_DOWNSAMPLING) * n)


def latent_boxes(width: int, height: int, tile: int) -> Iterator[tuple[Geometry, slice, slice]]:
    """Geometry of each tile and its rows and columns in the latent grid of the image."""
    for x0, y0, x1, y1 in tile_boxes(width, height, tile):
        geometry = _geometry(x1 - x0, y1 - y0)
        top, left = y0 // DOWNSAMPLING, x0 // DOWNSAMPLING
        yield geometry, slice(top, top + geometry.height), slice(left, left + geometry.width)
