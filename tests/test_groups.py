"""Groups of blocks that look alike: what they would change in pixels, compiled or not, and how far they reach."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from lic.denoising import groups
from lic.denoising.groups import GROUPED, RADIUS, REACH

STEP = 20.0


def striped(planes: int, height: int, width: int) -> np.ndarray:
    """Stripes, so that pixels look alike, and noise of the quantiser's size; REACH more at each side.

    Whole numbers, so that distances are the same in whatever order they are summed up.
    """
    random = np.random.default_rng(width)
    s = 12 * np.cos(np.arange(planes))[:, None, None] * ((np.arange(width) + np.arange(height)[:, None]) // 5 % 2)
    s = np.rint(s + random.normal(0, STEP / 4, s.shape))
    return np.pad(s, ((0, 0), (REACH, REACH), (REACH, REACH)), mode="edge")


def along(members: np.ndarray) -> np.ndarray:
    """The Haar transform of 16, as the specification has it."""
    found, means = [], members
    while len(means) > 1:
        one, other = means[::2], means[1::2]
        found.append((one - other) / 2**0.5)
        means = (one + other) / 2**0.5
    return np.concatenate([means, *reversed(found)])


def back(found: np.ndarray) -> np.ndarray:
    means = found[:1]
    while len(means) < len(found):
        differences = found[len(means) : 2 * len(means)]
        means = np.stack([means + differences, means - differences], axis=1).reshape(-1, *found.shape[1:]) / 2**0.5
    return means


def by_the_specification(planes: np.ndarray) -> np.ndarray:
    """Chapter 6.4, group by group, of planes (K, H + 2·REACH, W + 2·REACH): (GROUPED, K, H, W)."""
    height, width = (side - 2 * REACH for side in planes.shape[1:])
    sides = range(-14, 15)
    offsets = sorted(((i, j) for i in sides for j in sides if i or j), key=lambda at: at[0] ** 2 + at[1] ** 2)
    variance = STEP**2 / 12
    sums, counts = np.zeros((2, *planes.shape)), np.zeros((2, *planes.shape[1:]))
    # All blocks that may have a member in the picture, at multiples of 4 in it.
    for top, left in itertools.product(
        range(REACH - 20, REACH + height + 14, 4), range(REACH - 20, REACH + width + 14, 4)
    ):
        own = planes[0, top : top + 8, left : left + 8]
        distances = [np.square(planes[0, top + i :, left + j :][:8, :8] - own).sum() for i, j in offsets]
        nearest = np.argsort(distances, kind="stable")[:15]
        corners = [(top, left), *((top + offsets[n][0], left + offsets[n][1]) for n in nearest)]
        weights = [1, *((1 + distances[n] / (16 * variance)) ** -4 for n in nearest)]
        members = np.stack([planes[:, i : i + 8, j : j + 8] for i, j in corners])
        found = along(dctn(members, axes=(2, 3), norm="ortho"))
        factors = found**2 / (found**2 + 0.4**2 * variance)
        factors[0, :, 0, 0] = 1
        shrunken = idctn(back(found * factors), axes=(2, 3), norm="ortho")
        mean = np.tensordot(weights, members, 1) / sum(weights)
        for (i, j), weight, block in zip(corners, weights, shrunken, strict=True):
            rows, columns = slice(i, i + 8), slice(j, j + 8)
            sums[0][:, rows, columns] += block
            sums[1][:, rows, columns] += weight * mean
            counts[0][rows, columns] += 1
            counts[1][rows, columns] += weight
    inner = (..., slice(REACH, REACH + height), slice(REACH, REACH + width))
    return sums[inner] / counts[:, None][inner] - planes[inner]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("planes", [1, 3])
def test_they_do_what_the_specification_says(planes: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("LIC_CODER", "python")
    pixels = striped(planes, 27, 10)
    expected = by_the_specification(pixels)
    assert np.abs(expected).max() > 1
    found = groups.grouped(torch.from_numpy(pixels).float(), STEP).numpy()
    assert found.shape == (GROUPED, planes, 27, 10)
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("height, width", [(150, 300), (5, 3), (1, 130)])
def test_those_of_compiled_loops_are_those_of_torch(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.from_numpy(striped(2, height, width)).float()
    compiled = groups.grouped(pixels, STEP)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):  # nothing depends on who computes it
            torch.set_num_threads(number)
            assert torch.equal(groups.grouped(pixels, STEP), compiled)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("LIC_CODER", "python")
    torch.testing.assert_close(groups.grouped(pixels, STEP), compiled, atol=2e-3, rtol=0)


def test_they_depend_on_no_pixel_beyond_their_reach() -> None:
    assert REACH >= 2 * RADIUS + 7
    pixels = torch.from_numpy(striped(1, 84, 84)).float()
    whole, part = groups.grouped(pixels, STEP), groups.grouped(pixels[:, 8:-8, 12:-12].contiguous(), STEP)
    torch.testing.assert_close(part, whole[..., 8:-8, 12:-12], atol=1e-4, rtol=0)
