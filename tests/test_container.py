"""Behaviour of the container: layout, limits, messages, the worked example of the specification."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

from lic.container import (
    FORMAT_VERSION,
    MAGIC,
    MAX_STREAMS,
    METADATA_LIMIT,
    TILE_LIMIT,
    Container,
    Header,
    Metadata,
    Reduced,
    Section,
    layout,
    metadata_kinds,
    metadata_of,
    metadata_sections,
    pack,
    parse,
    parse_header,
    tile_boxes,
)
from lic.errors import CorruptError, LicError, UnsupportedError
from lic.quality import MAX_CODE

HEADER = Header(
    width=300,
    height=200,
    quality=22500,
    model="base",
    entropy_id=bytes.fromhex("01234567"),
    synthesis_id=bytes.fromhex("89ab"),
    tile=256,
    streams=3,
    symbols_crc=0xDEADBEEF,
    reduced=Reduced.COLOUR_MODEL,
    effort=7,
)
EXAMPLE = Container(
    HEADER,
    tiles=((b"\xc0\xc1\xc2", b"\xd0\xd1", b"\xe0"), (b"\xc8", b"", b"\xe8\xe9")),
    sections=(Section("teXt", b"hi"),),
)
SECTION_TABLE = 30  # its offset in the example


def one_tile(stream_sizes: list[int], **fields: Any) -> Container:
    header = replace(HEADER, tile=0, streams=len(stream_sizes), **fields)
    return Container(header, (tuple(bytes(size) for size in stream_sizes),))


def with_checksum(body: bytes) -> bytes:
    return body + struct.pack(">I", zlib.crc32(body))


def changed(data: bytes, offset: int, value: int) -> bytes:
    """``data`` with one byte replaced and the checksum made right again."""
    return with_checksum(data[:offset] + bytes([value]) + data[offset + 1 : -4])


def test_worked_example_of_the_specification() -> None:
    text = (Path(__file__).parents[1] / "bitstream_spec.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n([0-9a-f \n]+)\n```", text.split("## 8 Worked example")[1])
    assert pack(EXAMPLE) == bytes.fromhex(blocks[0])
    rows = re.findall(r"^\| (\d+) \| ([0-9a-f ]+|\(empty\)) \|", text, flags=re.MULTILINE)
    listed = b"".join(bytes.fromhex(hexes) for _, hexes in rows if hexes != "(empty)")
    assert listed == pack(EXAMPLE)


def test_round_trip_of_the_example() -> None:
    assert parse(pack(EXAMPLE)) == EXAMPLE


@pytest.mark.parametrize("size", [(768, 512), (512, 768), (2048, 2048)])  # the last: as large as one tile may be
@pytest.mark.parametrize("stream", [0, 100, 5_000, 65_535])
def test_framing_stays_in_its_budget(size: tuple[int, int], stream: int) -> None:
    container = one_tile([stream] * 9, width=size[0], height=size[1], quality=MAX_CODE, effort=9, reduced=0)
    assert len(pack(container)) - 9 * stream <= 28 + 2 * (9 + 1)


@pytest.mark.parametrize(
    ("size", "tile"),
    [((1, 1), 0), ((1, 2**32), 2**16), ((2**32, 1), 2**16), ((2**20, 2**18), 2**11), ((2**11, 2**11), 2**22)],
)
def test_extreme_sizes_are_expressible(size: tuple[int, int], tile: int) -> None:
    tiles = len(tile_boxes(*size, tile))
    header = replace(HEADER, width=size[0], height=size[1], tile=tile, streams=2)
    container = Container(header, ((b"1", b"22"),) * tiles)
    assert parse(pack(container), max_pixels=None) == container


def test_streams_stand_stream_by_stream_behind_the_header() -> None:
    data = pack(EXAMPLE)
    index = parse_header(data)
    assert data[index.payload :].startswith(b"\xc0\xc1\xc2" + b"\xc8" + b"\xd0\xd1" + b"" + b"\xe0" + b"\xe8\xe9")
    assert index.lengths == (3, 1, 2, 0, 1, 2)
    assert index.sections == (("teXt", 2),)
    assert index.tiles == 2
    assert index.file_size == len(data)


def test_header_is_readable_without_the_streams() -> None:
    data = pack(EXAMPLE)
    front = data[: parse_header(data).payload]
    assert parse_header(front) == parse_header(data)
    assert parse_header(front).header == HEADER
    with pytest.raises(CorruptError, match="truncated: the file ends inside its header"):
        parse_header(front[:-1])


def test_layout_covers_the_file_without_gaps() -> None:
    data = pack(EXAMPLE)
    parts = layout(data)
    assert [part.name for part in parts] == [
        "header",
        "hyper, tile 0",
        "hyper, tile 1",
        "group 0, tile 0",
        "group 0, tile 1",
        "group 1, tile 0",
        "group 1, tile 1",
        "teXt",
        "checksum",
    ]
    assert [part.offset for part in parts] == [sum(p.size for p in parts[:i]) for i in range(len(parts))]
    assert parts[-1].offset + parts[-1].size == len(data)
    assert layout(data[:51]) == parts
    assert [part.name for part in layout(pack(one_tile([1, 1, 1])))] == [
        "header",
        "hyper",
        "group 0",
        "group 1",
        "checksum",
    ]


def test_tile_boxes_cover_the_picture_in_raster_order() -> None:
    assert tile_boxes(300, 200, 128) == [
        (0, 0, 128, 128),
        (128, 0, 256, 128),
        (256, 0, 300, 128),
        (0, 128, 128, 200),
        (128, 128, 256, 200),
        (256, 128, 300, 200),
    ]
    assert tile_boxes(300, 200, 0) == [(0, 0, 300, 200)]
    assert tile_boxes(300, 200, 1024) == [(0, 0, 300, 200)]
    assert tile_boxes(128, 64, 64) == [(0, 0, 64, 64), (64, 0, 128, 64)]


def test_foreign_and_empty_files() -> None:
    with pytest.raises(CorruptError, match="empty file"):
        parse(b"")
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello", b"\n", MAGIC[:2] + b"X", b"\xff" * 1000):
        with pytest.raises(CorruptError, match=r"not a \.lic file"):
            parse(data)


def test_truncated_file_says_how_much_is_missing() -> None:
    data = pack(EXAMPLE)
    for size in range(parse_header(data).payload, len(data)):
        with pytest.raises(CorruptError, match=f"^truncated: {size} of {len(data)} bytes$"):
            parse(data[:size])
    for size in range(1, parse_header(data).payload):
        with pytest.raises(CorruptError, match=f"^truncated: the file ends inside its header, after {size} bytes$"):
            parse(data[:size])


def test_trailing_data_is_told_from_damage() -> None:
    data = pack(EXAMPLE)
    with pytest.raises(CorruptError, match=r"^7 bytes of other data after the end of the file$"):
        parse(data + bytes(7))
    with pytest.raises(CorruptError, match="damaged: the checksum does not match"):
        parse(data[:-5] + b"?" + data[-4:] + bytes(7))


def test_newer_version_asks_for_an_upgrade() -> None:
    newer = changed(pack(EXAMPLE), 3, (FORMAT_VERSION + 1) << 2)
    for read in (parse, parse_header, layout):
        with pytest.raises(UnsupportedError, match=f"format version {FORMAT_VERSION + 1} .*upgrade lic"):
            read(newer)
    with pytest.raises(UnsupportedError, match="format version"):
        parse(MAGIC + bytes([(FORMAT_VERSION + 1) << 2]))
    with pytest.raises(UnsupportedError, match="version 0 was never released"):
        parse(changed(pack(EXAMPLE), 3, 0))


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_gray_and_depth_cost_nothing(gray: bool, deep: bool) -> None:
    plain, other = one_tile([1, 1], reduced=0), one_tile([1, 1], reduced=0, gray=gray, deep=deep)
    assert parse(pack(other)) == other
    assert len(pack(other)) == len(pack(plain))


def test_what_was_reduced_costs_a_byte_and_unknown_reasons_are_kept() -> None:
    plain = one_tile([1, 1], reduced=0)
    for reduced in (Reduced.FRAMES, 128, 255):
        other = one_tile([1, 1], reduced=reduced)
        assert parse(pack(other)).header.reduced == reduced
        assert len(pack(other)) == len(pack(plain)) + 1


def test_reserved_values_are_unsupported_in_whole_files_only() -> None:
    data = pack(EXAMPLE)
    coder = changed(data, 3, data[3] | 1)
    with pytest.raises(UnsupportedError, match="coder 1 is unknown"):
        parse(coder)
    with pytest.raises(CorruptError, match="checksum"):
        parse(coder[:-4] + data[-4:])
    parse_header(coder)  # lic info still has something to show


def test_unknown_sections() -> None:
    data = pack(EXAMPLE)
    assert data[SECTION_TABLE + 1 : SECTION_TABLE + 5] == b"teXt"
    assert parse(data).sections == EXAMPLE.sections
    with pytest.raises(UnsupportedError, match="section TeXt is needed"):
        parse(changed(data, SECTION_TABLE + 1, ord("T")))
    for offset, value in ((1, ord("1")), (2, 0xC3), (4, ord("\n"))):
        with pytest.raises(CorruptError, match="section kind"):
            parse(changed(data, SECTION_TABLE + offset, value))
    with pytest.raises(CorruptError, match="empty section table"):
        parse(changed(data, SECTION_TABLE, 0))


@pytest.mark.parametrize("size", [0, 1, 255, 256])
@pytest.mark.parametrize("others", [(), EXAMPLE.sections])
def test_a_filter_in_front_has_a_short_entry(size: int, others: tuple[Section, ...]) -> None:
    container = replace(EXAMPLE, sections=(Section("Filt", bytes(size)), *others))
    data, plain = pack(container), pack(replace(EXAMPLE, sections=others))
    assert len(data) - len(plain) == size + (1 if size < 256 else 8) + (not others)
    assert parse(data) == container
    if size == 255:
        assert data[SECTION_TABLE : SECTION_TABLE + 2] == bytes([128 + len(others), 255])
    behind = replace(EXAMPLE, sections=(*others, Section("Filt", bytes(size))))
    assert parse(pack(behind)) == behind


def test_a_filter_alone_with_a_long_table() -> None:
    """As in files of before there were short ones."""
    data = pack(replace(EXAMPLE, sections=(Section("Filt", b"hi"),)))
    table = struct.pack(">B4sI", 1, b"Filt", 2)
    body = data[:SECTION_TABLE] + table + data[SECTION_TABLE + 2 : -4]
    assert parse(body + struct.pack(">I", zlib.crc32(body))) == parse(data)


def test_pixel_limit() -> None:
    data = pack(one_tile([1, 1], width=1000, height=500))  # decoded as 1024 x 512
    assert parse(data, max_pixels=1024 * 512).header.width == 1000
    with pytest.raises(LicError, match=r"1000x500, 524288 pixels .*524287 pixels.*--max-pixels"):
        parse(data, max_pixels=1024 * 512 - 1)
    thin = pack(one_tile([1, 1], width=1, height=1))
    with pytest.raises(LicError, match="--max-pixels"):
        parse(thin, max_pixels=4095)
    header = replace(HEADER, width=100_000, height=50_000, tile=2048, streams=2)
    huge = pack(Container(header, ((b"", b""),) * (49 * 25)))
    with pytest.raises(LicError, match="--max-pixels"):
        parse(huge)
    assert parse(huge, max_pixels=None).header.height == 50_000


@pytest.mark.parametrize(
    ("width", "height", "tile", "fits"),
    [
        (2048, 2048, 0, True),
        (1, 65536, 0, True),
        (4096, 1024, 2**22, True),
        (10_000, 1, 2**13, True),
        (2049, 2048, 0, False),
        (1, 65537, 0, False),
        (1, 100_000, 0, False),
        (100_000, 1, 0, False),
        (1, 2**28, 0, False),
        (2**14, 2**14, 0, False),
        (2**15, 2**15, 2**12, False),
        (3000, 3000, 2**11 + 64, False),
    ],
)
def test_tile_limit(width: int, height: int, tile: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is on what is decoded: sides are rounded up to multiples of 64."""
    tiles = len(tile_boxes(width, height, tile))
    header = replace(HEADER, width=width, height=height, tile=tile, streams=2)
    container = Container(header, ((b"", b""),) * tiles)
    if fits:
        assert parse(pack(container)) == container
        return
    with pytest.raises(ValueError, match=f"tiles .* too large: over {TILE_LIMIT} pixels"):
        pack(container)
    with monkeypatch.context() as patch:
        patch.setattr("lic.container.format.TILE_LIMIT", 2**70)
        data = pack(container)
    for limit in (2**70, None):
        with pytest.raises(UnsupportedError, match=r"tiles .* too large"):
            parse(data, max_pixels=limit)
    assert parse_header(data).header == header
    with pytest.raises(CorruptError, match="checksum"):
        parse(data[:-1] + bytes([data[-1] ^ 1]))


