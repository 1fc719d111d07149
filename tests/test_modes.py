"""Every kind of picture in, the same kind out: the table of docs/pictures.md, checked through the commands."""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

import lic
from lic import cli, container, images
from lic.container import Section
from lic.errors import CorruptError, LicError, UnsupportedError
from lic.images.limits import without_pillows_limits

LIMIT = 10_000_000
HEIGHT, WIDTH = 21, 34
DOCS = Path(__file__).parents[1] / "docs" / "pictures.md"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6" dc:title="a title"/></x:xmpmeta>'

Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB16 = np.stack([1900 * X, 3000 * Y, 9000 + 500 * X + 600 * Y], axis=-1).astype(np.uint16)
ALPHA16 = np.where(np.hypot(X - 15, Y - 9) < 8, 65535, 1000 * Y + X).astype(np.uint16)
ALPHA16[:4] = 0
GRAY16 = RGB16[..., 2]
RGB, GRAY, ALPHA = ((samples // 257).astype(np.uint8) for samples in (RGB16, GRAY16, ALPHA16))


# ----------------------------------------------------------------------------------------------------
# files that Pillow does not write


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, bits: int, *, interlaced: bool = False, before: bytes = b"") -> bytes:
    """A PNG of (H, W) or (H, W, 2..4) whose samples have so many bits. ``before``: chunks before the pixels."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
    passes = [samples]
    if interlaced:  # Adam7
        steps = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
        passes = [samples[top::down, left::right] for top, down, left, right in steps]
    rows = b"".join(b"\0" + packed(row, bits) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour_type, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def packed(row: np.ndarray, bits: int) -> bytes:
    if bits >= 8:
        return row.astype(f">u{bits // 8}").tobytes()
    digits = "".join(format(value, f"0{bits}b") for value in row.ravel())
    digits += "0" * (-len(digits) % 8)
    return int(digits, 2).to_bytes(len(digits) // 8, "big")


def key(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def tiff(
    samples: np.ndarray,
    photometric: int,
    *,
    alpha: int = 0,
    big_endian: bool = False,
    planar: bool = False,
    deflate: bool = False,
) -> bytes:
    """A TIFF of 16 bits. ``alpha``: 1 premultiplied, 2 straight. ``planar``: a plane for each channel."""
    order = ">" if big_endian else "<"
    samples = samples if samples.ndim == 3 else samples[..., None]
    height, width, channels = samples.shape
    planes = np.split(samples, channels, axis=2) if planar else [samples]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, [16] * channels), (259, 3, [8 if deflate else 1])]
    entries += [(262, 3, [photometric]), (273, 4, [0] * len(strips)), (277, 3, [channels]), (278, 4, [height])]
    entries += [(279, 4, [len(strip) for strip in strips]), (284, 3, [2 if planar else 1])]
    entries += [(338, 3, [alpha])] if alpha else []
    data_at = 8 + 2 + 12 * len(entries) + 4
    strips_at = data_at + 64
    data = b""
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, values in entries:
        if tag == 273:
            values = [strips_at + sum(map(len, strips[:i])) for i in range(len(strips))]
        content = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(content) > 4:
            content, data = struct.pack(order + "I", data_at + len(data)), data + content
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    start = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(order + "I", 8)
    return start + directory + bytes(4) + data.ljust(64, b"\0") + b"".join(strips)


def cmyk_profile() -> bytes:
    """A profile that makes the gray 255 - K of CMYK, whatever C, M and Y: unlike Pillow's formula."""
    ramp = bytes(range(256))
    lattice = b"".join(bytes([255 * (1 - k), 128, 128]) for _ in range(8) for k in (0, 1))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + lattice + ramp * 3
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut))
    header = struct.pack(">I4sI4s4s4s", 144 + len(lut), bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3I", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + tags + lut


def saved(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, format, **options)
    return out.getvalue()


def animated(format: str) -> bytes:
    return saved(RGB, format, save_all=True, append_images=[Image.fromarray(255 - RGB)])


def palette(transparency: object = None) -> bytes:
    options = {} if transparency is None else {"transparency": transparency}
    return saved(Image.fromarray(RGB).quantize(16), "PNG", **options)


LEVELS = GRAY // 64  # of 2 bits
PPM16 = b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + RGB16.astype(">u2").tobytes()
PLAIN16 = f"P3 {WIDTH} {HEIGHT} 65535\n{chr(10).join(map(str, RGB16.ravel()))}\n".encode()
SOURCES: dict[str, Callable[[], bytes]] = {
    "RGB PNG": lambda: saved(RGB, "PNG"),
    "RGB JPEG": lambda: saved(RGB, "JPEG"),
    "RGB BMP": lambda: saved(RGB, "BMP"),
    "RGB WebP": lambda: saved(RGB, "WEBP"),
    "RGB AVIF": lambda: saved(RGB, "AVIF"),
    "RGB interlaced PNG": lambda: png(RGB, 8, interlaced=True),
    "RGB PNG with transparency": lambda: saved(np.dstack([RGB, ALPHA]), "PNG"),
    "RGB WebP with transparency": lambda: saved(np.dstack([RGB, ALPHA]), "WEBP", lossless=True),
    "RGB PNG with one transparent colour": lambda: png(RGB, 8, before=key(*RGB[3, 4])),
    "RGB PNG of gamma 1": lambda: png(RGB, 8, before=chunk(b"gAMA", struct.pack(">I", 100_000))),
    "RGB PNG of BT.2020 and PQ (cICP)": lambda: png(RGB, 8, before=chunk(b"cICP", bytes([9, 16, 0, 1]))),
    "gray PNG": lambda: saved(GRAY, "PNG"),
    "gray JPEG": lambda: saved(GRAY, "JPEG"),
    "gray PGM": lambda: saved(GRAY, "PPM"),
    "gray PNG of 1 bit": lambda: png(GRAY // 128, 1),
    "gray PNG of 2 bits": lambda: png(LEVELS, 2),
    "gray PNG of 4 bits": lambda: png(GRAY // 16, 4),
    "gray PNG with transparency": lambda: saved(np.dstack([GRAY, ALPHA]), "PNG"),
    "gray PNG with one transparent value": lambda: png(GRAY, 8, before=key(GRAY[3, 4])),
    "gray PNG of 1 bit with one transparent value": lambda: png(GRAY // 128, 1, before=key(1)),
    "gray PNG of 2 bits with one transparent value": lambda: png(LEVELS, 2, before=key(LEVELS[3, 4])),
    "gray PNG of 4 bits with one transparent value": lambda: png(GRAY // 16, 4, before=key(GRAY[3, 4] // 16)),
    "palette PNG": palette,
    "palette PNG with one transparent entry": lambda: palette(3),
    "palette PNG with half-transparent entries": lambda: palette(bytes(range(0, 160, 10))),
    "gray PNG of 16 bits": lambda: saved(GRAY16, "PNG"),
    "gray PNG of 16 bits with one transparent value": lambda: png(GRAY16, 16, before=key(GRAY16[3, 4])),
    "gray PNG of 16 bits with transparency": lambda: png(np.dstack([GRAY16, ALPHA16]), 16),
    "RGB PNG of 16 bits": lambda: png(RGB16, 16),
    "RGB interlaced PNG of 16 bits": lambda: png(RGB16, 16, interlaced=True),
    "RGB PNG of 16 bits with one transparent colour": lambda: png(RGB16, 16, before=key(*RGB16[3, 4])),
    "RGB PNG of 16 bits with transparency": lambda: png(np.dstack([RGB16, ALPHA16]), 16),
    "RGB PPM of 16 bits": lambda: PPM16,
    "RGB PPM of 10 bits": lambda: b"P6 %d %d 1023\n" % (WIDTH, HEIGHT) + (RGB16 // 64).astype(">u2").tobytes(),
    "plain (ASCII) PPM of 16 bits": lambda: PLAIN16,
    "gray PGM of 16 bits": lambda: saved(Image.fromarray(GRAY16.astype(np.int32)), "PPM"),
    "RGB TIFF of 16 bits": lambda: tiff(RGB16, 2),
    "RGB TIFF of 16 bits with transparency": lambda: tiff(np.dstack([RGB16, ALPHA16]), 2, alpha=2),
    "RGB TIFF of 16 bits, a plane for each channel": lambda: tiff(RGB16, 2, planar=True),
    "the same, compressed": lambda: tiff(RGB16, 2, planar=True, deflate=True),
    "gray TIFF of 16 bits": lambda: tiff(GRAY16, 1, big_endian=True),
    "gray TIFF of 16 bits, white is zero": lambda: tiff(65535 - GRAY16, 0),
    "gray TIFF of 32 bits that holds 16": lambda: saved(Image.fromarray(GRAY16.astype(np.int32)), "TIFF"),
    "CMYK JPEG": lambda: saved(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "CMYK TIFF with a profile": lambda: saved(cmyk(), "TIFF", icc_profile=cmyk_profile()),
    "YCbCr TIFF": lambda: saved(Image.fromarray(RGB).convert("YCbCr"), "TIFF"),
    "Lab TIFF": lambda: saved(lab(), "TIFF"),
    "animated GIF": lambda: animated("GIF"),
    "animated PNG": lambda: animated("PNG"),
    "animated WebP": lambda: animated("WEBP"),
    "TIFF of two pages": lambda: animated("TIFF"),
}


def cmyk() -> Image.Image:
    return Image.frombytes("CMYK", (WIDTH, HEIGHT), np.dstack([RGB, GRAY]).tobytes())


def lab() -> Image.Image:
    srgb, space = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(RGB), srgb, space, outputMode="LAB")


def read(data: bytes) -> images.Picture:
    return images.picture_of(data, max_pixels=LIMIT)


# ----------------------------------------------------------------------------------------------------
# the table


def test_the_table_of_the_documentation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One batch in, info, one batch out; every row of the table is what happened."""
    rows = re.findall(r"^\| ([^|]+) \| (L|LA|RGB|RGBA) \| (8|16) \| ([^|]+) \|$", DOCS.read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == list(SOURCES)
    (tmp_path / "in").mkdir()
    names = [f"{i:02}" for i in range(len(SOURCES))]
    for name, make in zip(names, SOURCES.values(), strict=True):
        (tmp_path / "in" / f"{name}.png").write_bytes(make())  # the suffix means nothing to the reader
    coded, back = tmp_path / "coded", tmp_path / "back"
    assert cli.run(["encode", str(tmp_path / "in"), "--output-dir", str(coded), "--model", "tiny", "-q", "95"]) == 0
    said = capfd.readouterr().err.splitlines()
    assert cli.run(["decode", str(coded), "--output-dir", str(back)]) == 0
    assert cli.run(["info", "--json", *(str(coded / f"{name}.lic") for name in names)]) == 0
    infos = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    for (source, mode, bits, reduced), name, info in zip(rows, names, infos, strict=True):
        before, picture = (read((folder / f"{name}.png").read_bytes()) for folder in (tmp_path / "in", back))
        assert (info["mode"], info["depth"]) == (mode, int(bits)), source
        assert (", ".join(info["reduced"]) or "nothing") == reduced, source
        lines = [line for line in said if f"{name}.png: " in line]
        assert len(lines) == (reduced != "nothing"), (source, lines)
        assert (picture.mode, picture.bits) == (mode, int(bits)), source
        assert (info["width"], info["height"]) == (picture.width, picture.height) == (WIDTH, HEIGHT), source
        assert (before.mode, before.bits) == (mode, int(bits)), source
        assert info["alpha"] == (picture.alpha is not None)
        if picture.alpha is not None:
            assert np.array_equal(picture.alpha, before.alpha), source
        seen = slice(None) if before.alpha is None else before.alpha > 0
        error = np.abs(picture.at_bits(8).colour.astype(int) - before.at_bits(8).colour)[seen].mean()
        assert error < 12, (source, error)


EXACT = {  # what the reader must find, by source: colour and alpha
    "RGB interlaced PNG": (RGB, None),
    "RGB PNG with transparency": (RGB, ALPHA),
    "gray PNG of 1 bit": (GRAY // 128 * 255, None),
    "gray PNG of 2 bits": (LEVELS * 85, None),
    "gray PNG of 4 bits": (GRAY // 16 * 17, None),
    "gray PNG of 1 bit with one transparent value": (GRAY // 128 * 255, (GRAY < 128) * 255),
    "gray PNG of 2 bits with one transparent value": (LEVELS * 85, (LEVELS[3, 4] != LEVELS) * 255),
    "gray PNG of 4 bits with one transparent value": (GRAY // 16 * 17, (GRAY[3, 4] // 16 != GRAY // 16) * 255),
    "gray PNG with one transparent value": (GRAY, (GRAY[3, 4] != GRAY) * 255),
    "RGB PNG with one transparent colour": (RGB, (RGB[3, 4] != RGB).any(-1) * 255),
    "gray PNG of 16 bits": (GRAY16, None),
    "gray PNG of 16 bits with one transparent value": (GRAY16, (GRAY16[3, 4] != GRAY16) * 65535),
    "gray PNG of 16 bits with transparency": (GRAY16, ALPHA16),
    "RGB PNG of 16 bits": (RGB16, None),
    "RGB interlaced PNG of 16 bits": (RGB16, None),
    "RGB PNG of 16 bits with one transparent colour": (RGB16, (RGB16[3, 4] != RGB16).any(-1) * 65535),
    "RGB PNG of 16 bits with transparency": (RGB16, ALPHA16),
    "RGB PPM of 16 bits": (RGB16, None),
    "RGB PPM of 10 bits": (np.rint(RGB16 // 64 * (65535 / 1023)), None),
    "gray PGM of 16 bits": (GRAY16, None),
    "RGB TIFF of 16 bits": (RGB16, None),
    "RGB TIFF of 16 bits with transparency": (RGB16, ALPHA16),
    "gray TIFF of 16 bits": (GRAY16, None),
    "gray TIFF of 16 bits, white is zero": (GRAY16, None),
    "gray TIFF of 32 bits that holds 16": (GRAY16, None),
    "animated PNG": (RGB, None),
    "TIFF of two pages": (RGB, None),
}


@pytest.mark.parametrize("source", EXACT)
def test_no_bit_is_lost_on_the_way_in(source: str) -> None:
    colour, alpha = EXACT[source]
    picture = read(SOURCES[source]())
    assert np.array_equal(picture.colour.squeeze(), colour)
    assert (picture.alpha is None) == (alpha is None)
    assert alpha is None or np.array_equal(picture.alpha, alpha)


def test_cmyk_goes_through_its_profile() -> None:
    picture = read(SOURCES["CMYK TIFF with a profile"]())
    assert picture.notes == ("CMYK became sRGB, by its colour profile",) and picture.metadata.icc is None
    assert np.ptp(picture.colour.astype(int), axis=2).max() <= 2  # the profile makes gray of it
    broken = saved(cmyk(), "TIFF", icc_profile=cmyk_profile()[:200])
    assert read(broken).notes == ("CMYK became RGB, without a colour profile",)


@pytest.mark.parametrize("image", [Image.new("F", (5, 5)), Image.fromarray(np.full((5, 5), 70_000, np.int32))])
def test_what_cannot_be_coded_is_refused(image: Image.Image) -> None:
    with pytest.raises(LicError, match="not supported: convert"):
        read(saved(image, "TIFF"))


def test_10_bit_avif_is_said_to_lose_precision() -> None:
    data = bytearray(SOURCES["RGB AVIF"]())
    data[data.index(b"av1C") + 6] |= 0x40  # the configuration says what the pixels need not be
    with contextlib.suppress(LicError):
        assert read(bytes(data)).notes == ("10 bits per sample became 8",)


# ----------------------------------------------------------------------------------------------------
# gray, transparency


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from(["u1", "u2"]), st.integers(0, 100))
def test_gray_costs_what_it_costs_as_rgb(height: int, width: int, dtype: str, quality: int) -> None:
    codec = lic.Codec("tiny", "cpu")
    rng = np.random.default_rng(height * width)
    gray = rng.integers(0, 256 if dtype == "u1" else 65536, (height, width)).astype(dtype)
    data = codec.encode(gray, quality)
    as_rgb = container.parse(codec.encode(np.dstack([gray] * 3), quality))
    assert container.parse(data).tiles == as_rgb.tiles  # only the filter behind the synthesis may be another
    back = codec.decode_array(data)
    assert back.shape == gray.shape and back.dtype == gray.dtype


alphas = st.one_of(
    st.tuples(st.just("constant"), st.sampled_from([0, 1, 255, 256, 65535])),
    st.tuples(st.just("noise"), st.integers(0, 99)),
    st.tuples(st.just("mask"), st.integers(0, 99)),
)


def make_alpha(kind: str, value: int, height: int, width: int, dtype: str) -> np.ndarray:
    top = np.iinfo(dtype).max
    if kind == "constant":
        return np.full((height, width), min(value, top), dtype)
    rng = np.random.default_rng(value)
    values = rng.integers(0, top + 1, (height, width))
    return (values if kind == "noise" else top * (values % 2)).astype(dtype)


@settings(max_examples=40, deadline=None)
@given(alphas, st.integers(1, 40), st.integers(1, 40), st.sampled_from(["u1", "u2"]))
def test_alpha_comes_back_exactly(spec: tuple[str, int], height: int, width: int, dtype: str) -> None:
    alpha = make_alpha(*spec, height, width, dtype)
    section = images.alpha_section(alpha)
    back = images.samples_at_bits(images.alpha_of(section, width, height), 8 * alpha.dtype.itemsize)
    assert np.array_equal(back, alpha)


def test_transparency_through_the_whole_codec() -> None:
    codec = lic.Codec("tiny", "cpu")
    for array in (np.dstack([RGB, ALPHA]), np.dstack([GRAY, ALPHA]), np.dstack([RGB16, ALPHA16])):
        back = codec.decode_array(codec.encode(array))
        assert back.dtype == array.dtype and np.array_equal(back[..., -1], array[..., -1])
    opaque = np.dstack([RGB, np.full_like(ALPHA, 255)])
    assert len(codec.encode(opaque)) <= len(codec.encode(RGB)) + 11
    assert codec.decode(codec.encode(opaque)).mode == "RGBA"
    clear = codec.encode(np.dstack([RGB, np.zeros_like(ALPHA)]), 95)
    assert len(clear) < 200 and not np.asarray(codec.decode(clear))[..., 3].any()


def test_hidden_colour_has_no_influence_and_costs_next_to_nothing() -> None:
    codec = lic.Codec("tiny", "cpu")
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:150, 0:200]
    shown = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    alpha = (np.hypot(x - 100, y - 70) < 50) * np.uint8(255)
    files = []
    for hidden in (np.zeros_like(shown), rng.integers(0, 256, shown.shape, dtype=np.uint8)):
        files.append(codec.encode(np.dstack([np.where(alpha[..., None] > 0, shown, hidden), alpha]), 60))
    assert files[0] == files[1]
    mask = len(images.alpha_section(alpha).data)
    assert len(files[0]) < len(codec.encode(shown, 60)) + mask + 100
    back = np.asarray(codec.decode(files[0])).astype(int)
    assert np.abs(back[..., :3] - shown)[alpha > 0].mean() < 4


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 1000), st.sampled_from([0.01, 0.5, 0.99]))
def test_the_fill_stays_within_the_visible_colours(height: int, width: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    alpha = (rng.random((height, width)) < share) * np.uint8(7)
    filled = images.with_hidden_filled(colour, alpha)
    assert np.array_equal(filled[alpha > 0], colour[alpha > 0])
    if alpha.any():
        assert (filled >= colour[alpha > 0].min(0)).all() and (filled <= colour[alpha > 0].max(0)).all()
    else:
        assert np.unique(filled.reshape(-1, 3), axis=0).shape == (1, 3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_transparency_gives_samples_or_one_of_two_errors(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([0, 1, 2, 3, 255]))
    body = data.draw(st.binary(max_size=80))
    if data.draw(st.booleans()):
        kinds = [("L", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("RGBA", "WEBP"), ("L", "JPEG")]
        mode, format = data.draw(st.sampled_from(kinds))
        options = {"lossless": True} if format == "WEBP" else {}
        altered = bytearray(saved(Image.fromarray(ALPHA).convert(mode), format, **options))
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
        body = bytes(altered)
    with contextlib.suppress(CorruptError, UnsupportedError):
        alpha = images.alpha_of(Section("Alph", bytes([form]) + body), WIDTH, HEIGHT)
        assert alpha.shape == (HEIGHT, WIDTH) and alpha.dtype in (np.uint8, np.uint16)


def test_transparency_of_another_size_or_form_is_refused() -> None:
    section = images.alpha_section(ALPHA16)
    with pytest.raises(CorruptError, match="another size"):
        images.alpha_of(section, WIDTH + 1, HEIGHT)
    with pytest.raises(CorruptError, match="does not decode"):
        images.alpha_of(Section("Alph", section.data[:-30]), WIDTH, HEIGHT)
    with pytest.raises(UnsupportedError, match="method 3"):
        images.alpha_of(Section("Alph", b"\3"), WIDTH, HEIGHT)
    for data in (b"", b"\0", b"\0abc", b"\1" + saved(RGB, "PNG"), b"\2" + saved(RGB, "WEBP")):
        with pytest.raises(CorruptError, match="not of a known form"):
            images.alpha_of(Section("Alph", data), WIDTH, HEIGHT)
    coded = container.parse(lic.encode(np.dstack([RGB, ALPHA]), model="tiny", device="cpu"))
    wrong = images.alpha_section(ALPHA[1:])
    with pytest.raises(CorruptError, match="another size"):
        lic.decode(container.pack(container.Container(coded.header, coded.tiles, (wrong,))), device="cpu")


# ----------------------------------------------------------------------------------------------------
# depth


@pytest.mark.parametrize("array", [RGB16, GRAY16, np.dstack([RGB16, ALPHA16])], ids=["RGB", "L", "RGBA"])
@pytest.mark.parametrize("format", ["png", "tiff", "ppm"])
def test_16_bits_are_written_and_read_back(array: np.ndarray, format: str) -> None:
    picture = images.picture_of(array, max_pixels=LIMIT)
    back = read(images.picture_bytes(picture, format))
    assert np.array_equal(back.colour, picture.colour) and back.bits == 16
    if format != "ppm":
        assert np.array_equal(back.to_array(), array)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("array", [RGB16, np.dstack([RGB16, ALPHA16])], ids=["RGB", "RGBA"])
def test_tiff_of_planes(array: np.ndarray, big_endian: bool) -> None:
    options = {"planar": True, "big_endian": big_endian, "alpha": 2 * (array.shape[2] == 4)}
    assert np.array_equal(read(tiff(array, 2, **options)).to_array(), array)
    compressed = read(tiff(array, 2, deflate=True, **options))
    assert np.array_equal(compressed.to_array(), array >> 8) and compressed.reduced == container.Reduced.PRECISION


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.dstack([RGB16, ALPHA16]), 2, planar=True, alpha=1),
        tiff(np.dstack([RGB16, ALPHA16]), 2, planar=True, alpha=1, deflate=True),
        tiff(np.dstack([RGB16, ALPHA16]), 5, planar=True),
        tiff(np.dstack([GRAY16, ALPHA16]), 1, alpha=2),
        tiff(RGB16, 2)[:60],
    ],
    ids=["premultiplied", "premultiplied, compressed", "CMYK", "gray with transparency", "truncated"],
)
def test_tiff_files_that_cannot_be_read(data: bytes) -> None:
    with pytest.raises(LicError, match=r"TIFF.* convert it") as caught:
        read(data)
    assert "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_16_bit_png_of_any_size(height: int, width: int, channels: int, smooth: bool) -> None:
    samples = np.random.default_rng(height).integers(0, 65536, (height, width, channels)).astype(np.uint16)
    if smooth:
        samples = np.cumsum(samples // 500, axis=0).astype(np.uint16)
    picture = images.picture_of(samples, max_pixels=LIMIT)
    assert np.array_equal(read(images.picture_bytes(picture, "png")).to_array(), picture.to_array())


def test_16_bit_gray_tiff_with_alpha_has_the_right_bytes() -> None:
    """Pillow does not read this kind of file."""
    data = images.picture_bytes(images.picture_of(np.dstack([GRAY16, ALPHA16]), max_pixels=LIMIT), "tiff")
    samples = np.frombuffer(zlib.decompress(data[data.index(b"\x78\x9c") :]), "<u2").reshape(HEIGHT, WIDTH, 2)
    assert np.array_equal(np.cumsum(samples, axis=1, dtype=np.uint16), np.dstack([GRAY16, ALPHA16]))


def test_more_than_8_bits_reach_the_network_and_come_back() -> None:
    codec = lic.Codec("tiny", "cpu")
    y, x = np.mgrid[0:128, 0:128]
    slope = np.repeat((30_000 + 8 * x + 4 * y)[..., None], 3, axis=2).astype(np.uint16)  # 6 levels of 8 bits
    deep = codec.decode_array(codec.encode(slope, 100)).astype(int)
    shallow = 257 * codec.decode_array(codec.encode((slope // 257).astype(np.uint8), 100)).astype(int)
    assert np.abs(deep - slope).mean() < 0.7 * np.abs(shallow - slope).mean()
    assert len(np.unique(deep)) > 100


def test_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, data in (("deep", SOURCES["RGB PNG of 16 bits"]()), ("flat", SOURCES["RGB PNG"]())):
        (tmp_path / f"{name}.png").write_bytes(data)
        source, coded = str(tmp_path / f"{name}.png"), str(tmp_path / f"{name}.lic")
        assert cli.run(["encode", source, coded, "--model", "tiny"]) == 0
    cases = [
        ("deep", "png", [], 16),
        ("deep", "tiff", [], 16),
        ("deep", "ppm", [], 16),
        ("deep", "jpeg", [], 8),
        ("deep", "webp", [], 8),
        ("deep", "bmp", [], 8),
        ("deep", "png", ["--bits", "8"], 8),
        ("flat", "png", [], 8),
        ("flat", "png", ["--bits", "16"], 16),
        ("flat", "jpeg", ["--bits", "8"], 8),
    ]
    for name, format, options, bits in cases:
        out = tmp_path / f"out.{format}"
        assert cli.run(["decode", str(tmp_path / f"{name}.lic"), str(out), *options]) == 0
        assert read(out.read_bytes()).bits == bits, (name, format, options)
    for format in ("jpeg", "webp", "bmp"):
        out = tmp_path / f"never.{format}"
        assert cli.run(["decode", str(tmp_path / "flat.lic"), str(out), "--bits", "16"]) == 2
        assert not out.exists()
    assert "holds 8 bits per sample" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------
# orientation, metadata, colour


def exif_with(orientation: int, *, thumbnail: bool = False, big_endian: bool = False) -> bytes:
    """From the TIFF header on: maker and orientation, a thumbnail of 3000 bytes."""
    order = ">" if big_endian else "<"
    entries = [(0x010F, 2, 6, struct.pack(order + "I", 38)), (0x0112, 3, 1, struct.pack(order + "HH", orientation, 0))]
    data = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(order + "IH", 8, len(entries))
    data += b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    data += struct.pack(order + "I", 44 if thumbnail else 0) + b"Maker\0"
    if thumbnail:
        data += struct.pack(order + "H", 2) + struct.pack(order + "HHII", 0x0201, 4, 1, 74)
        data += struct.pack(order + "HHII", 0x0202, 4, 1, 3000) + bytes(4)
        data += np.random.default_rng(0).bytes(3000)
    return data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_orientation_is_applied_once(tmp_path: Path, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    data = saved(RGB, format, exif=exif)
    original = Image.open(io.BytesIO(data))
    upright = np.asarray(ImageOps.exif_transpose(original).convert("RGB"))
    picture = read(data)
    assert np.array_equal(picture.colour, upright)
    again = read(images.picture_bytes(picture, "png"))
    assert np.array_equal(again.colour, upright)
    assert picture.metadata.exif is not None
    kept = Image.Exif()
    kept.load(picture.metadata.exif)
    assert kept[0x010F] == "Maker" and kept.get(0x0112, 1) == 1


@pytest.mark.parametrize("big_endian", [False, True])
def test_the_thumbnail_goes_and_the_rest_of_exif_stays_where_it_is(big_endian: bool) -> None:
    before = exif_with(6, thumbnail=True, big_endian=big_endian)
    after = read(saved(RGB, "JPEG", exif=b"Exif\0\0" + before)).metadata.exif
    assert after is not None and len(after) == len(before) and len(zlib.compress(after)) < 150
    assert after[38:44] == b"Maker\0"
    assert Image.open(io.BytesIO(saved(RGB, "JPEG", exif=b"Exif\0\0" + after))).getexif()[0x0112] == 1


def test_an_orientation_alone_is_no_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    assert read(saved(RGB, "JPEG", exif=exif)).metadata.exif is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_of_another_type_is_upright_afterwards(order: str) -> None:
    entries = struct.pack(order + "HHI4s", 0x010F, 2, 2, b"M\0") + struct.pack(order + "HHII", 0x0112, 4, 1, 6)
    exif = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "IH", 8, 2) + entries + bytes(4)
    picture = read(saved(RGB, "JPEG", exif=b"Exif\0\0" + exif))
    assert (picture.width, picture.height) == (HEIGHT, WIDTH)
    kept = Image.Exif()
    kept.load(picture.metadata.exif or b"")
    assert dict(kept) == {0x010F: "M", 0x0112: 1}


def test_exif_in_a_text_of_a_png() -> None:
    """As ImageMagick wrote it before there was a chunk for it."""
    exif, info = b"Exif\0\0" + exif_with(6), PngInfo()
    digits = "\n".join(exif.hex()[at : at + 72] for at in range(0, 2 * len(exif), 72))
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{digits}\n", zip=True)
    picture = read(saved(RGB, "PNG", pnginfo=info))
    assert picture.width == HEIGHT and picture.metadata.exif == exif_with(1)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 3200), st.booleans())
def test_damaged_exif_never_costs_the_picture(at: int, value: int, size: int, big_endian: bool) -> None:
    exif = bytearray(exif_with(1, thumbnail=True, big_endian=big_endian))
    exif[at % 80] = value
    picture = read(saved(RGB, "PNG", exif=bytes(exif[:size]) or b"x"))
    assert sorted((picture.width, picture.height)) == [HEIGHT, WIDTH]


@pytest.mark.parametrize("format", ["png", "webp", "tiff", "jpeg"])
@pytest.mark.parametrize("source", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_metadata_goes_through_the_commands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str, format: str
) -> None:
    options: dict[str, object] = {"icc_profile": SRGB, "exif": b"Exif\0\0" + exif_with(6, thumbnail=True)}
    if source == "TIFF":
        options["exif"] = tags = Image.Exif()
        tags.load(exif_with(6))
        tags[700] = XMP
    elif source == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP)
    else:
        options["xmp"] = XMP
    path, coded, out = tmp_path / "in.img", str(tmp_path / "a.lic"), tmp_path / f"out.{format}"
    path.write_bytes(saved(RGB, source, **options))
    assert cli.run(["encode", str(path), coded, "--model", "tiny"]) == 0
    assert lic.info(Path(coded).read_bytes()).metadata == ("icc", "exif", "xmp")
    assert cli.run(["decode", coded, str(out)]) == 0
    assert capfd.readouterr().err == ""
    image = Image.open(out)
    assert image.size == (HEIGHT, WIDTH)
    assert image.info["icc_profile"] == SRGB
    assert image.getexif()[0x010F] == "Maker" and image.getexif().get(0x0112, 1) == 1
    xmp = image.info["xmp"]
    xmp = (xmp if isinstance(xmp, bytes) else xmp.encode()).rstrip(b"\0")
    if source == "TIFF":  # whose orientation Pillow applies and takes out itself
        assert b"a title" in xmp and b"Orientation" not in xmp
    else:
        assert xmp == XMP.replace(b'"6"', b'"1"')

    assert cli.run(["encode", str(path), coded, "--model", "tiny", "--strip"]) == 0
    assert lic.info(Path(coded).read_bytes()).metadata == ()
    assert capfd.readouterr().err == ""  # sRGB is what a picture without a profile is in


def test_16_bit_files_keep_metadata_too() -> None:
    metadata = container.Metadata(icc=SRGB, exif=exif_with(1), xmp=XMP.replace(b'"6"', b'"1"'))
    for array in (RGB16, np.dstack([RGB16, ALPHA16])):
        picture = images.Picture(array[..., :3], ALPHA16 if array.shape[2] == 4 else None, metadata)
        for format in ("png", "tiff"):
            back = read(images.picture_bytes(picture, format))
            assert np.array_equal(back.to_array(), array)
            assert (back.metadata.icc, back.metadata.xmp) == (metadata.icc, metadata.xmp)
            assert back.metadata.exif and b"Maker" in back.metadata.exif


@pytest.mark.parametrize(
    ("format", "lost"),
    [
        ("ppm", "transparency, colour profile, EXIF, XMP"),
        ("bmp", "transparency, colour profile, EXIF, XMP"),
        ("jpeg", "transparency"),
        ("png", None),
    ],
)
def test_what_the_output_cannot_hold_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], format: str, lost: str | None
) -> None:
    (tmp_path / "a.png").write_bytes(
        saved(np.dstack([RGB, ALPHA]), "PNG", icc_profile=SRGB, exif=b"Exif\0\0" + exif_with(1))
        if format == "jpeg"
        else images.picture_bytes(images.Picture(RGB, ALPHA, container.Metadata(SRGB, exif_with(1), XMP)), "png")
    )
    assert cli.run(["encode", str(tmp_path / "a.png"), str(tmp_path / "a.lic"), "--model", "tiny"]) == 0
    capfd.readouterr()
    assert cli.run(["decode", str(tmp_path / "a.lic"), str(tmp_path / f"b.{format}")]) == 0
    expected = f"lic: {tmp_path / 'a.lic'}: {format} cannot hold: {lost}\n" if lost else ""
    assert capfd.readouterr().err == expected
    assert read((tmp_path / f"b.{format}").read_bytes()).mode == ("RGB" if lost else "RGBA")


def test_a_profile_that_does_not_fit_is_left_out() -> None:
    picture = read(saved(GRAY, "PNG", icc_profile=SRGB))
    assert picture.metadata.icc is None and picture.reduced == container.Reduced.COLOUR_SPACE
    gray_profile = SRGB[:16] + b"GRAY" + SRGB[20:]
    assert read(saved(GRAY, "PNG", icc_profile=gray_profile)).metadata.icc == gray_profile
    assert images.left_out(read(saved(GRAY, "PNG", icc_profile=gray_profile)), "webp") == ["colour profile"]


@pytest.mark.parametrize("format", ["PNG", "AVIF"])
def test_a_colour_space_by_number_is_said_to_be_left_out(format: str) -> None:
    def coded(primaries: int, transfer: int, profile: bytes | None = None) -> bytes:
        if format == "PNG":
            named = chunk(b"cICP", bytes([primaries, transfer, 0, 1]))
            return png(RGB, 8, before=named + (chunk(b"iCCP", b"p\0\0" + zlib.compress(profile)) if profile else b""))
        data = bytearray(saved(RGB, "AVIF", icc_profile=profile or b""))
        at = data.index(b"colrnclx")
        data[at + 8 : at + 12] = struct.pack(">HH", primaries, transfer)
        return bytes(data)

    for primaries, transfer in ((1, 13), (2, 2), (1, 1)):
        assert read(coded(primaries, transfer)).notes == ()
    for primaries, transfer in ((9, 16), (12, 13), (1, 8)):
        picture = read(coded(primaries, transfer))
        assert picture.reduced == container.Reduced.COLOUR_SPACE
        assert f"primaries {primaries}, transfer {transfer}" in picture.notes[0]
        assert read(coded(primaries, transfer, SRGB)).notes == ()


def test_large_profiles_in_png() -> None:
    """Pillow alone refuses to open a PNG with more than a megabyte of profile."""
    large = SRGB + np.random.default_rng(0).bytes(1_500_000)
    assert read(saved(RGB, "PNG", icc_profile=large)).metadata.icc == large
    with pytest.raises(ValueError, match="too large"):  # whose limit is back
        Image.open(io.BytesIO(saved(RGB, "PNG", icc_profile=large)))


def test_strip_says_when_it_changes_colours(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = SRGB.replace(b"sRGB", b"wide").replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
    (tmp_path / "a.png").write_bytes(saved(RGB, "PNG", icc_profile=other))
    command = ["encode", str(tmp_path / "a.png"), str(tmp_path / "a.lic"), "--model", "tiny"]
    assert cli.run([*command, "--strip"]) == 0
    line = capfd.readouterr().err
    assert "without its colour profile (wide" in line and line.count("\n") == 1
    assert lic.info((tmp_path / "a.lic").read_bytes()).reduced == ("colour space",)


def test_metadata_that_is_too_long_is_left_out() -> None:
    image = Image.fromarray(RGB)
    image.info["xmp"] = bytes(container.METADATA_LIMIT + 1)
    picture = images.picture_of(image, max_pixels=LIMIT)
    assert picture.metadata.xmp is None and "XMP of more than" in picture.notes[0] and picture.reduced == 0
    long = images.Picture(RGB, None, container.Metadata(xmp=bytes(70_000)))
    assert images.left_out(long, "jpeg") == ["XMP"] and images.picture_bytes(long, "jpeg")


# ----------------------------------------------------------------------------------------------------
# damaged files, odd sizes


def test_damaged_png_files() -> None:
    good = png(RGB, 8)
    data_at = good.index(b"IDAT")
    assert np.array_equal(read(good[:-12]).colour, RGB)  # no IEND: the pixels are whole
    for bad in (
        good[: data_at + 40],
        good[: data_at - 4],
        good[: data_at - 5] + bytes([good[data_at - 5] ^ 1]) + good[data_at - 4 :],  # the header's checksum
        good[: data_at + 30] + bytes([good[data_at + 30] ^ 1]) + good[data_at + 31 :],
        good.replace(struct.pack(">II", WIDTH, HEIGHT), struct.pack(">II", 0, HEIGHT)),
        good.replace(struct.pack(">II", WIDTH, HEIGHT), struct.pack(">II", 2**31 - 1, 2**31 - 1)),
    ):
        with pytest.raises(LicError) as caught:
            read(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (1, 65), (64, 1)])
def test_strips_of_every_mode_come_back(shape: tuple[int, int]) -> None:
    codec = lic.Codec("tiny", "cpu")
    rng = np.random.default_rng(0)
    for channels, mode in ((1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")):
        for dtype in (np.uint8, np.uint16):
            array = rng.integers(0, np.iinfo(dtype).max, (*shape, channels)).astype(dtype)
            data = codec.encode(array)
            assert lic.info(data).mode == mode
            back = codec.decode_array(data).reshape(array.shape)
            assert back.dtype == dtype
            assert channels in (1, 3) or np.array_equal(back[..., -1], array[..., -1])


def test_threads_read_at_the_same_time() -> None:
    """Lifting Pillow's limits is a setting of the process, but no reason for readers to take turns."""
    before = Image.MAX_IMAGE_PIXELS
    both = threading.Barrier(2, timeout=60)

    def lift(_: int) -> int | None:
        with without_pillows_limits():
            both.wait()
            limit = Image.MAX_IMAGE_PIXELS
            both.wait()
        return limit

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lift, range(2))) == [None, None]
    assert Image.MAX_IMAGE_PIXELS == before is not None


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SOURCES)), st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 10**6))
def test_damaged_sources_give_a_picture_or_one_line(source: str, at: int, value: int, cut: int) -> None:
    data = bytearray(SOURCES[source]())
    data[at % len(data)] = value
    for damaged in (data, data[: cut % len(data)]):
        try:
            picture = images.picture_of(bytes(damaged), max_pixels=100_000)
            assert picture.width * picture.height <= 100_000
        except LicError as error:
            assert "\n" not in str(error)


