"""Pictures in and out: files, bytes, Pillow's pictures and arrays to samples and back. No torch."""

from lic.images.alpha import alpha_of, alpha_section, with_hidden_filled
from lic.images.comparison import (
    MS_SSIM_C1,
    MS_SSIM_C2,
    MS_SSIM_SIGMA,
    MS_SSIM_WINDOW,
    ms_ssim_exponents,
    mse,
    psnr,
)
from lic.images.picture import Picture, samples_at_bits
from lic.images.reading import PICTURE_SUFFIXES, picture_of, rgb_of
from lic.images.writing import FORMATS, FORMATS_16, format_of_suffix, left_out, picture_bytes

__all__ = [
    "FORMATS",
    "FORMATS_16",
    "MS_SSIM_C1",
    "MS_SSIM_C2",
    "MS_SSIM_SIGMA",
    "MS_SSIM_WINDOW",
    "PICTURE_SUFFIXES",
    "Picture",
    "alpha_of",
    "alpha_section",
    "format_of_suffix",
    "left_out",
    "ms_ssim_exponents",
    "mse",
    "picture_bytes",
    "picture_of",
    "psnr",
    "rgb_of",
    "samples_at_bits",
    "with_hidden_filled",
]