def variable_part(bits: str, *, tiled: bool = False, reduced: bool = False, streams: int = 2) -> bytes:
    """A file whose variable part is ``bits``, padded with zeros, and nothing after it but a checksum."""
    fixed = bytearray(pack(one_tile([0] * streams))[:18])
    fixed[17] = tiled | reduced << 5
    bits += "0" * (-len(bits) % 8)
    return with_checksum(bytes(fixed) + int(bits, 2).to_bytes(len(bits) // 8, "big"))


NAME = "000001" + "000000"  # no sections, one letter, "a"
SIZE_1X1 = "00000" + "0" + "0"
EMPTY_LENGTHS = "00000" + "0" + "0"


def test_hand_written_variable_part_parses() -> None:
    assert parse(variable_part(NAME + SIZE_1X1 + EMPTY_LENGTHS)).header.model == "a"
    said = parse(variable_part(NAME + SIZE_1X1 + "10000001" + EMPTY_LENGTHS, reduced=True)).header
    assert said.reduced == 129
    with pytest.raises(CorruptError, match="nothing is said to be reduced"):
        parse(variable_part(NAME + SIZE_1X1 + "00000000" + EMPTY_LENGTHS, reduced=True))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("000000" + SIZE_1X1 + EMPTY_LENGTHS, "model name"),  # no name
        ("000001" + "100111" + SIZE_1X1 + EMPTY_LENGTHS, "model name"),  # letter 39
        (NAME + "00001" + "01" + "00" + EMPTY_LENGTHS, "longer than they need be"),
        (NAME + SIZE_1X1 + "00111" + "00000000" * 2, "longer than they need be"),
        (NAME + SIZE_1X1 + EMPTY_LENGTHS + "1", "padding"),
        (NAME + SIZE_1X1 + "11111" + "1" * 64, "truncated: 33 of 8589934623 bytes"),
    ],
)
def test_rules_of_the_variable_part(bits: str, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        parse(variable_part(bits))


def test_hostile_tile_counts_fail_before_anything_is_read() -> None:
    largest = "11111" + "1" * 64  # 2**32 x 2**32 pixels
    with pytest.raises(CorruptError, match=f"more than {MAX_STREAMS} streams"):
        parse(variable_part(NAME + largest + "0" * 16, tiled=True), max_pixels=None)
    most = "01110" + "1" * 15 + "0" * 15  # 512 tiles of 255 streams, whose lengths are not there
    with pytest.raises(CorruptError, match="truncated: the file ends inside its header"):
        parse(variable_part(NAME + most + "0" * 16, tiled=True, streams=255))


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 0},
        {"height": 2**32 + 1},
        {"quality": MAX_CODE + 1},
        {"quality": -1},
        {"model": ""},
        {"model": "x" * 32},
        {"model": "Base"},
        {"model": "a/b"},
        {"entropy_id": b"123"},
        {"synthesis_id": b"123"},
        {"tile": 100},
        {"tile": -64},
        {"tile": 2**22 + 64},
        {"streams": 1},
        {"streams": 256},
        {"symbols_crc": 2**32},
        {"coder": 1},
        {"reduced": 256},
        {"effort": 10},
        {"width": 2**32, "tile": 64},
    ],
)
def test_pack_refuses_fields_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        pack(replace(EXAMPLE, header=replace(HEADER, **fields)))


