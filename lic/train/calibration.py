"""Units of the exact path's integers, fitted to pictures."""

from __future__ import annotations

import torch

from lic.model.codec import CodecModel
from lic.model.config import HYPER_DOWNSAMPLING
from lic.quality import MAX_CODE
from lic.train.data import Pictures

CROPS = 16  # of each kind: pictures as they are, and scaled down
SIDE = 256
QUALITIES = 9


@torch.no_grad()
def calibrate(net: CodecModel, pictures: Pictures) -> None:
    """Fit the units of the exact path to crops of pictures at qualities from 0 to 100.

    Raises LicError if no picture gives a crop of 64 pixels a side.
    """
    pictures.wait(HYPER_DOWNSAMPLING)
    device = net.sigma.device
    generator = torch.Generator(device).manual_seed(0)
    with net.calibration():
        for pool in pictures.pools:
            largest = int(pool.sizes[:, 1:].amin(dim=1).max())
            side = min(SIDE, largest // HYPER_DOWNSAMPLING * HYPER_DOWNSAMPLING)
            for _ in range(CROPS // 4):
                x = pool.crops(4, side, generator).float() / 255 - 0.5
                for code in torch.linspace(0, MAX_CODE, QUALITIES).round().tolist():
                    codes = torch.full((len(x),), code, device=device)
                    y = net.analysis(x, codes)
                    net.predict(torch.round(net.hyper_analysis(y, codes)), torch.round(y), codes)
