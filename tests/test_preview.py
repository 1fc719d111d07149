"""Previews: the leading groups of a file, whole, truncated or damaged."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_context import config_of

import lic as package
from lic import container
from lic.api import psnr
from lic.errors import CorruptError, UnsupportedError, UsageError
from lic.model import store
from lic.model.codec import CodecModel
from lic.model.context import SYSTEMS
from lic.part import parse_preview
from lic.pipeline import codec as pipeline
from lic.pipeline import decode_rgb, encode_rgb

Run = Callable[..., subprocess.CompletedProcess[bytes]]
GROUPS = 8  # of the tiny model


@pytest.fixture(scope="module")
def codec() -> package.Codec:
    return package.Codec("tiny", "cpu")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A part of the demo picture."""
    return np.ascontiguousarray(np.asarray(Image.open(DATA / "demo.png").convert("RGB"))[200:328, 300:492])


@pytest.fixture(scope="module")
def coded(codec: package.Codec, photo: np.ndarray) -> bytes:
    return codec.encode(photo, 60)


@pytest.fixture(scope="module")
def tiled(codec: package.Codec, photo: np.ndarray) -> bytes:
    """Six tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "TILE", 64)
        patch.setattr(pipeline, "LARGEST_TILE", 64 * 64)
        return codec.encode(photo, 60)


def stream_ends(data: bytes) -> list[int]:
    """Where each stream ends, in file order."""
    index = container.parse_header(data)
    return list(accumulate(index.lengths, initial=index.payload))[1:]


def test_more_groups_are_better(codec: package.Codec, photo: np.ndarray, coded: bytes) -> None:
    shown = [codec.decode_result(coded, preview=n) for n in range(1, GROUPS + 1)]
    quality = [psnr(photo, result.rgb) for result in shown]
    assert quality == sorted(quality) and quality[0] > 15
    assert [result.notes for result in shown] == [
        *((f"preview of {n} of {GROUPS} groups",) for n in range(1, GROUPS)),
        (),  # that is no preview
    ]
    assert [result.symbols_sha256 is None for result in shown] == [True] * (GROUPS - 1) + [False]


@pytest.mark.parametrize("preview", [GROUPS, 1000, "auto"])
def test_everything_is_the_picture(codec: package.Codec, coded: bytes, preview: int) -> None:
    assert np.array_equal(codec.decode_array(coded, preview=preview), codec.decode_array(coded))


def test_groups_that_are_not_shown_are_not_read(codec: package.Codec, coded: bytes) -> None:
    ends = stream_ends(coded)
    for n in (1, 5):
        expected = codec.decode_array(coded, preview=n)
        damaged = coded[: ends[n]] + bytes(len(coded) - ends[n])
        assert np.array_equal(codec.decode_array(coded[: ends[n]], preview=n), expected)
        assert np.array_equal(codec.decode_array(damaged, preview=n), expected)
        assert np.array_equal(codec.decode_array(coded[: ends[n]], preview="auto"), expected)
        with pytest.raises(CorruptError, match=f"{n} of {n + 1} groups are whole"):
            codec.decode(coded[: ends[n + 1] - 1], preview=n + 1)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_truncated_file_shows_its_whole_groups(
    codec: package.Codec, coded: bytes, tiled: bytes, data: st.DataObject
) -> None:
    file = data.draw(st.sampled_from([coded, tiled]))
    size = data.draw(st.integers(0, len(file) - 1))
    tiles = container.parse_header(file).tiles
    whole = sum(end <= size for end in stream_ends(file))
    if whole <= tiles:  # no tile has a group behind its hyper-latents
        with pytest.raises(CorruptError) as caught:
            codec.decode(file[:size], preview="auto")
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
        return
    result = codec.decode_result(file[:size], preview="auto")
    assert result.rgb.shape == (128, 192, 3)
    most, least = -(-whole // tiles) - 1, max(1, whole // tiles - 1)
    shown = f"{least} to {most}" if least < most else f"{most}"
    assert result.notes[0] == f"preview of {shown} of {GROUPS} groups"
    assert result.notes[1] == f"truncated: {size} of {len(file)} bytes"


def test_missing_tiles_are_gray(codec: package.Codec, photo: np.ndarray, tiled: bytes) -> None:
    result = codec.decode_result(tiled[: stream_ends(tiled)[6 + 4 - 1]], preview="auto")  # the first group of 4 tiles
    assert result.notes[-1] == "2 of 6 tiles are missing, and gray"
    assert (result.rgb[64:, 64:] == 128).all()
    assert psnr(photo[:64], result.rgb[:64]) > 15 and psnr(photo[64:, :64], result.rgb[64:, :64]) > 15
    deep = codec.decode_array(tiled[: stream_ends(tiled)[6]], preview="auto", bits=16)
    assert (deep[64:] == 32768).all()


def test_a_region_of_a_preview(codec: package.Codec, tiled: bytes) -> None:
    cut = tiled[: stream_ends(tiled)[15]]
    for region in ((70, 3, 100, 99), (1, 2, 3, 4)):
        x, y, width, height = region
        expected = codec.decode_array(cut, preview="auto")[y : y + height, x : x + width]
        assert np.array_equal(codec.decode_array(cut, preview="auto", region=region), expected)


def test_damage_at_the_end_costs_the_groups_there(codec: package.Codec, photo: np.ndarray, coded: bytes) -> None:
    ends = stream_ends(coded)
    for kept in (2, 6):
        damaged = coded[: ends[kept]] + b"\xff" * (len(coded) - ends[kept])
        result = codec.decode_result(damaged, preview="auto")
        assert result.notes == (f"preview of {kept} of {GROUPS} groups", "damaged: the checksum does not match")
        assert np.array_equal(result.rgb, codec.decode_array(coded, preview=kept))
    with pytest.raises(CorruptError, match="no group"):
        codec.decode(coded[: ends[0]] + b"\xff" * (len(coded) - ends[0]), preview="auto")


@settings(max_examples=30, deadline=None)
@given(place=st.floats(0, 1), value=st.integers(1, 255))
def test_any_damaged_byte_gives_a_picture_or_one_line(
    codec: package.Codec, tiled: bytes, place: float, value: int
) -> None:
    damaged = bytearray(tiled)
    damaged[int(place * (len(tiled) - 1))] ^= value
    try:
        result = codec.decode_result(bytes(damaged), preview="auto", max_pixels=10**6)
    except (CorruptError, UnsupportedError) as error:
        assert "\n" not in str(error)
    else:
        assert result.notes


def test_symbols_that_fail_their_checksum_are_shown_and_told(codec: package.Codec, coded: bytes) -> None:
    damaged = bytearray(coded)
    damaged[10] ^= 1  # of the symbols CRC itself
    result = codec.decode_result(bytes(damaged), preview="auto")
    assert result.notes[-1] == "the symbols fail their checksum: part of the picture is wrong"
    assert result.symbols_sha256 is None
    assert np.array_equal(result.rgb, codec.decode_array(coded))


def test_what_is_lost_beside_the_colour_is_told(codec: package.Codec) -> None:
    alpha = (DATA / "golden" / "alpha-q40.lic").read_bytes()
    result = codec.decode_result(alpha[:-5], preview="auto")
    assert result.notes[-1] == "without its transparency" and result.picture.alpha is None
    assert result.symbols_sha256 == codec.decode_result(alpha).symbols_sha256
    index = container.parse_header(alpha)
    start = index.payload + sum(index.lengths)
    broken = alpha[:start] + bytes([77]) + alpha[start + 1 :]
    assert codec.decode_result(broken, preview="auto").notes[-1] == "without its transparency"

    metadata = (DATA / "golden" / "metadata-q40.lic").read_bytes()
    kinds = [kind.upper() for kind in package.info(metadata).metadata]
    result = codec.decode_result(metadata[:-5], preview="auto")
    assert result.notes[-1] == f"without its {kinds[-1]}"
    kept = codec.decode_result(metadata).picture.metadata.as_dict()
    assert result.picture.metadata.as_dict() == {key: kept[key] for key in list(kept)[:-1]}
    broken = metadata[:-6] + bytes(6)
    assert codec.decode_result(broken, preview="auto").notes[-1] == "without its metadata"


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_context_model(system: str, tmp_path: Path, photo: np.ndarray) -> None:
    torch.manual_seed(7)
    config = config_of(system)
    net = CodecModel(config).eval().requires_grad_(False)
    torch.nn.init.normal_(net.shortcut.weight, std=0.02)
    net.sigma.fill_(0.03)
    with net.calibration():
        net.predict(torch.zeros(1, 1, 1, config.hyper_latent), torch.ones(1, 4, 4, config.latent), torch.tensor([9000]))
    net.freeze()
    store.write_model(tmp_path / "one.safetensors", net, {"provenance": {}})
    model = store.load_file(store.read_info(tmp_path / "one.safetensors"))
    whole = encode_rgb(model, photo[:70, :64], 20_000).container
    streams = whole.tiles[0]
    for count in sorted({2, len(streams) // 2 + 1, len(streams)}):
        cut = replace(whole, tiles=(streams[:count],))
        damaged = replace(whole, tiles=((*streams[:count], *(b"\xff" * 9 for _ in streams[count:])),))
        shown = [decode_rgb(model, cut, preview="auto"), decode_rgb(model, damaged, preview="auto")]
        shown.append(decode_rgb(model, whole, preview=count - 1))
        assert [decoded.groups for decoded in shown] == [(count - 1,)] * 3
        assert all(np.array_equal(decoded.rgb, shown[0].rgb) for decoded in shown)


@pytest.mark.parametrize("preview", [0, -1, 1.5, "all", b"auto"])
def test_previews_that_make_no_sense_are_usage_errors(codec: package.Codec, coded: bytes, preview: object) -> None:
    with pytest.raises(UsageError, match="a preview"):
        codec.decode(coded, preview=preview)  # type: ignore[call-overload]


def test_text_becomes_a_preview() -> None:
    assert [parse_preview(text) for text in ("1", "20", "auto")] == [1, 20, "auto"]


# ----------------------------------------------------------------------------------------------------
# the command


def test_the_command_says_in_one_line_what_it_shows(lic: Run, tmp_path: Path, coded: bytes) -> None:
    cut = coded[: stream_ends(coded)[3] + 1]
    (tmp_path / "cut.lic").write_bytes(cut)
    assert lic("decode", "cut.lic", "x.png").returncode == 3
    assert not (tmp_path / "x.png").exists()
    done = lic("decode", "cut.lic", "-", "--preview", "auto", "--region", "5,6,70,8")
    assert done.returncode == 0
    assert Image.open(io.BytesIO(done.stdout)).size == (70, 8)
    line = f"lic: cut.lic: preview of 3 of {GROUPS} groups; truncated: {len(cut)} of {len(coded)} bytes\n"
    assert done.stderr.decode() == line
    report = lic("decode", "cut.lic", "x.png", "--preview", "2", "--json", "--quiet")
    facts = json.loads(report.stderr)
    assert (facts["width"], facts["height"], facts["symbols_sha256"]) == (192, 128, None)
    assert facts["notes"][0] == f"preview of 2 of {GROUPS} groups"


def test_the_command_refuses_what_has_no_group(lic: Run, coded: bytes) -> None:
    for end in (stream_ends(coded)[1] - 1, 20, 2):
        done = lic("decode", "-", "-", "--preview", "auto", input=coded[:end])
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (3, b"", 1)


@pytest.mark.parametrize("text", ["0", "-1", "some", "1.5", "", "²"])
def test_the_command_refuses_nonsense_before_it_reads(lic: Run, text: str) -> None:
    done = lic("decode", "missing.lic", "x.png", "--preview", text)
    assert done.returncode == 2 and b"'--preview'" in done.stderr and len(done.stderr.splitlines()) == 1
