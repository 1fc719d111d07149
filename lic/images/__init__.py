"""Pictures in and out: files and bytes to 8-bit RGB arrays and back. No torch."""

from lic.images.reading import PICTURE_SUFFIXES, metadata_of, picture_of, rgb_of
from lic.images.writing import FORMATS, format_of_suffix, picture_bytes

__all__ = ["FORMATS", "PICTURE_SUFFIXES", "format_of_suffix", "metadata_of", "picture_bytes", "picture_of", "rgb_of"]
