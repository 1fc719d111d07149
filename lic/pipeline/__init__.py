"""Pixels to container and back."""

from lic.pipeline.codec import Decoded, Encoded, decode_rgb, decode_rgbs, encode_rgb, encode_rgbs

__all__ = ["Decoded", "Encoded", "decode_rgb", "decode_rgbs", "encode_rgb", "encode_rgbs"]
