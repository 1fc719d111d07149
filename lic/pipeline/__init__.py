"""Pixels to container and back."""

from lic.pipeline.codec import Decoded, Encoded, decode_rgb, encode_rgb

__all__ = ["Decoded", "Encoded", "decode_rgb", "encode_rgb"]
