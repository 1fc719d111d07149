"""The codec against a decoder that is written from the specification alone: both find the same symbols."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_decoder as reference
import torch
from conftest import DATA
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import MODELS, TINY, file_of, latents, packed, write_small_model

import lic
from lic import conformance
from lic.coder import Tables
from lic.container import pack, parse
from lic.model.context import Geometry
from lic.model.neighbours import Neighbours
from lic.model.store import LoadedModel, load, load_file, read_info, write_model
from lic.pipeline.codec import SymbolChecks, latent_boxes
from lic.pipeline.tile import Latents, Writer, code_tiles
from lic.quality import MAX_CODE

BASE = Path(__file__).parent.parent / "weights" / "base.safetensors"
DEPENDENT = DATA / "models" / "tiny-dependent.safetensors"
GOLDEN = sorted((DATA / "golden").glob("*.lic"))


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 (height, width, channels), (height, width) for one channel: gradients, an edge and noise."""
    y, x, c = np.mgrid[:height, :width, :channels]
    noise = np.random.default_rng(height * width).normal(0, 12, y.shape)
    smooth = 2 * x + y * (c + 1) + 90 * (x > y) + noise
    image: np.ndarray = np.clip(smooth, 0, 255).astype(np.uint8)
    return image[..., 0] if channels == 1 else image


CASES = {
    "one pixel": (picture(1, 1), 50),
    "64x64, lowest quality": (picture(64, 64), 0),
    "150x100": (picture(100, 150), 20),
    "200x136": (picture(136, 200), 80),
    "gray": (picture(70, 90, 1), 50),
    "alpha": (picture(64, 64, 4), 30.7),
    "noise, highest quality": (np.random.default_rng(0).integers(0, 256, (65, 64, 3), np.uint8), 100),
    "white": (np.full((64, 128, 3), 255, np.uint8), 0),
}


@cache
def model_of(name: str) -> LoadedModel:
    return load(name)


