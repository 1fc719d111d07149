"""Regions: exactly those pixels of the whole picture, from no more tiles than they need."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import lic as package
from lic import container
from lic.errors import CorruptError, LicError, UsageError
from lic.part import Region, parse_region
from lic.pipeline import codec as pipeline
from lic.pipeline import windows

Run = Callable[..., subprocess.CompletedProcess[bytes]]
HEIGHT, WIDTH, TILE = 300, 420, 128


@pytest.fixture(scope="module", autouse=True)
def small_tiles() -> object:
    """Tiles of 128 pixels and windows of 192, so that a small picture has many of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "TILE", TILE)
        patch.setattr(pipeline, "LARGEST_TILE", TILE * TILE)
        patch.setattr(windows, "WINDOW", 12)
        yield


@pytest.fixture(scope="module")
def codec() -> package.Codec:
    return package.Codec("tiny", "cpu")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """RGB and alpha, textured, so that every window matters."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = [128 + 100 * np.sin(x / 30 + y / 50), 128 + 90 * np.cos(y / 20), x * y % 256, (x + 2 * y) % 256]
    return np.stack(planes, axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def tiled(codec: package.Codec, picture: np.ndarray) -> bytes:
    return codec.encode(picture)


@pytest.fixture(scope="module")
def whole(codec: package.Codec, tiled: bytes) -> np.ndarray:
    return codec.decode_array(tiled)


def tiles_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streams of each tile that is decoded from now on."""
    read: list[int] = []
    code_tiles = pipeline.code_tiles

    def counting(*arguments: object) -> object:
        read.append(1)
        return code_tiles(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "code_tiles", counting)
    return read


@st.composite
def regions(draw: st.DrawFn) -> Region:
    x, y = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
    width = draw(st.integers(1, min(WIDTH - x, 150)))
    return Region(x, y, width, draw(st.integers(1, min(HEIGHT - y, 150))))


@settings(max_examples=10, deadline=None)
@given(region=regions())
def test_a_region_is_the_same_as_in_the_whole_picture(
    codec: package.Codec, tiled: bytes, whole: np.ndarray, region: Region
) -> None:
    assert np.array_equal(codec.decode_array(tiled, region=region), region.of(whole))


@pytest.mark.parametrize(
    ("region", "tiles"),
    [
        ((0, 0, WIDTH, HEIGHT), 12),
        ((WIDTH - 1, HEIGHT - 1, 1, 1), 4),
        ((0, 0, 1, 1), 4),  # the halo is a little wider than such a tile
        ((130, 130, 90, 90), 9),
    ],
)
def test_only_the_tiles_near_the_region_are_decoded(
    codec: package.Codec,
    tiled: bytes,
    monkeypatch: pytest.MonkeyPatch,
    region: tuple[int, int, int, int],
    tiles: int,
) -> None:
    read = tiles_read(monkeypatch)
    codec.decode(tiled, region=region)
    assert len(read) == tiles


