"""Pictures unlike photographs, with the shipped weights: never worse than nothing."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DATA
from PIL import Image

import lic

SCRIPT = Path(__file__).parent.parent / "scripts" / "pattern_check.py"


@pytest.mark.parametrize(
    "model, qualities",
    [
        ("base", "40"),
        pytest.param("base", "10,80", marks=pytest.mark.slow),
        pytest.param("base-ms-ssim", "10,40,80", marks=pytest.mark.slow),
    ],
)
def test_patterns_are_better_than_their_mean_colour(model: str, qualities: str) -> None:
    """The weights before the limit of the synthesis answered most of them with black and white at random."""
    result = CliRunner().invoke(
        runpy.run_path(str(SCRIPT))["main"], ["--model", model, "--qualities", qualities, "--threads", "1"]
    )
    rows = result.output.splitlines()[2:]
    assert len(rows) > 15, result.output
    assert not [row for row in rows if "worse" in row] and result.exit_code == 0, result.output


def test_a_pattern_in_a_photograph_stays_where_it_is() -> None:
    codec = lic.Codec("base")
    plain = np.asarray(Image.open(DATA / "demo.png").convert("RGB"))[:256, :256]
    drawn = plain.copy()
    y, x = np.mgrid[:32, :32]
    drawn[96:128, 96:128] = ((x + y) % 2 * 255)[..., None]
    error = [
        np.square(np.asarray(codec.decode(codec.encode(pixels, quality=40)), float) - pixels).mean(-1)
        for pixels in (plain, drawn)
    ]
    outside = np.ones((256, 256), bool)
    outside[32:192, 32:192] = False  # the pattern, and what the transforms reach from it
    assert error[1][outside].mean() < 1.5 * error[0][outside].mean()
