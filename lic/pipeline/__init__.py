"""Pixels to container and back."""

from lic.pipeline.codec import Decoded, Encoded, decode_rgb, encode_rgb
from lic.pipeline.device import select_device

__all__ = ["Decoded", "Encoded", "decode_rgb", "encode_rgb", "select_device"]