# ----------------------------------------------------------------------------------------------------
# Python


MODES = ["1 L", "L L", "LA LA", "La LA", "P RGB", "PA RGBA", "RGB RGB", "RGBX RGB", "RGBA RGBA", "RGBa RGBA"]
MODES += ["CMYK RGB", "YCbCr RGB", "HSV RGB", "I;16 I;16", "I;16B I;16", "I I;16"]


@pytest.mark.parametrize(
    ("mode", "back"),
    [tuple(pair.split()) for pair in MODES],
)
def test_pillows_modes(mode: str, back: str) -> None:
    data = lic.encode(Image.new(mode, (9, 7)), model="tiny", device="cpu")
    image = lic.decode(data, device="cpu")
    assert (image.mode, image.size) == (back, (9, 7))


def test_lists_and_metadata_in_python() -> None:
    codec = lic.Codec("tiny", "cpu")
    image = Image.fromarray(RGB)
    image.info = {"icc_profile": SRGB, "exif": b"Exif\0\0" + exif_with(6), "xmp": XMP}
    files = codec.encode([image, GRAY16])
    assert files == [codec.encode(image), codec.encode(GRAY16)]
    first, second = codec.decode(files)
    assert (first.mode, first.size, second.mode) == ("RGB", (HEIGHT, WIDTH), "I;16")
    assert first.info["icc_profile"] == SRGB and first.getexif()[0x010F] == "Maker"
    assert codec.decode(codec.encode(image, strip=True)).info == {}
    assert codec.decode(codec.encode(RGB16)).mode == "RGB"
    assert codec.decode_array(codec.encode(RGB16)).dtype == np.uint16
    assert codec.decode_array(codec.encode(RGB), bits=16).dtype == np.uint16
    with pytest.raises(lic.UsageError, match="8 or 16"):
        codec.decode_array(files[0], bits=12)


def test_what_is_no_picture_and_no_data_is_named() -> None:
    codec = lic.Codec("tiny", "cpu")
    for wrong in ("photo.png", b"\x89PNG"):
        with pytest.raises(lic.UsageError, match=f"not {type(wrong).__name__}"):
            codec.encode(wrong)
    data = codec.encode(RGB)
    assert codec.decode(bytearray(data)) == codec.decode(memoryview(data)) == codec.decode(data)
    assert lic.info(memoryview(data)) == lic.info(data)
    for call in (codec.decode, codec.decode_array, lic.decode, lic.info):
        with pytest.raises(lic.UsageError, match="bytes, not str"):
            call("photo.lic")