def with_checksum(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(4, "big")


def bits(number: int, n: int) -> str:
    return f"{number:0{n}b}"


def array(numbers: list[int]) -> str:
    n = max(1, max(numbers).bit_length())
    return bits(n - 1, 5) + "".join(bits(number, n) for number in numbers)


def tiled(files: list[bytes], widths: list[int], height: int) -> bytes:
    """One file of tiles of 64 pixels, side by side, from files of a picture each. height: at most 64."""
    parts = [reference.read_container(file).streams[0] for file in files]
    written = b"".join(
        symbols.astype("<i4").tobytes() for file in files for symbols in reference.decode_symbols(file, TINY).tiles[0]
    )
    fixed = files[0][:10] + zlib.crc32(written).to_bytes(4, "big") + files[0][14:17] + bytes([files[0][17] | 1])
    streams = [part[i] for i in range(len(parts[0])) for part in parts]
    name = bits(4, 5) + "".join(bits(ord(letter) - ord("a"), 6) for letter in "tiny")
    size, side, lengths = array([sum(widths) - 1, height - 1]), bits(0, 16), array([len(stream) for stream in streams])
    variable = "0" + name + size + side + lengths
    variable += "0" * (-len(variable) % 8)
    return with_checksum(fixed + int(variable, 2).to_bytes(len(variable) // 8, "big") + b"".join(streams))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden files, one for each of CASES, a tiled one and one of the base model."""
    codec = lic.Codec(model="tiny")
    made = {name: codec.encode(image, quality=quality) for name, (image, quality) in CASES.items()}
    whole = picture(50, 160)
    made["tiled"] = tiled(
        [codec.encode(whole[:, x : x + 64], quality=40) for x in (0, 64, 128)], widths=[64, 64, 32], height=50
    )
    # It has several mixers, so that it shifts windows, which the tiny model does not.
    made["base model"] = lic.encode(picture(60, 130), quality=30, model="base")
    folder = tmp_path_factory.mktemp("files")
    paths = {path.name: path for path in GOLDEN}
    for i, (name, data) in enumerate(made.items()):
        paths[name] = folder / f"{i}.lic"
        paths[name].write_bytes(data)
    return paths


@pytest.fixture(scope="module")
def expected(files: dict[str, Path]) -> dict[str, str]:
    """For each of the files the SHA-256 that `lic verify` finds."""
    command = [sys.executable, "-m", "lic", "verify", "--json", *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    found = [json.loads(line)["symbols_sha256"] for line in done.stdout.splitlines()]
    return dict(zip(files, found, strict=True))


@pytest.mark.parametrize("name", [*(path.name for path in GOLDEN), *CASES, "tiled", "base model"])
def test_same_symbols(name: str, files: dict[str, Path], expected: dict[str, str]) -> None:
    data = files[name].read_bytes()
    weights = BASE if lic.info(data).model == "base" else DATA / "models" / f"{lic.info(data).model}.safetensors"
    assert reference.decode_symbols(data, weights).sha256 == expected[name]


def assert_same(model: LoadedModel, data: bytes, written: list[Latents]) -> None:
    """Both decoders find in a file what was written into it."""

    def arrays(tiles: list[Latents]) -> list[list[np.ndarray]]:
        return [[t[0].permute(2, 0, 1).int().numpy() for t in (tile.z, tile.y)] for tile in tiles]

    np.testing.assert_equal(arrays(conformance.decoded(model, parse(data)).latents), arrays(written))
    found = reference.decode_symbols(data, model.info.path).tiles
    np.testing.assert_equal([list(tile) for tile in found], arrays(written))


@pytest.mark.parametrize("name", ["tiny", *MODELS])
@example(width=130, height=60, code=20_000, tile=64, seed=0, wild=97)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 100),
    code=st.integers(0, MAX_CODE),
    tile=st.sampled_from([0, 128]),
    seed=st.integers(0, 2**32 - 1),
    wild=st.sampled_from([0, 7, 97]),
)
@settings(max_examples=3, deadline=None, derandomize=True)
def test_same_symbols_whatever_they_are(
    name: str, width: int, height: int, code: int, tile: int, seed: int, wild: int
) -> None:
    model = model_of(name)
    assert_same(model, *file_of(model, width, height, code, tile, seed, wild))


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("groupedmixer", {"slices": [8, 16, 24], "width": 32, "heads": 4, "mixers": 2, "window": 4}),
        ("econtextformer", {"segments": [48], "order": "spatial", "width": 16, "heads": 1, "layers": 3, "window": 4}),
        (
            "econtextformer",
            {"segments": [1, 46, 1], "order": "channel", "width": 24, "heads": 3, "layers": 2, "window": 4},
        ),
        ("msp", {"levels": 1, "slices": [48], "width": 16, "depth": 1}),
        ("msp", {"levels": 2, "slices": [48], "width": 24, "depth": 1}),
        ("msp", {"levels": 1, "slices": [8, 16, 24], "width": 16, "depth": 2}),
        ("nlaic", {"slices": [48], "filters": 4, "features": 8, "widths": [12, 8]}),
    ],
)
def test_same_symbols_with_other_options(tmp_path: Path, system: str, options: dict[str, Any]) -> None:
    (tmp_path / TINY.name).write_bytes(TINY.read_bytes())
    model = write_small_model(tmp_path / "other.safetensors", system, options, seed=2)
    assert_same(model, *file_of(model, width=150, height=60, code=35_000, tile=128, seed=5, wild=97))


def test_same_symbols_with_non_local_attention(tmp_path: Path) -> None:
    """In a whole block of hyper-latents and a part of the next one."""
    (tmp_path / TINY.name).write_bytes(TINY.read_bytes())
    options = {"slices": [48], "filters": 4, "features": 8, "widths": [12, 8]}
    model = write_small_model(tmp_path / "other.safetensors", "nlaic", options, seed=3, non_local_heads=2)
    assert_same(model, *file_of(model, width=1100, height=60, code=35_000, tile=0, seed=6, wild=97))


