"""The ``.lic`` file: header, lengths, streams, sections, checksum (bitstream_spec.md, chapters 1 to 3).

    fixed part      18 bytes, ``_FIXED``
    variable part   bits: model name, geometry, length of every stream; padded to a whole byte
    section table   only if there are sections: kind and length of each, of a filter the length
    streams         stream-major: stream 0 (hyper-latents) of all tiles, then stream 1 of all tiles, ...
    sections
    CRC-32          of all bytes before it

All lengths stand in front: a truncated file still says what it should hold and where.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

from lic.container.bits import BitReader, BitWriter
from lic.errors import CorruptError, LicError, UnsupportedError
from lic.quality import MAX_CODE

MAGIC = b"\x8bLI"  # 0x8b begins no ASCII, UTF-8 or UTF-16 text, and is lost where only 7 bits pass
FORMAT_VERSION = 3  # the newest; those before differ in what a filter can be (lic.pipeline.restoration)
DEFAULT_MAX_PIXELS = 2**28
MAX_STREAMS = 2**18  # tiles × streams per tile: bounds what a small hostile file can make a reader allocate

TILE_UNIT = 64  # pixels: what is decoded is a picture or tile with both sides rounded up to a multiple of it
TILE_LIMIT = 2**22  # such pixels of a tile: bounds what a decoder needs for one, whatever a file claims
NAME_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789._-"
CODERS = (0,)  # what this version reads and writes
ALPHA = "Alph"  # the section that holds the transparency
FILTER = "Filt"  # the section that holds the filter behind the synthesis
MAX_SECTIONS = 127  # 7 bits of the table
MANDATORY_SECTIONS = frozenset({ALPHA, FILTER})

# signature; version, coder; entropy id; synthesis id; symbols CRC; quality; streams; flags of colour, effort, tiled
_FIXED = struct.Struct(">3sB4s2sIHBB")
_SECTION = struct.Struct(">4sI")
_CRC = struct.Struct(">I")
_SECTION_KIND = re.compile("[A-Za-z]{4}")


class Reduced(IntFlag):
    """What was lost, besides the codec's own loss, when the encoder read the source. The values are of the format."""

    PRECISION = 1  # samples had more bits than reached the encoder
    COLOUR_MODEL = 2  # CMYK, Lab and others became RGB
    FRAMES = 4  # the first of several frames or pages was taken
    COLOUR_SPACE = 8  # a profile or gamma that says what the colours mean was left out


@dataclass(frozen=True)
class Header:
    """What a decoder knows before it reads a stream. Sizes in pixels."""

    width: int  # 1..2**32
    height: int  # 1..2**32
    quality: int  # code of lic.quality, 0..MAX_CODE
    model: str  # name, 1..31 characters of NAME_ALPHABET
    entropy_id: bytes  # 4 bytes: hash of the weights that the entropy path depends on
    synthesis_id: bytes  # 2 bytes: hash of the synthesis weights
    tile: int  # side of the square tiles, a multiple of 64 up to 2**22; 0 = the whole image is one tile
    streams: int  # per tile: 1 hyper-latent stream + groups, 2..255
    symbols_crc: int  # CRC-32 of all decoded symbols
    coder: int = 0  # 0 = the torchac-compatible range coder
    gray: bool = False  # one channel: the mean of the network's three
    deep: bool = False  # the source had more than 8 bits per sample, and a decoder should write 16
    reduced: int = 0  # 0..255: what the source had and the file has not, a sum of Reduced; informative
    effort: int = 0  # 0..9, of the encoder; informative
    version: int = 1  # of the format, 1..FORMAT_VERSION


@dataclass(frozen=True)
class Section:
    """Data beside the streams. ``kind``: 4 ASCII letters, the first upper case if a decoder must know it."""

    kind: str
    data: bytes


@dataclass(frozen=True)
class Container:
    """A whole file: ``tiles`` in raster order, each a tuple of ``header.streams`` byte strings."""

    header: Header
    tiles: tuple[tuple[bytes, ...], ...]
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Index:
    """What stands before the first stream: the header, and where everything lies. Sizes in bytes.

    Enough to take the leading streams out of a truncated file.
    """

    header: Header
    lengths: tuple[int, ...]  # of all streams, in file order: stream-major
    sections: tuple[tuple[str, int], ...]  # kind, length
    payload: int  # offset of the first stream
    file_size: int  # of the whole file

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.lengths) // self.header.streams


@dataclass(frozen=True)
class Leading:
    """What is there of a file that may be truncated or damaged.

    ``container``: with the leading streams of each tile that are there as a whole, and the sections that are;
    ``missing``: the kinds of the other sections; ``problem``: what is wrong with the file, in words, or None.
    """

    container: Container
    missing: tuple[str, ...]
    problem: str | None


