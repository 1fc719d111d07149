"""Does this machine compute the same symbols whatever the circumstances?

Every way of computing the entropy path that this process can take is compared with the plainest one: the symbols that
come out of a file, the table row of every symbol, and the bytes that the symbols are coded to again.
`scripts/conformance.py` adds what needs processes of their own (instruction sets), `lic doctor` runs a short form.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch

from lic import exact
from lic.coder import Tables
from lic.container import Container
from lic.model import store
from lic.model.context import Geometry, Prediction
from lic.model.dependent import Dependent
from lic.pipeline.codec import SymbolChecks, latent_boxes
from lic.pipeline.tile import (
    Latents,
    Part,
    Reader,
    SymbolCoder,
    Writer,
    code_step,
    code_tiles,
    places,
    predicted_integers,
)


@dataclass(frozen=True)
class Digest:
    """SHA-256 of the symbols of a file, of their table rows, and of their streams."""

    symbols: str
    rows: str
    streams: str


class _Recorder:
    """A coder that notes the rows it is asked for."""

    def __init__(self, inner: SymbolCoder) -> None:
        self.inner, self.rows = inner, hashlib.sha256()

    def code(
        self,
        stream: int,
        rows: np.ndarray,
        tables: Tables,
        values: np.ndarray | None,
        *,
        last: bool,
    ) -> np.ndarray:
        self.rows.update(rows.astype("<i4").tobytes())
        return self.inner.code(stream, rows, tables, values, last=last)

    def code_chain(self, stream: int, rows: np.ndarray, quantiser: Dependent, values: np.ndarray | None) -> np.ndarray:
        self.rows.update(rows.astype("<i4").tobytes())
        return self.inner.code_chain(stream, rows, quantiser, values)


@dataclass(frozen=True)
class File:
    """The tiles of a container: geometry, streams and, once decoded, latents."""

    quality: int
    geometries: list[Geometry]
    streams: list[tuple[bytes, ...]]
    latents: list[Latents]


def decoded(model: store.LoadedModel, container: Container) -> File:
    """A file with its latents. Raises CorruptError if it does not decode."""
    header = container.header
    geometries = [box[0] for box in latent_boxes(header.width, header.height, header.tile)]
    streams = list(container.tiles)
    latents = [
        code_tiles(model, geometry, [header.quality], [Reader(tile)], None).latents
        for geometry, tile in zip(geometries, streams, strict=True)
    ]
    return File(header.quality, geometries, streams, latents)


def streams_of(model: store.LoadedModel, file: File) -> list[tuple[bytes, ...]]:
    """The streams of each tile, coded again from the latents."""
    writers = [Writer() for _ in file.latents]
    for geometry, latents, writer in zip(file.geometries, file.latents, writers, strict=True):
        code_tiles(model, geometry, [file.quality], [writer], latents)
    return [tuple(writer.streams) for writer in writers]


def measure(
    model: store.LoadedModel, file: File, *, batch: int = 1, position: int = 0, backwards: bool = False
) -> Digest:
    """Digest of a file whose tiles are coded in batches, with other latents in the other places of the batch.

    With a batch of 1 the tiles are decoded from their streams besides; ``backwards`` takes the last one first.
    """
    order = range(len(file.latents))
    results: dict[int, tuple[Latents, str, tuple[bytes, ...]]] = {}
    for i in reversed(order) if backwards else order:
        geometry = replace(file.geometries[i], batch=batch)
        given = file.latents[i]
        z, y = (_stack(t.to(model.device), batch, position) for t in (given.z, given.y))
        stack = Latents(z, y)
        writers = [Writer() for _ in range(batch)]
        coders = [_Recorder(writer) for writer in writers]
        code_tiles(model, geometry, [file.quality] * batch, coders, stack)
        latents, rows_seen = given, {coders[position].rows.hexdigest()}
        if batch == 1 and model.net.exact:
            reader = _Recorder(Reader(file.streams[i]))
            latents = code_tiles(model, geometry, [file.quality], [reader], None).latents
            rows_seen.add(reader.rows.hexdigest())
        results[i] = latents, "+".join(sorted(rows_seen)), tuple(writers[position].streams)
    checks, rows, streams = SymbolChecks(), hashlib.sha256(), hashlib.sha256()
    for i in order:
        checks.add(results[i][0])
        rows.update(results[i][1].encode())
        for stream in results[i][2]:
            streams.update(len(stream).to_bytes(4, "little") + stream)
    return Digest(checks.hexdigest(), rows.hexdigest(), streams.hexdigest())


def measure_at_once(model: store.LoadedModel, file: File) -> Digest:
    """As measure, with the rows of all steps from one pass over the whole of each tile."""
    plain = measure(model, file)
    net, schedule = model.net, model.net.context.schedule
    rows = hashlib.sha256()
    for geometry, given in zip(file.geometries, file.latents, strict=True):
        with exact.exact_arithmetic(), torch.no_grad():
            code = torch.tensor([file.quality], device=model.device)
            whole = net.predict(given.z.to(model.device), given.y.to(model.device), code)
        recorder = _Recorder(Writer())
        bucket = int(net.prior.bucket(code)) * net.config.hyper_latent
        z_rows = torch.arange(net.config.hyper_latent).expand(given.z.shape) + bucket
        recorder.rows.update(z_rows.numpy().astype("<i4").tobytes())
        for step, place in enumerate(places(schedule, geometry)):
            predicted = predicted_integers(Prediction(*(schedule.take(t, step) for t in whole)))
            part = Part(schedule.take(given.y, step).to(model.device), None)
            code_step(model, place, predicted, [recorder], part)
        rows.update(recorder.rows.hexdigest().encode())
    return replace(plain, rows=rows.hexdigest())


def _stack(x: torch.Tensor, batch: int, position: int) -> torch.Tensor:
    """x (1, h, w, C) at its position in a batch, shifted copies of it elsewhere."""
    return torch.cat([x.roll((b - position, 2 * (b - position)), (1, 2)) for b in range(batch)])


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Variant = tuple[str, Callable[[], AbstractContextManager[object]], Callable[[store.LoadedModel, File], Digest]]


def variants(short: bool = False) -> list[Variant]:
    """Name, circumstances and measurement of every variant; the first one is the plainest."""
    plain = contextlib.nullcontext
    found: list[Variant] = [
        ("1 thread", lambda: threads(1), measure),
        ("2 threads", lambda: threads(2), measure),
        ("all at once", plain, measure_at_once),
        ("oneDNN off", _without_onednn, measure),
        ("float64", lambda: exact.use_kernel("float64"), measure),
        ("batch 16", plain, lambda m, f: measure(m, f, batch=16, position=7)),
    ]
    if short:
        return found
    return [
        *found,
        ("int8", lambda: exact.use_kernel("int8"), measure),
        ("batch 8", plain, lambda m, f: measure(m, f, batch=8, position=0)),
        ("batch 33", plain, lambda m, f: measure(m, f, batch=33, position=32)),
        ("batch 16, oneDNN off", _without_onednn, lambda m, f: measure(m, f, batch=16, position=3)),
        ("tiles backwards", plain, lambda m, f: measure(m, f, backwards=True)),
    ]


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    mkldnn = torch.backends.mkldnn
    before = mkldnn.enabled
    mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        mkldnn.enabled = before


def differences(model: store.LoadedModel, file: File, expected: Digest, chosen: Sequence[Variant]) -> list[str]:
    """What differs from ``expected``, one phrase for each variant that does."""
    found = []
    for name, circumstances, measured in chosen:
        with circumstances():
            result = measured(model, file)
        wrong = [part for part in ("symbols", "rows", "streams") if getattr(result, part) != getattr(expected, part)]
        if wrong:
            found.append(f"{name}: other {', '.join(wrong)}")
    return found
