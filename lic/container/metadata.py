"""Metadata in sections: what a picture carries besides its pixels, compressed (bitstream_spec.md, 7.3)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields

from lic.container.format import Section
from lic.errors import CorruptError

METADATA_LIMIT = 2**24  # bytes of one kind, so that a small section cannot become all of a reader's memory
_FIELDS = {"iccp": "icc", "exif": "exif", "xmpd": "xmp"}  # of Metadata, by kind of section


@dataclass(frozen=True)
class Metadata:
    """``icc``: a colour profile; ``exif``: from its TIFF header on; ``xmp``: a packet. None where there is none.

    None is longer than METADATA_LIMIT.
    """

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None

    def __bool__(self) -> bool:
        return any(self.as_dict().values())

    def as_dict(self) -> dict[str, bytes]:
        """What is there, by name of the field."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}


def metadata_sections(metadata: Metadata) -> tuple[Section, ...]:
    """The sections that hold ``metadata``. ValueError if something is longer than METADATA_LIMIT."""
    there = metadata.as_dict()
    if any(len(value) > METADATA_LIMIT for value in there.values()):
        raise ValueError(f"metadata of more than {METADATA_LIMIT} bytes")
    return tuple(Section(kind, zlib.compress(there[name], 9)) for kind, name in _FIELDS.items() if name in there)


def metadata_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Which fields of Metadata sections of these kinds hold."""
    return tuple(_FIELDS[kind] for kind in kinds if kind in _FIELDS)


def metadata_of(sections: Iterable[Section]) -> Metadata:
    """The metadata in ``sections``; other sections are passed over.

    Raises CorruptError if one does not decompress, or to more than METADATA_LIMIT bytes.
    """
    return Metadata(**{_FIELDS[s.kind]: _decompressed(s) for s in sections if s.kind in _FIELDS})


def _decompressed(section: Section) -> bytes:
    stream = zlib.decompressobj()
    try:
        value = stream.decompress(section.data, METADATA_LIMIT + 1)
    except zlib.error:
        raise CorruptError(f"damaged: section {section.kind} does not decompress") from None
    if len(value) > METADATA_LIMIT:
        raise CorruptError(f"damaged: section {section.kind} is longer than {METADATA_LIMIT} bytes")
    if not value or not stream.eof or stream.unused_data:
        raise CorruptError(f"damaged: section {section.kind} is empty or does not end where its data ends")
    return value