class Part(NamedTuple):
    """A named range of bytes of a file."""

    name: str
    offset: int
    size: int


def tile_boxes(width: int, height: int, tile: int) -> list[tuple[int, int, int, int]]:
    """Boxes (x0, y0, x1, y1) of the tiles in pixels, x1 and y1 exclusive, in raster order.

    Tiles of the last column and row are cut at the image's border. ``tile`` = 0 gives one box.
    """
    if tile == 0:
        return [(0, 0, width, height)]
    return [
        (x, y, min(x + tile, width), min(y + tile, height))
        for y in range(0, height, tile)
        for x in range(0, width, tile)
    ]


def pack(container: Container) -> bytes:
    """The bytes of the file.

    ValueError if a field is out of range, a tile is over ``TILE_LIMIT`` or the streams do not match the header.
    """
    header, tiles, sections = container.header, container.tiles, container.sections
    problem = _range_problem(header) or _unsupported(header, (section.kind for section in sections))
    problem = problem or _too_large(header)
    if problem:
        raise ValueError(problem)
    if len(tiles) != _tile_count(header) or any(len(streams) != header.streams for streams in tiles):
        raise ValueError(f"expected {_tile_count(header)} tiles of {header.streams} streams each")
    if len(sections) > MAX_SECTIONS or not all(_SECTION_KIND.fullmatch(section.kind) for section in sections):
        raise ValueError(f"at most {MAX_SECTIONS} sections, each with a kind of 4 ASCII letters")
    if len({section.kind for section in sections}) < len(sections):
        raise ValueError("two sections of one kind")
    streams = [tile[i] for i in range(header.streams) for tile in tiles]
    lengths = [len(stream) for stream in streams]
    if max(lengths) >= 2**32 or any(len(section.data) >= 2**32 for section in sections):
        raise ValueError("a stream or section must be shorter than 4 GiB")

    fixed = _FIXED.pack(
        MAGIC,
        header.version << 2 | header.coder,
        header.entropy_id,
        header.synthesis_id,
        header.symbols_crc,
        header.quality,
        header.streams,
        header.gray << 7 | header.deep << 6 | (header.reduced > 0) << 5 | header.effort << 1 | (header.tile > 0),
    )
    variable = BitWriter()
    variable.write(bool(sections), 1)
    variable.write(len(header.model), 5)
    for letter in header.model:
        variable.write(NAME_ALPHABET.index(letter), 6)
    _write_array(variable, [header.width - 1, header.height - 1])
    if header.tile:
        variable.write(header.tile // TILE_UNIT - 1, 16)
    if header.reduced:
        variable.write(header.reduced, 8)
    _write_array(variable, lengths)
    variable.align()
    parts = [fixed, bytes(variable.data)]
    if sections:
        has_filter = sections[0].kind == FILTER and len(sections[0].data) < 256
        others = sections[has_filter:]
        parts.append(bytes([has_filter << 7 | len(others), *([len(sections[0].data)] if has_filter else [])]))
        parts += [_SECTION.pack(section.kind.encode(), len(section.data)) for section in others]
    body = b"".join([*parts, *streams, *(section.data for section in sections)])
    return body + _CRC.pack(zlib.crc32(body))


def parse(data: bytes, *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Container:
    """Read a whole file and check it.

    Raises CorruptError if it is no ``.lic`` file, truncated, damaged or followed by other data, UnsupportedError if it
    is sound but needs a newer lic or has a tile over ``TILE_LIMIT`` pixels, and LicError for a picture over
    ``max_pixels``, both with their sides rounded up to multiples of ``TILE_UNIT``.
    """
    index = parse_header(data)
    if problem := _problem(data, index):
        raise CorruptError(problem)
    _check_supported(index, max_pixels)
    return _contents(data, index)


def parse_leading(data: bytes, *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Leading:
    """Read what is there of a file, for a preview. What is there may be damaged.

    Raises what :func:`parse_header` raises, UnsupportedError and LicError as :func:`parse`, and CorruptError if the
    file ends before the first group of a tile does.
    """
    index = parse_header(data)
    _check_supported(index, max_pixels)
    container, problem = _contents(data, index), _problem(data, index)
    if all(len(streams) < 2 for streams in container.tiles):
        raise CorruptError(f"{problem}, and no group is whole")
    missing = tuple(kind for kind, _ in index.sections[len(container.sections) :])
    return Leading(container, missing, problem)


def _problem(data: bytes, index: Index) -> str | None:
    """What is wrong with the file as a whole, in words, or None."""
    if len(data) < index.file_size:
        return f"truncated: {len(data)} of {index.file_size} bytes"
    end = index.file_size - _CRC.size
    if zlib.crc32(memoryview(data)[:end]) != _CRC.unpack_from(data, end)[0]:
        return "damaged: the checksum does not match"
    if len(data) > index.file_size:
        return f"{len(data) - index.file_size} bytes of other data after the end of the file"
    return None


def _check_supported(index: Index, max_pixels: int | None) -> None:
    problem = _unsupported(index.header, (kind for kind, _ in index.sections))
    if problem:
        raise UnsupportedError(f"{problem}: upgrade lic")
    if problem := over_limit(index.header.width, index.header.height, max_pixels):
        raise LicError(problem)
    if problem := _too_large(index.header):
        raise UnsupportedError(problem)


def _contents(data: bytes, index: Index) -> Container:
    """The streams and sections that lie inside ``data``: in file order the first ones, since nothing lies between."""
    position = index.payload
    chunks = []
    for length in [*index.lengths, *(length for _, length in index.sections)]:
        if position + length > len(data):
            break
        chunks.append(data[position : position + length])
        position += length
    streams, sections = chunks[: len(index.lengths)], chunks[len(index.lengths) :]
    return Container(
        index.header,
        tuple(tuple(streams[tile :: index.tiles]) for tile in range(index.tiles)),
        tuple(Section(kind, content) for (kind, _), content in zip(index.sections, sections, strict=False)),
    )


def parse_header(data: bytes) -> Index:
    """Read what stands before the streams; the rest may be missing, and no checksum is checked.

    Raises CorruptError if ``data`` is no ``.lic`` file, ends inside the header or breaks a rule of the
    format, and UnsupportedError if the format version is newer than this one.
    """
    if not data:
        raise CorruptError("empty file")
    if not data.startswith(MAGIC[: len(data)]):
        raise CorruptError("not a .lic file")
    reader = BitReader(data)
    if len(data) > len(MAGIC) and not 1 <= data[len(MAGIC)] >> 2 <= FORMAT_VERSION:
        version = data[len(MAGIC)] >> 2
        if version > FORMAT_VERSION:
            raise UnsupportedError(
                f"format version {version} is newer than this lic, which reads up to {FORMAT_VERSION}: upgrade lic"
            )
        raise UnsupportedError(f"format version {version} was never released: encode the picture again")
    fixed = reader.read_bytes(_FIXED.size)
    _, version_coder, entropy_id, synthesis_id, symbols_crc, quality, streams, flags = _FIXED.unpack(fixed)
    has_sections = reader.read(1)
    letters = [reader.read(6) for _ in range(reader.read(5))]
    if any(letter >= len(NAME_ALPHABET) for letter in letters):
        raise CorruptError("damaged: the model name holds a character that does not exist")
    width, height = (size + 1 for size in _read_array(reader, 2))
    tile = TILE_UNIT * (reader.read(16) + 1) if flags & 1 else 0
    reduced = reader.read(8) if flags & 32 else 0
    if flags & 32 and not reduced:
        raise CorruptError("damaged: nothing is said to be reduced")
    header = Header(
        width=width,
        height=height,
        quality=quality,
        model="".join(NAME_ALPHABET[letter] for letter in letters),
        entropy_id=entropy_id,
        synthesis_id=synthesis_id,
        tile=tile,
        streams=streams,
        symbols_crc=symbols_crc,
        coder=version_coder & 3,
        gray=bool(flags & 128),
        deep=bool(flags & 64),
        reduced=reduced,
        effort=flags >> 1 & 15,
        version=version_coder >> 2,
    )
    problem = _range_problem(header)
    if problem:
        raise CorruptError(f"damaged: {problem}")
    lengths = _read_array(reader, _tile_count(header) * streams)
    reader.align()
    sections: list[tuple[str, int]] = []
    if has_sections:
        has_filter, count = reader.read(1), reader.read(7)
        if has_filter:
            sections.append((FILTER, reader.read(8)))
        elif count == 0:
            raise CorruptError("damaged: an empty section table")
        for kind_bytes, length in _SECTION.iter_unpack(reader.read_bytes(_SECTION.size * count)):
            kind = kind_bytes.decode("latin-1")
            if not _SECTION_KIND.fullmatch(kind):
                raise CorruptError("damaged: a section kind is not 4 letters")
            if kind in (other for other, _ in sections):
                raise CorruptError(f"damaged: two sections {kind}")
            sections.append((kind, length))
    total = reader.offset + sum(lengths) + sum(length for _, length in sections) + _CRC.size
    return Index(header, lengths, tuple(sections), reader.offset, total)


def layout(data: bytes) -> list[Part]:
    """Name, offset and size in bytes of every part of the file, in file order and without gaps.

    Describes the whole file even where ``data`` is truncated. Raises what :func:`parse_header` raises.
    """
    index = parse_header(data)
    tiles = index.tiles
    stream_names = ["hyper", *(f"group {group}" for group in range(index.header.streams - 1))]
    names = [f"{name}, tile {tile}" if tiles > 1 else name for name in stream_names for tile in range(tiles)]
    sizes = [*zip(names, index.lengths, strict=True), *index.sections, ("checksum", _CRC.size)]
    parts = [Part("header", 0, index.payload)]
    for name, size in sizes:
        parts.append(Part(name, parts[-1].offset + parts[-1].size, size))
    return parts


def _write_array(writer: BitWriter, values: list[int]) -> None:
    """Bits per value - 1 in 5 bits, then the values, each in that many bits."""
    bits = max(1, max(values).bit_length())
    writer.write(bits - 1, 5)
    for value in values:
        writer.write(value, bits)


def _read_array(reader: BitReader, count: int) -> tuple[int, ...]:
    bits = reader.read(5) + 1
    reader.require(bits * count)  # before anything is allocated
    values = tuple(reader.read(bits) for _ in range(count))
    if bits > 1 and max(values).bit_length() < bits:
        raise CorruptError("damaged: numbers of the header are longer than they need be")
    return values


def _tile_count(header: Header) -> int:
    if header.tile == 0:
        return 1
    return -(-header.width // header.tile) * -(-header.height // header.tile)


def _range_problem(header: Header) -> str | None:
    """The rule of the format that the header breaks, in words, or None."""
    ranges = [
        ("width", header.width, 1, 2**32),
        ("height", header.height, 1, 2**32),
        ("quality", header.quality, 0, MAX_CODE),
        ("length of the model name", len(header.model), 1, 31),
        ("length of the entropy id", len(header.entropy_id), 4, 4),
        ("length of the synthesis id", len(header.synthesis_id), 2, 2),
        ("tile", header.tile, 0, TILE_UNIT * 2**16),
        ("streams", header.streams, 2, 255),
        ("symbols_crc", header.symbols_crc, 0, 2**32 - 1),
        ("coder", header.coder, 0, 3),
        ("reduced", header.reduced, 0, 255),
        ("effort", header.effort, 0, 9),
        ("version", header.version, 1, FORMAT_VERSION),
    ]
    for name, value, low, high in ranges:
        if not low <= value <= high:
            return f"{name} {value} is not between {low} and {high}"
    if not set(header.model) <= set(NAME_ALPHABET):
        return "the model name holds a character outside a-z 0-9 . _ -"
    if header.tile % TILE_UNIT:
        return f"tile {header.tile} is not a multiple of {TILE_UNIT}"
    if _tile_count(header) * header.streams > MAX_STREAMS:
        return f"{_tile_count(header)} tiles of {header.streams} streams are more than {MAX_STREAMS} streams"
    return None


def _padded(width: int, height: int) -> int:
    """Pixels with both sides rounded up to multiples of TILE_UNIT."""
    return -(-width // TILE_UNIT) * -(-height // TILE_UNIT) * TILE_UNIT**2


def over_limit(width: int, height: int, max_pixels: int | None) -> str | None:
    """That a picture has more pixels than the limit, in words, or None; readers and writers count them alike."""
    if max_pixels is None or _padded(width, height) <= max_pixels:
        return None
    size = f"{width}x{height}, {_padded(width, height)} pixels in units of {TILE_UNIT}x{TILE_UNIT}"
    return f"{size}, is over the limit of {max_pixels} pixels: raise it with --max-pixels"


def _too_large(header: Header) -> str | None:
    """The limit that the first tile, which is the largest, exceeds, in words, or None."""
    width, height = header.width, header.height
    if header.tile:
        width, height = min(width, header.tile), min(height, header.tile)
    if _padded(width, height) > TILE_LIMIT:
        return f"tiles of {width}x{height} are too large: over {TILE_LIMIT} pixels in units of {TILE_UNIT}x{TILE_UNIT}"
    return None


def _unsupported(header: Header, kinds: Iterable[str]) -> str | None:
    """What this version does not know, in words, or None."""
    if header.coder not in CODERS:
        return f"coder {header.coder} is unknown"
    unknown = sorted({kind for kind in kinds if kind[:1].isupper()} - MANDATORY_SECTIONS)
    if unknown:
        return f"section {', '.join(unknown)} is needed to decode and unknown"
    return None