def dependent_file(
    model: LoadedModel, width: int, height: int, code: int, tile: int, seed: int, writer: type[Writer] = Writer
) -> tuple[bytes, list[Latents]]:
    """A file of what dependent quantisation makes of random latents, and the symbols of each tile."""
    written, streams, checks = [], [], SymbolChecks()
    for i, (geometry, *_) in enumerate(latent_boxes(width, height, tile)):
        z, y = latents(model.net.config, 1, (geometry.height, geometry.width), seed + i)
        coder = writer()
        coded = code_tiles(model, geometry, [code], [coder], Latents(z, y, weight=torch.ones_like(y)))
        written.append(coded.latents)
        checks.add(coded.latents)
        streams.append(tuple(coder.streams))
    return packed(model, width, height, code, tile, streams, checks), written


@pytest.mark.parametrize("quantiser", ["tiny-dependent", "tiny-chain", "tiny-neighbours", "tiny-polynomials"])
@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_same_symbols_with_dependent_quantisation(tmp_path: Path, name: str, quantiser: str) -> None:
    """In a picture that gives most systems steps with medium and large latents, and in tiles."""
    (tmp_path / TINY.name).write_bytes(TINY.read_bytes())
    net = load_file(model_of(name).info).net
    dependent = model_of(quantiser).net.dependent
    assert dependent is not None
    if dependent.neighbours is not None and net.context.schedule.first_grid(Geometry(1, 4, 4)) is None:
        return
    net.quantise(dependent)
    path = tmp_path / "dependent.safetensors"
    write_model(path, net, {"provenance": {}}, shared_from=read_info(tmp_path / TINY.name))
    model = load_file(read_info(path))
    assert_same(model, *dependent_file(model, width=330, height=250, code=10_000, tile=0, seed=7))
    assert_same(model, *dependent_file(model, width=100, height=60, code=45_000, tile=64, seed=8))
    assert_same(model, *dependent_file(model, width=1, height=1, code=25_000, tile=0, seed=9))


def test_same_symbols_where_all_channels_have_neighbours(tmp_path: Path) -> None:
    """The last piece of the first step is empty then; with weights and scales at their limits."""
    (tmp_path / TINY.name).write_bytes(TINY.read_bytes())
    net = load_file(model_of("tiny").info).net
    dependent = model_of("tiny-neighbours").net.dependent
    assert dependent is not None
    random = np.random.default_rng(1)
    width = net.config.context["slices"][0]
    weight, narrower = random.integers(-128, 128, (width, 6)), random.integers(-128, 128, (width, 7))
    net.quantise(replace(dependent, neighbours=Neighbours(np.arange(width), weight, narrower)))
    path = tmp_path / "neighbours.safetensors"
    write_model(path, net, {"provenance": {}}, shared_from=read_info(tmp_path / TINY.name))
    model = load_file(read_info(path))
    for size in ((330, 250), (64, 64), (40, 140)):
        assert_same(model, *dependent_file(model, *size, code=30_000, tile=0, seed=3))


@pytest.mark.parametrize("name", ["dependent-photo-q50.lic", "neighbours-photo-q90.lic"])
def test_damage_to_dependent_quantisation_is_refused(files: dict[str, Path], name: str) -> None:
    container = parse(files[name].read_bytes())
    weights = model_of(container.header.model).info.path
    (streams,) = container.tiles
    for i, stream in enumerate(streams):
        for damaged in (b"", stream[:-1], bytes([stream[0] ^ 64]) + stream[1:], stream + bytes(2)):
            tile = (*streams[:i], damaged, *streams[i + 1 :])
            with pytest.raises(reference.DamagedError):
                reference.decode_symbols(pack(replace(container, tiles=(tile,))), weights)


class WrongParity(Writer):
    """Writes a first parity of the tiny model that is neither 0 nor 1."""

    def code(
        self,
        stream: int,
        rows: np.ndarray,
        tables: Tables,
        values: np.ndarray | None,
        *,
        last: bool,
    ) -> np.ndarray:
        assert values is not None
        if stream == 1 and not last:
            values = np.concatenate([values[:1] + 2, values[1:]])
        return super().code(stream, rows, tables, values, last=last)


