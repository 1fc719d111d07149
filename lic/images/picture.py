"""A picture between files and codec: samples, transparency, metadata, and what reading it cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from lic.container import Metadata
from lic.errors import LicError


@dataclass(frozen=True, eq=False)
class Picture:
    """``colour``: uint8 or uint16, (H, W, 3), or (H, W, 1) if gray. ``alpha``: of the same type, (H, W), or None.

    ``reduced`` is a sum of :class:`lic.container.Reduced`; ``notes`` say in words what the source had and the
    picture has not.
    """

    colour: np.ndarray
    alpha: np.ndarray | None = None
    metadata: Metadata = field(default_factory=Metadata)
    reduced: int = 0
    notes: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        return self.colour.shape[0]

    @property
    def width(self) -> int:
        return self.colour.shape[1]

    @property
    def bits(self) -> int:
        """Of a sample: 8 or 16."""
        return 8 * self.colour.dtype.itemsize

    @property
    def mode(self) -> str:
        """Pillow's: L, LA, RGB or RGBA, whatever the depth."""
        return ("L" if self.colour.shape[2] == 1 else "RGB") + "A" * (self.alpha is not None)

    def at_bits(self, bits: int) -> Picture:
        """With samples of 8 or 16 bits."""
        if bits == self.bits:
            return self
        alpha = None if self.alpha is None else samples_at_bits(self.alpha, bits)
        return replace(self, colour=samples_at_bits(self.colour, bits), alpha=alpha)

    def to_array(self) -> np.ndarray:
        """(H, W) gray, (H, W, 2) gray and alpha, (H, W, 3) RGB or (H, W, 4) RGB and alpha."""
        if self.alpha is not None:
            return np.concatenate([self.colour, self.alpha[..., None]], axis=2)
        return self.colour[..., 0] if self.colour.shape[2] == 1 else self.colour

    def to_image(self) -> Image.Image:
        """For Pillow, with the metadata in ``info``. 16 bits stay for gray alone (I;16); the others become 8."""
        picture = self if self.mode == "L" else self.at_bits(8)
        image = Image.fromarray(picture.to_array())
        names = {"icc": "icc_profile", "exif": "exif", "xmp": "xmp"}
        image.info.update({names[kind]: value for kind, value in self.metadata.as_dict().items()})
        return image


def samples_at_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """uint8 or uint16 as uint8 (rounded) or uint16 of the same range."""
    if samples.dtype == (np.uint8 if bits == 8 else np.uint16):
        return samples
    if bits == 16:
        return samples.astype(np.uint16) * np.uint16(257)
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def picture_of_array(array: np.ndarray) -> Picture:
    """uint8 or uint16 of shape (H, W), or (H, W, 1..4): gray, gray and alpha, RGB, RGB and alpha.

    Raises LicError for other arrays.
    """
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    native = array.dtype.newbyteorder("=")
    if native not in (np.uint8, np.uint16) or not 1 <= channels <= 4:
        shape = "x".join(str(n) for n in array.shape)
        raise LicError(
            f"an array must be uint8 or uint16 of shape (H, W) or (H, W, 1 to 4), not {array.dtype} of shape {shape}"
        )
    if array.size == 0:
        raise LicError("the picture has no pixels")
    samples = array.reshape(*array.shape[:2], channels).astype(native, copy=False)
    split = channels - 1 if channels in (2, 4) else channels
    alpha = samples[..., split] if split < channels else None
    colour = np.ascontiguousarray(samples[..., :split])
    return Picture(colour, None if alpha is None else np.ascontiguousarray(alpha))
