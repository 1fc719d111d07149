"""Bytes in, bytes out: the ``.lic`` container. No torch."""

from lic.container.format import (
    DEFAULT_MAX_PIXELS,
    FORMAT_VERSION,
    MAGIC,
    MAX_STREAMS,
    TILE_LIMIT,
    Container,
    Header,
    Index,
    Part,
    Section,
    layout,
    pack,
    parse,
    parse_header,
    tile_boxes,
)

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "FORMAT_VERSION",
    "MAGIC",
    "MAX_STREAMS",
    "TILE_LIMIT",
    "Container",
    "Header",
    "Index",
    "Part",
    "Section",
    "layout",
    "pack",
    "parse",
    "parse_header",
    "tile_boxes",
]
