"""Whatever the bytes, the container answers with itself or with one of two errors, and cheaply."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from itertools import pairwise
from math import prod

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lic.container import (
    FORMAT_VERSION,
    MAGIC,
    TILE_LIMIT,
    Container,
    Header,
    Metadata,
    Section,
    layout,
    metadata_of,
    metadata_sections,
    pack,
    parse,
    parse_header,
    tile_boxes,
)
from lic.errors import CorruptError, LicError, UnsupportedError
from lic.quality import MAX_CODE

# A busy machine is no failure.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VERSION = bytes([FORMAT_VERSION << 2])
NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789._-", min_size=1, max_size=31)
SIZES = st.one_of(st.integers(1, 1000), st.integers(1, 5000), st.integers(1, 2**32))
TILES = st.one_of(st.just(0), st.integers(1, 2**16).map(lambda units: 64 * units), st.just(2048))
SECTIONS = st.builds(Section, kind=st.from_regex("[a-z][A-Za-z]{3}", fullmatch=True), data=st.binary(max_size=20))


@st.composite
def containers(draw: st.DrawFn) -> Container:
    width, height, tile = draw(SIZES), draw(SIZES), draw(TILES)
    tiles = 1 if tile == 0 else -(-width // tile) * -(-height // tile)
    assume(tiles <= 30)
    sides = (-(-min(side, tile or side) // 64) * 64 for side in (width, height))
    assume(prod(sides) <= TILE_LIMIT)
    streams = draw(st.integers(2, 12))
    header = Header(
        width=width,
        height=height,
        quality=draw(st.integers(0, MAX_CODE)),
        model=draw(NAMES),
        entropy_id=draw(st.binary(min_size=4, max_size=4)),
        synthesis_id=draw(st.binary(min_size=2, max_size=2)),
        tile=tile,
        streams=streams,
        symbols_crc=draw(st.integers(0, 2**32 - 1)),
        gray=draw(st.booleans()),
        deep=draw(st.booleans()),
        reduced=draw(st.integers(0, 255)),
        effort=draw(st.integers(0, 9)),
        version=draw(st.integers(1, FORMAT_VERSION)),
    )
    sizes = draw(st.lists(st.integers(0, 40), min_size=tiles * streams, max_size=tiles * streams))
    payload = draw(st.randoms(use_true_random=False)).randbytes(sum(sizes))
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    chunks = [payload[start:end] for start, end in pairwise(ends)]
    return Container(
        header,
        tuple(tuple(chunks[i : i + streams]) for i in range(0, len(chunks), streams)),
        tuple(draw(st.lists(SECTIONS, max_size=3, unique_by=lambda section: section.kind))),
    )


SAMPLE = pack(
    Container(
        Header(100, 70, 30_000, "base", b"\x12\x34\x56\x78", b"\x9a\xbc", 64, 2, 0x01020304),
        tuple((bytes([tile] * 5), bytes([128 + tile] * (7 - tile))) for tile in range(4)),
        metadata_sections(Metadata(exif=b"metadata")),
    )
)


def survives(data: bytes) -> bool:
    """True if ``data`` parses. Fails on any exception but the two allowed ones, and on a long message."""
    outcome = True
    for read in (parse, parse_header, layout):
        try:
            read(data)
        except (CorruptError, UnsupportedError) as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 200
            outcome = outcome and read is not parse
    return outcome


@PATIENT
@given(containers())
def test_round_trip(container: Container) -> None:
    data = pack(container)
    assert parse(data, max_pixels=None) == container
    parts = layout(data)
    assert parts[-1].offset + parts[-1].size == len(data)
    header = container.header
    assert len(tile_boxes(header.width, header.height, header.tile)) == len(container.tiles)


@PATIENT
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 10))
def test_tile_boxes_partition_the_picture(width: int, height: int, units: int) -> None:
    boxes = tile_boxes(width, height, 64 * units)
    assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in boxes)
    assert sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes) == width * height
    assert sorted(boxes, key=lambda box: (box[1], box[0])) == boxes
    assert len({box[:2] for box in boxes}) == len(boxes)


def test_every_truncation_of_a_file_is_corrupt() -> None:
    for size in range(len(SAMPLE)):
        with pytest.raises(CorruptError):
            parse(SAMPLE[:size])


def test_every_single_bit_flip_is_noticed() -> None:
    for bit in range(8 * len(SAMPLE)):
        damaged = bytearray(SAMPLE)
        damaged[bit // 8] ^= 0x80 >> bit % 8
        assert not survives(bytes(damaged)), f"bit {bit}"


@PATIENT
@given(containers(), st.data())
def test_truncations_and_flips_of_any_file(container: Container, data: st.DataObject) -> None:
    good = pack(container)
    size = data.draw(st.integers(0, len(good) - 1))
    assert not survives(good[:size])
    flipped = bytearray(good)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    flipped[bit // 8] ^= 0x80 >> bit % 8
    assert not survives(bytes(flipped))


@PATIENT
@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    assert not survives(data)
    assert not survives(MAGIC + data)
    assert not survives(MAGIC + VERSION + data)


@PATIENT
@given(st.binary(min_size=14, max_size=200), st.binary(max_size=100))
def test_hostile_headers_with_a_right_checksum(header: bytes, rest: bytes) -> None:
    body = MAGIC + VERSION + header + rest
    survives(body + struct.pack(">I", zlib.crc32(body)))


@PATIENT
@given(st.integers(4, len(SAMPLE) - 5), st.integers(0, 255))
def test_one_byte_changed_and_the_checksum_made_right(offset: int, value: int) -> None:
    body = bytearray(SAMPLE[:-4])
    body[offset] = value
    data = bytes(body) + struct.pack(">I", zlib.crc32(body))
    if survives(data):  # what is accepted has only one spelling
        assert pack(parse(data)) == data


def test_hostile_files_cost_little_memory() -> None:
    sizes = b"\x04" + bytes([0x00, 0x7F]) + b"\xff" * 40
    tracemalloc.start()
    try:
        for streams in (2, 16, 255):
            for flags in (0, 1):
                for tail in (b"", bytes(5_000), b"\xff" * 5_000):
                    body = MAGIC + VERSION + bytes(12) + bytes([streams, flags]) + sizes + tail
                    with pytest.raises(LicError):
                        parse(body + struct.pack(">I", zlib.crc32(body)), max_pixels=None)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@PATIENT
@given(st.sampled_from(["iccp", "exif", "xmpd"]), st.binary(max_size=200), st.integers(0, 10**6), st.integers(0, 255))
def test_hostile_metadata(kind: str, data: bytes, at: int, value: int) -> None:
    altered = bytearray(zlib.compress(data))
    altered[at % len(altered)] = value
    for content in (data, bytes(altered)):
        with contextlib.suppress(CorruptError):
            assert metadata_of([Section(kind, content)])