def test_pack_refuses_streams_and_sections_that_do_not_fit() -> None:
    for tiles in ((), EXAMPLE.tiles[:1], (EXAMPLE.tiles[0], EXAMPLE.tiles[1][:2])):
        with pytest.raises(ValueError, match="2 tiles of 3 streams"):
            pack(replace(EXAMPLE, tiles=tiles))
    with pytest.raises(ValueError, match="two sections of one kind"):
        pack(replace(EXAMPLE, sections=(Section("abcd", b""),) * 2))
    for sections in ((Section("abc", b""),), (Section("ab1d", b""),), (Section("Abcd", b""),)):
        with pytest.raises(ValueError, match="section"):
            pack(replace(EXAMPLE, sections=sections))
    kinds = ["ab" + "".join(pair) for pair in product(ascii_lowercase, repeat=2)][:256]
    with pytest.raises(ValueError, match="127 sections"):
        pack(replace(EXAMPLE, sections=tuple(Section(kind, b"") for kind in kinds)))


def test_container_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, lic.container; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_metadata_comes_back_and_other_sections_are_passed_over() -> None:
    metadata = Metadata(icc=bytes(5000), exif=b"II*\0", xmp=b"<x:xmpmeta/>")
    sections = metadata_sections(metadata)
    assert len(sections) == 3 and sum(len(section.data) for section in sections) < 100
    assert metadata_of([*sections, Section("teXt", b"hi")]) == metadata
    assert metadata_kinds([section.kind for section in sections]) == ("icc", "exif", "xmp")
    assert metadata_sections(Metadata(xmp=b"")) == () and not Metadata(xmp=b"")


def test_metadata_has_a_limit_in_both_directions() -> None:
    full = Metadata(exif=bytes(METADATA_LIMIT))
    assert metadata_of(metadata_sections(full)) == full
    with pytest.raises(ValueError, match="metadata of more than"):
        metadata_sections(Metadata(exif=bytes(METADATA_LIMIT + 1)))
    bomb = Section("exif", zlib.compress(bytes(50 * METADATA_LIMIT)))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="longer than"):
            metadata_of([bomb])
        assert tracemalloc.get_traced_memory()[1] < 3 * METADATA_LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data", [b"", b"x", zlib.compress(b""), zlib.compress(b"abc")[:-1], zlib.compress(b"abc") + b"x"]
)
def test_damaged_metadata_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError, match="section iccp"):
        metadata_of([Section("iccp", data)])