def test_other_parities_are_refused() -> None:
    data, _ = dependent_file(model_of("tiny-dependent"), 64, 64, code=40_000, tile=0, seed=1, writer=WrongParity)
    with pytest.raises(reference.DamagedError, match="parity"):
        reference.decode_symbols(data, DEPENDENT)
    with pytest.raises(lic.CorruptError):
        lic.decode(data)


@pytest.mark.parametrize("name", ["tiny", "tiny-dependent", "tiny-chain", *MODELS])
def test_wrong_number_of_streams_is_refused(name: str) -> None:
    model = model_of(name)
    container = parse(file_of(model, 64, 64, 30_000, 0, seed=1)[0])
    whole = container.tiles[0]
    for streams in [(*whole, b""), whole[:-1]][: len(whole) - 1]:  # a file has at least 2
        header = replace(container.header, streams=len(streams))
        with pytest.raises(reference.DamagedError, match="number of streams"):
            reference.decode_symbols(pack(replace(container, header=header, tiles=(streams,))), model.info.path)


def test_the_command(files: dict[str, Path], expected: dict[str, str]) -> None:
    command = [sys.executable, reference.__file__, str(files["one pixel"]), str(DATA / "models" / "tiny.safetensors")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True, text=True)
    assert done.stdout == expected["one pixel"] + "\n"


def test_damage_is_refused(files: dict[str, Path]) -> None:
    data = files["alpha"].read_bytes()
    for end in (0, 3, 17, 30, len(data) // 2, len(data) - 1):
        with pytest.raises(reference.DamagedError):
            reference.decode_symbols(data[:end], TINY)
    for at in (0, 5, 12, 19, 40, len(data) // 2, len(data) - 1):
        with pytest.raises(reference.DamagedError):
            reference.decode_symbols(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], TINY)
    with pytest.raises(reference.DamagedError):
        reference.decode_symbols(data + b"\0", TINY)


def test_damage_behind_a_right_checksum_is_refused(files: dict[str, Path]) -> None:
    data = files["one pixel"].read_bytes()[:-4]

    def altered(at: int, flip: int) -> bytes:
        return with_checksum(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])

    first = len(data) - sum(map(len, reference.read_container(with_checksum(data)).streams[0]))
    for at in (10, 14, 16, 18, *range(first, len(data), 7)):  # symbols CRC, quality, streams, lengths, streams
        with pytest.raises(reference.DamagedError):
            reference.decode_symbols(altered(at, 64), TINY)
    for at, flip in ((3, 4), (3, 1), (4, 1), (8, 1)):  # version, coder, ids
        with pytest.raises(reference.UnsupportedError):
            reference.decode_symbols(altered(at, flip), TINY)


@pytest.mark.parametrize(
    ("values", "rows", "stream"),
    [
        ([0, 0], [1, 1], ""),
        ([0, -1, 1, 0, 5, -6], [0, 0, 0, 1, 0, 2], "51 f0 03"),
        ([0, -1, 1, 0, 5, -6, 3], [0, 0, 0, 1, 0, 2, 1], "eb b4 00 1a c0 00"),
    ],
)
def test_example_of_the_specification(values: list[int], rows: list[int], stream: str) -> None:
    cdf = np.full((3, 6), 65535, np.uint16)
    cdf[0, :4], cdf[1, :2], cdf[2, :4] = (0, 16384, 49152, 61440), (0, 65530), (0, 20000, 40000, 60000)
    tables = reference.Tables(cdf, np.array([4, 2, 4]), np.array([-1, 0, -1]), np.array([0, 0, 2]))
    assert reference.decode_stream(bytes.fromhex(stream), tables, rows) == values


@given(st.integers(-(2**35), 2**35), st.integers(-70, 27))
def test_rounding(x: int, n: int) -> None:
    assert reference.scale(np.array([x]), n)[0] == round(x * Fraction(2) ** n)