def test_deep_gray_of_one_tile(codec: package.Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LARGEST_TILE", 10**9)
    y, x = np.mgrid[0:210, 0:300]
    data = codec.encode((200 * x + 99 * y).astype(np.uint16))
    region = Region(190, 77, 110, 90)
    cut = codec.decode_result(data, region=region)
    assert cut.picture.to_array().dtype == np.uint16
    assert np.array_equal(cut.picture.to_array(), region.of(codec.decode_array(data)))
    assert cut.symbols_sha256 == codec.decode_result(data).symbols_sha256


def test_symbols_are_checked_where_all_are_decoded(codec: package.Codec, tiled: bytes) -> None:
    assert codec.decode_result(tiled, region=(0, 0, 5, 5)).symbols_sha256 is None
    parsed = container.parse(tiled)
    wrong = container.pack(replace(parsed, header=replace(parsed.header, symbols_crc=parsed.header.symbols_crc ^ 1)))
    codec.decode(wrong, region=(0, 0, 5, 5))
    with pytest.raises(CorruptError, match="symbols"):
        codec.decode(wrong, region=(0, 0, WIDTH, HEIGHT))


def test_transparency_and_metadata_stay(codec: package.Codec) -> None:
    golden = Path(__file__).parent / "data" / "golden"
    data = (golden / "metadata-q40.lic").read_bytes()
    image, cut = codec.decode(data), package.decode(data, region=(3, 4, 20, 10))
    assert cut.size == (20, 10) and cut.info == image.info and cut.info
    data = (golden / "alpha-q40.lic").read_bytes()
    image, cut = codec.decode(data), codec.decode(data, region=(3, 4, 20, 10))
    assert cut.mode == image.mode and cut.mode.endswith("A")
    assert np.array_equal(np.asarray(cut), np.asarray(image)[4:14, 3:23])


def test_lists_share_the_region(codec: package.Codec, tiled: bytes) -> None:
    assert [image.size for image in codec.decode([tiled, tiled], region=(1, 2, 3, 4))] == [(3, 4)] * 2


@pytest.mark.parametrize("region", [(0, 0, 0, 1), (0, 0, 1, 0), (-1, 0, 5, 5), (0, -1, 5, 5), (1, 2, 3), "12"])
def test_regions_that_make_no_sense_are_usage_errors(codec: package.Codec, tiled: bytes, region: object) -> None:
    with pytest.raises(UsageError, match="a region"):
        codec.decode(tiled, region=region)  # type: ignore[call-overload]


@pytest.mark.parametrize("region", [(WIDTH, 0, 1, 1), (0, HEIGHT, 1, 1), (WIDTH - 4, 0, 5, 1), (0, HEIGHT - 4, 1, 5)])
def test_regions_outside_the_picture_are_refused(
    codec: package.Codec, tiled: bytes, region: tuple[int, int, int, int]
) -> None:
    with pytest.raises(LicError, match="beyond the picture of 420x300") as caught:
        codec.decode(tiled, region=region)
    assert caught.value.exit_code == 1


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(1, 10**12), st.integers(1, 10**12))
def test_text_becomes_a_region(x: int, y: int, width: int, height: int) -> None:
    assert parse_region(f"{x},{y}, {width},{height}") == (x, y, width, height)


# ----------------------------------------------------------------------------------------------------
# the command


def test_the_command_cuts_and_tells_the_size(lic: Run, tmp_path: Path, codec: package.Codec, tiled: bytes) -> None:
    done = lic("decode", "-", "-", "--region", "40,50,30,20", "--json", input=tiled)
    assert done.returncode == 0, done.stderr
    image = Image.open(io.BytesIO(done.stdout))
    assert image.size == (30, 20) and image.mode == "RGBA"
    facts = json.loads(done.stderr)
    assert (facts["width"], facts["height"]) == (30, 20)
    assert facts["bpp"] == round(8 * len(tiled) / (WIDTH * HEIGHT), 4)
    assert facts["symbols_sha256"] is None


def test_a_batch_cuts_every_file(lic: Run, tmp_path: Path, codec: package.Codec) -> None:
    for name, side in (("a", 90), ("b", 40)):
        (tmp_path / f"{name}.lic").write_bytes(codec.encode(np.zeros((side, side), np.uint8)))
    done = lic("decode", "a.lic", "b.lic", "--output-dir", "out", "--region", "50,50,8,9")
    assert done.returncode == 1
    assert b"b.lic: the region 50,50,8,9 reaches beyond the picture of 40x40 pixels" in done.stderr
    assert Image.open(tmp_path / "out" / "a.png").size == (8, 9)


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "a,b,c,d", "1.5,2,3,4", "0,0,0,5", "-1,0,5,5", ""])
def test_the_command_refuses_nonsense_before_it_reads(lic: Run, text: str) -> None:
    done = lic("decode", "missing.lic", "x.png", "--region", text)
    assert done.returncode == 2 and b"'--region'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_command_refuses_a_region_outside(lic: Run, tmp_path: Path, tiled: bytes) -> None:
    done = lic("decode", "-", "x.png", "--region", "410,0,11,1", input=tiled)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()
