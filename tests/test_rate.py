"""Rate control: the search on curves of all kinds, and real encodings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, Run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import lic
from lic.errors import LicError
from lic.quality import MAX_CODE
from lic.rate import MAX_TRIES, Target, parse_size, search

PIXELS = 400_000


def size_curve(low: float, high: float, bend: float, noise: float):
    """Bytes as a function of the code: from low to high bpp, bent, not quite smooth."""

    def size(code: int) -> int:
        t = (code / MAX_CODE) ** bend
        wobble = noise * math.sin(code * 0.7)
        return max(40, round(PIXELS / 8 * low * (high / low) ** t * (1 + wobble)))

    return size


@settings(max_examples=200, deadline=None)
@given(
    low=st.floats(0.003, 0.4),
    ratio=st.floats(5, 300),
    bend=st.floats(0.4, 2.5),
    noise=st.floats(0, 0.002),
    place=st.floats(0.01, 0.99),
)
def test_size_is_used_and_never_exceeded(low: float, ratio: float, bend: float, noise: float, place: float) -> None:
    size = size_curve(low, low * ratio, bend, noise)
    limit = size(round(place * MAX_CODE)) * 1.001 + 1
    assume(size(0) <= limit)  # the wobble may put the smallest size elsewhere
    tries: list[int] = []
    found = search(lambda code: tries.append(code) or code, lambda code: size(code), Target("size", limit), PIXELS)
    assert found.value == size(found.code) == size(found.result) <= limit
    assert found.value >= 0.985 * limit or found.code == MAX_CODE
    assert len(tries) <= MAX_TRIES and len(set(tries)) == len(tries)


@settings(max_examples=100, deadline=None)
@given(base=st.floats(15, 35), gain=st.floats(5, 30), bend=st.floats(0.5, 2), place=st.floats(0.0, 0.99))
def test_psnr_is_met_from_above(base: float, gain: float, bend: float, place: float) -> None:
    def psnr(code: int) -> float:
        return base + gain * (code / MAX_CODE) ** bend

    limit = psnr(round(place * MAX_CODE))
    found = search(lambda code: code, lambda code: psnr(code), Target("psnr", limit), PIXELS)
    assert limit <= found.value <= limit + 0.02


def test_a_first_code_that_is_near_saves_tries() -> None:
    size = size_curve(0.1, 3.0, 1.0, 0.0)
    tries: list[int] = []
    limit = size(20_000)
    found = search(
        lambda code: tries.append(code) or code, lambda code: size(code), Target("size", limit), PIXELS, first=20_500
    )
    assert 0.985 * limit <= found.value <= limit and tries[0] == 20_500 and len(tries) <= 4
    nearest = search(lambda code: code, lambda code: size(code), Target("size", 100), PIXELS, or_nearest=True)
    assert nearest.code == 0


def test_targets_out_of_reach_name_the_nearest_value() -> None:
    size = size_curve(0.1, 3.0, 1.0, 0.0)
    with pytest.raises(LicError, match=r"100 bytes: at least 5000 bytes \(0\.1000 bpp\)"):
        search(lambda code: code, lambda code: size(code), Target("size", 100), PIXELS)
    with pytest.raises(LicError, match=r"0\.05 bpp: at least"):
        search(lambda code: code, lambda code: size(code), Target("bpp", 0.05), PIXELS)
    with pytest.raises(LicError, match=r"60 dB: at most 45\.00 dB"):
        search(lambda code: code, lambda code: 25 + code / 2500, Target("psnr", 60), PIXELS)
    generous = search(lambda code: code, lambda code: size(code), Target("size", 10**9), PIXELS)
    assert generous.code == MAX_CODE


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_targets_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Target("size", value)


@pytest.mark.parametrize(
    ("text", "size"), [("20000", 20_000), ("20k", 20_000), ("1.5M", 1_500_000), ("100Ki", 102_400), ("3 kB", 3_000)]
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-3k", "1e5", "20x", "5i", "1.2.3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)


@pytest.fixture(scope="module")
def codec() -> lic.Codec:
    return lic.Codec("tiny")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.asarray(Image.open(DATA / "demo.png").convert("RGB").crop((100, 50, 420, 290)))


@pytest.mark.parametrize("size", [700, 2_000, 7_000])
def test_real_files_of_a_size(codec: lic.Codec, photo: np.ndarray, size: int) -> None:
    result = codec.encode_result(photo, target=lic.Target("size", size))
    assert 0.985 * size <= len(result.data) <= size
    assert lic.info(result.data).quality == pytest.approx(result.quality)


def test_real_files_of_a_rate_and_of_a_psnr(codec: lic.Codec, photo: np.ndarray) -> None:
    data = codec.encode(photo, target=lic.Target("bpp", 0.4))
    assert 0.985 * 0.4 <= 8 * len(data) / (320 * 240) <= 0.4
    # PSNR may jump where the filter behind the synthesis begins to pay for its bits.
    assert 33 <= codec.encode_result(photo, target=lic.Target("psnr", 33)).psnr <= 33.06
    with pytest.raises(lic.UsageError, match="exclude"):
        codec.encode(photo, 40, target=lic.Target("psnr", 33))


def test_targets_on_the_command_line(lic: Run, tmp_path: Path, photo: np.ndarray) -> None:
    Image.fromarray(photo).save(tmp_path / "in.png")
    run = lic("encode", "in.png", "out.lic", "--model", "tiny", "--target-size", "3k")
    assert run.returncode == 0, run.stderr
    assert 2_955 <= (tmp_path / "out.lic").stat().st_size <= 3_000
    before = (tmp_path / "out.lic").read_bytes()
    run = lic("encode", "in.png", "out.lic", "--model", "tiny", "--target-psnr", "99")
    assert run.returncode == 1 and b"at most" in run.stderr and len(run.stderr.splitlines()) == 1
    assert (tmp_path / "out.lic").read_bytes() == before
    wrong_options = "-q 3 --target-bpp 1", "--target-bpp 1 --target-size 5k", "--target-size x"
    for wrong in wrong_options:
        assert lic("encode", "in.png", "out.lic", *wrong.split()).returncode == 2
