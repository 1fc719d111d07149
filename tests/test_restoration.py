"""The filter behind the synthesis: its section, what it does to pixels, and what it is worth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lic as package
from lic import container
from lic.bench.metrics import ms_ssim
from lic.container import FILTER, BitWriter, Container, Header, Section
from lic.denoising import block_matching, cosine_shrinkage, non_local_means
from lic.errors import CorruptError
from lic.pipeline import windows
from lic.pipeline.distortion import Distortion, MsSsim, SquaredError, halved
from lic.pipeline.restoration import (
    DENOISED,
    FEATURES,
    OF_SAMPLES,
    REACH,
    VERSION,
    Coefficients,
    Restoration,
    Statistics,
)
from lic.quality import code_of, lambda_of, step_of

CODE = code_of(40)
HEADER = Header(
    width=1,
    height=1,
    quality=CODE,
    model="m",
    entropy_id=bytes(4),
    synthesis_id=bytes(2),
    tile=0,
    streams=2,
    symbols_crc=0,
)
VALUES = st.lists(st.integers(-(2**15), 2**15) | st.integers(-3, 3), max_size=FEATURES).map(tuple)
COEFFICIENTS = st.builds(Coefficients, st.integers(4, 11), VALUES)


def same(one: Restoration, other: Restoration) -> bool:
    """Whether two filters do the same: of a plane without coefficients the shift means nothing."""
    planes = zip(one.planes, other.planes, strict=True)
    return all(a.values == b.values and (a.shift == b.shift or not a.values) for a, b in planes)


def file_with(section: Section, gray: bool = False, version: int = VERSION) -> Container:
    return Container(replace(HEADER, gray=gray, version=version), (), (section,))


@given(st.lists(COEFFICIENTS, min_size=3, max_size=3) | st.lists(COEFFICIENTS, min_size=1, max_size=1))
@settings(deadline=None)
def test_section_holds_the_coefficients(planes: list[Coefficients]) -> None:
    restoration = Restoration(tuple(planes))
    read = Restoration.of(file_with(restoration.section(), gray=len(planes) == 1))
    assert read is not None and same(read, restoration)


def plane_with(values: list[int], count_bits: int) -> Section:
    out = BitWriter()
    for number, width in ((len(values), count_bits), (3, 3), (0, 2)):
        out.write(number, width)
    for value in values:
        out.write(value != 0, 1)
        if value:
            out.write(value < 0, 1)
            out.write(abs(value), 2 * abs(value).bit_length() - 1)
    out.align()
    return Section(FILTER, bytes(out.data))


@pytest.mark.parametrize("version, count_bits, denoised", [(1, 5, 0), (2, 6, 8), (3, 6, DENOISED)])
@given(data=st.data())
def test_filters_of_former_versions_have_fewer_features(
    version: int, count_bits: int, denoised: int, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.integers(-9, 9), min_size=1, max_size=27 + denoised))
    read = Restoration.of(file_with(plane_with(values, count_bits), gray=True, version=version))
    assert read is not None
    there = OF_SAMPLES + denoised
    expected = [*values[:there], *[0] * (DENOISED - denoised) * (len(values) > there), *values[there:]]
    assert read.planes == (Coefficients(7, tuple(expected)),)
    with pytest.raises(CorruptError):
        Restoration.of(file_with(plane_with([0] * (28 + denoised), count_bits), gray=True, version=version))


@given(st.binary(max_size=80), st.booleans(), st.sampled_from([1, 2, 3]))
@settings(deadline=None)
def test_any_section_is_a_filter_or_damaged(data: bytes, gray: bool, version: int) -> None:
    try:
        restoration = Restoration.of(file_with(Section(FILTER, data), gray, version))
    except CorruptError:
        return
    assert restoration is not None
    pixels = restoration.applied(255 * torch.rand(REACH * 2 + 3, REACH * 2 + 4, 1 if gray else 3), CODE)
    assert pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 255


def test_sections_with_too_much_or_too_little_are_damaged() -> None:
    section = Restoration((Coefficients(4, (1, 0, -2)),)).section()
    for data in (section.data + b"\0", section.data[:-1], b"", bytes([62 << 2])):
        with pytest.raises(CorruptError):
            Restoration.of(file_with(replace(section, data=data), gray=True))
    assert Restoration.of(file_with(Section("Alph", b""), gray=True)) is None


def test_no_coefficients_that_a_file_cannot_hold() -> None:
    for shift, count in ((3, 1), (12, 1), (4, FEATURES + 1)):
        with pytest.raises(ValueError):
            Coefficients(shift, (1,) * count)


def means_by_the_specification(planes: list[np.ndarray], k: int, row: int, column: int, step: float) -> list[float]:
    """The non-local means of plane k at a pixel. Planes have REACH more at each side."""
    variance = step**2 / 12

    def calm(i: int, j: int) -> float:
        around = planes[0][i - 4 : i + 5, j - 4 : j + 5]
        return float((1 + around.var() / (2 * variance)) ** -0.5)

    def surroundings(plane: np.ndarray, i: int, j: int) -> np.ndarray:
        return plane[i - 1 : i + 2, j - 1 : j + 2]

    def grid(values: range) -> set[tuple[int, int]]:
        return {(i, j) for i in values for j in values}

    groups = [
        grid(range(-1, 2)) - {(0, 0)},
        grid(range(-4, 5, 2)) - grid(range(-1, 2)),
        grid(range(-16, 17, 4)) - grid(range(-4, 5)),
    ]
    means = []
    for group in groups:
        for kernel in (0.09, 0.81):
            weights = differences = 0.0
            for i, j in group:
                at = row + i, column + j
                squares = sum(np.square(surroundings(p, *at) - surroundings(p, row, column)).sum() for p in planes)
                distance = squares / (9 * variance) * calm(row, column) * calm(*at)
                weight = (1 + distance / kernel) ** -4
                weights += weight
                differences += weight * (planes[k][at] - planes[k][row, column])
            means.append(differences / (0.05 + weights))
    return means


def shrunken_by_the_specification(plane: np.ndarray, row: int, column: int, step: float) -> list[float]:
    """What shrunken cosine transforms add to a pixel of a plane, which begins at an even place."""
    cosines = np.array(
        [[np.cos(np.pi * u * (2 * i + 1) / 16) * (1 if u else 0.5**0.5) / 2 for i in range(8)] for u in range(8)]
    )
    totals = np.zeros(2)
    for top in range(row - row % 2 - 6, row + 1, 2):
        for left in range(column - column % 2 - 6, column + 1, 2):
            found = cosines @ plane[top : top + 8, left : left + 8] @ cosines.T
            for k, threshold in enumerate((0.3 * step / 12**0.5, step / 12**0.5)):
                factors = found**2 / (found**2 + threshold**2)
                factors[0, 0] = 1
                totals[k] += (cosines.T @ (found * factors) @ cosines)[row - top, column - left]
    return list(totals / 16 - plane[row, column])


def matched_by_the_specification(
    planes: list[np.ndarray], k: int, row: int, column: int, step: float, found: dict[tuple[int, int], np.ndarray]
) -> float:
    """What matched blocks add to a pixel of plane k; ``found``: what they add to the blocks that it is in, if known."""
    sides = range(-20, 21)
    offsets = sorted(((i, j) for i in sides for j in sides if i or j), key=lambda at: at[0] ** 2 + at[1] ** 2)

    def block(plane: np.ndarray, i: int, j: int) -> np.ndarray:
        return plane[i : i + 8, j : j + 8]

    total = 0.0
    for top in (row // 4 * 4 - 4, row // 4 * 4):
        for left in (column // 4 * 4 - 4, column // 4 * 4):
            if (top, left) not in found:
                own = block(planes[0], top, left)
                distances = [np.square(block(planes[0], top + i, left + j) - own).sum() for i, j in offsets]
                nearest = np.argsort(distances, kind="stable")[:16]
                weights = [(1 + distances[n] / (16 * step**2 / 12)) ** -4 for n in nearest]
                found[top, left] = sum(
                    weight * np.stack([block(p, top + offsets[n][0], left + offsets[n][1]) for p in planes])
                    for weight, n in zip(weights, nearest, strict=True)
                ) - sum(weights) * np.stack([block(p, top, left) for p in planes])
                found[top, left] /= 0.05 + sum(weights)
            total += found[top, left][k, row - top, column - left] / 4
    return total


def by_the_specification(s: np.ndarray, coefficients: list[list[float]], step: float) -> np.ndarray:
    """Chapters 6.4 and 6.6, pixel by pixel, of s (H + 2·REACH, W + 2·REACH, C)."""
    if s.shape[2] == 1:
        planes = [s[..., 0] - 127.5]
    else:
        red, green, blue = np.moveaxis(s, -1, 0)
        planes = [(red + green + blue) / 3 - 127.5, (red - blue) / 2, (red - 2 * green + blue) / 4]
    pairs = [(0, 1), (1, 0), (0, 2), (1, -1), (1, 1), (2, 0), (0, 3), (1, -2), (1, 2), (2, -1), (2, 1), (3, 0)]
    filtered, blocks = [plane.copy() for plane in planes], {}
    for k, plane in enumerate(planes):
        for row in range(REACH, s.shape[0] - REACH):
            for column in range(REACH, s.shape[1] - REACH):
                x = plane[row, column]
                features = [1, x / 8, planes[0][row, column] / 8 if k else x * x / 512]
                features += [8 * mean for mean in means_by_the_specification(planes, k, row, column, step)]
                features += [8 * change for change in shrunken_by_the_specification(plane, row, column, step)]
                features.append(8 * matched_by_the_specification(planes, k, row, column, step, blocks))
                for i, j in pairs:
                    one, other = plane[row + i, column + j] - x, plane[row - i, column - j] - x
                    features += [one + other, sum(np.clip(t, -step / 4, step / 4) for t in (one, other))]
                filtered[k][row, column] += sum(c * f for c, f in zip(coefficients[k], features, strict=True))
    if s.shape[2] == 1:
        result = filtered[0][..., None] + 127.5
    else:
        p0, p1, p2 = filtered
        result = np.stack([p0 + p1 + 2 / 3 * p2, p0 - 4 / 3 * p2, p0 - p1 + 2 / 3 * p2], axis=-1) + 127.5
    return result[REACH:-REACH, REACH:-REACH].clip(0, 255)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("compiled", [True, False])
def test_it_does_what_the_specification_says(channels: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("LIC_CODER", "python")
    random = np.random.default_rng(channels)
    # More rows than one band; stripes, so that pixels look alike far away, and noise less than the quantiser's.
    s = (
        120
        + 40 * np.sin(np.arange(3))[-channels:] * (np.arange(70)[:, None, None] // 8 % 2)
        + np.zeros((70, 3, channels))
    )
    s += random.normal(0, step_of(CODE) / 8, s.shape)
    planes = tuple(Coefficients(7, tuple(random.integers(-6, 7, FEATURES).tolist())) for _ in range(channels))
    around = np.pad(s, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    found = Restoration(planes).applied(torch.from_numpy(around).float(), CODE).numpy()
    weights = [[value / 128 for value in plane.values] for plane in planes]
    assert np.abs(found - by_the_specification(around, weights, step_of(CODE))).max() < 1e-2


@pytest.mark.parametrize("planes", [1, 3])
def test_means_of_compiled_loops_are_those_of_torch(planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reach = non_local_means.REACH
    pixels = 30 * torch.rand(planes, 67 + 2 * reach, 300 + 2 * reach, generator=torch.Generator().manual_seed(planes))
    compiled = non_local_means.means(pixels, 20.0)
    monkeypatch.setenv("LIC_CODER", "python")
    assert compiled.shape == (non_local_means.MEANS, planes, 67, 300)
    assert (compiled - non_local_means.means(pixels, 20.0)).abs().max() < 1e-4
    # Nothing depends on what is computed together.
    part = non_local_means.means(pixels[:, 5:, 7:].contiguous(), 20.0)
    assert (compiled[..., 5:, 7:] - part).abs().max() < 1e-4


@pytest.mark.parametrize("height, width", [(64, 300), (37, 5), (1, 121)])
def test_shrunken_transforms_of_compiled_loops_are_those_of_torch(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach = cosine_shrinkage.REACH
    pixels = 30 * torch.rand(2, height + 2 * reach, width + 2 * reach, generator=torch.Generator().manual_seed(width))
    compiled = cosine_shrinkage.shrunken(pixels, 20.0)
    monkeypatch.setenv("LIC_CODER", "python")
    assert compiled.shape == (cosine_shrinkage.SHRUNKEN, 2, height, width)
    assert (compiled - cosine_shrinkage.shrunken(pixels, 20.0)).abs().max() < 1e-3


@pytest.mark.parametrize("height, width", [(67, 300), (5, 3), (1, 130)])
def test_matched_blocks_of_compiled_loops_are_those_of_torch(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach = block_matching.REACH
    pixels = 30 * torch.rand(2, height + 2 * reach, width + 2 * reach, generator=torch.Generator().manual_seed(width))
    compiled = block_matching.matched(pixels, 20.0)
    # Nothing depends on what is computed together, nor on who computes it.
    down, right = 4 * (height // 8), 4 * (width // 8)
    part = block_matching.matched(pixels[:, down:, right:].contiguous(), 20.0)
    assert torch.equal(compiled[:, down:, right:], part)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(block_matching.matched(pixels, 20.0), compiled)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("LIC_CODER", "python")
    assert compiled.shape == (2, height, width)
    assert (compiled - block_matching.matched(pixels, 20.0)).abs().max() < 1e-4


def statistics_of(decoded: torch.Tensor, seen: torch.Tensor) -> Statistics:
    statistics = Statistics(seen.shape[-1])
    statistics.add(decoded, CODE, *SquaredError().expansion(inner(decoded), seen))
    return statistics


def inner(decoded: torch.Tensor) -> torch.Tensor:
    return decoded[REACH:-REACH, REACH:-REACH]


def expanded(distortion: Distortion, shown: torch.Tensor, seen: torch.Tensor, added: torch.Tensor) -> float:
    """What the expansion of a distortion says that something added to what is shown changes."""
    slope, worths = distortion.expansion(shown, seen)
    change, planes = float((slope * added).sum()), added.movedim(-1, 0)
    for worth in worths:
        change += float((worth.movedim(-1, 0) * planes.square()).sum())
        planes = halved(planes)
    return change


@pytest.mark.parametrize("channels", [1, 3])
def test_squared_error_is_its_expansion(channels: int) -> None:
    shown, seen, added = 255 * torch.rand(3, 21, 34, channels, generator=torch.Generator().manual_seed(channels))
    wanted = SquaredError().error(shown + added, seen) - SquaredError().error(shown, seen)
    assert expanded(SquaredError(), shown, seen, added) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_ms_ssim_is_about_its_expansion(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    seen = torch.from_numpy(textured(channels)).float()
    noise = torch.randn(3, *seen.shape, generator=generator)
    distortion, shown = MsSsim(), seen + 8 * noise[0]
    for added in (2 * noise[1], 8 * noise[1], 0.2 * (seen - shown), 0.6 * (seen - shown) + noise[2]):
        change = float(distortion.error(shown + added, seen) - distortion.error(shown, seen))
        assert expanded(distortion, shown, seen, added) == pytest.approx(change, rel=0.15)


def test_the_best_filter_undoes_what_a_filter_has_done() -> None:
    generator = torch.Generator().manual_seed(1)
    decoded = 40 + 150 * torch.rand(128 + 2 * REACH, 128 + 2 * REACH, 3, generator=generator)
    wanted = Restoration(
        (Coefficients(7, (*[0] * (OF_SAMPLES + DENOISED), 9, 0, -7)), Coefficients(5, (3,)), Coefficients(4, ()))
    )
    seen = wanted.applied(decoded, CODE)
    found = statistics_of(decoded, seen).best(CODE, 128 * 128)
    assert found is not None
    before = (decoded[REACH:-REACH, REACH:-REACH] - seen).square().mean()
    after = (found.applied(decoded, CODE) - seen).square().mean()
    assert after < 0.01 * before
    bits = 8 * (len(found.section().data) + 9)
    assert bits < lambda_of(CODE) * (before - after) * 128 * 128


def test_no_filter_where_it_is_not_worth_its_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    seen = 40 + 150 * torch.rand(64, 64, 3, generator=generator)
    decoded = torch.nn.functional.pad(seen.movedim(-1, 0), (REACH,) * 4, mode="replicate").movedim(0, -1)
    assert statistics_of(decoded, seen).best(CODE, 64 * 64) is None  # exact already
    noisy = decoded + torch.randn(decoded.shape, generator=generator)
    assert statistics_of(noisy, seen).best(CODE, 64 * 64) is None  # nothing that a filter could know
    assert Statistics(3).best(CODE, 10) is None


def without_filter(data: bytes) -> bytes:
    parsed = container.parse(data)
    return container.pack(replace(parsed, sections=tuple(s for s in parsed.sections if s.kind != FILTER)))


@pytest.fixture(scope="module")
def codec() -> package.Codec:
    return package.Codec("tiny", "cpu")


def textured(channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """(200, 230, C), with texture and colours that the tiny model does not get right."""
    y, x = np.mgrid[0:200, 0:230]
    waves = [np.sin(x / (3 + i)) + np.cos(y / (4 + i)) + np.sin((x * y) / (700 + 100 * i)) for i in range(channels)]
    return ((127 + 40 * np.stack(waves, axis=-1)) * (257 if dtype == np.uint16 else 1)).clip(0, None).astype(dtype)


@pytest.mark.parametrize("channels, dtype", [(3, np.uint8), (1, np.uint8), (3, np.uint16)])
def test_files_with_a_filter_decode_to_better_pictures(
    codec: package.Codec, channels: int, dtype: type[np.generic]
) -> None:
    picture = textured(channels, dtype)
    result = codec.encode_result(picture, 60)
    kinds = [section.kind for section in container.parse(result.data).sections]
    assert kinds == [FILTER]
    shown = codec.decode_result(result.data).rgb
    assert np.array_equal(shown, result.reconstruction)
    plain = codec.decode_result(without_filter(result.data)).rgb
    errors = [np.square(array.astype(float) - picture).mean() for array in (shown, plain)]
    assert errors[0] < errors[1]


def test_windows_leave_no_seam(codec: package.Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode(textured(), 60)
    whole = codec.decode_array(data)
    monkeypatch.setattr(windows, "WINDOW", 4)
    in_parts = codec.decode_array(data)
    assert np.abs(whole.astype(int) - in_parts).max() <= 1
    region = codec.decode_array(data, region=(61, 62, 100, 70))
    assert np.array_equal(region, in_parts[62:132, 61:161])


def test_of_a_large_picture_some_windows_tell_it(codec: package.Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", 4)
    few = []
    monkeypatch.setattr(Statistics, "add", lambda self, decoded, code, slope, worths: few.append(slope.shape))
    codec.encode(textured(), 60)
    assert windows.LOOKED_AT <= len(few) <= 2 * windows.LOOKED_AT


def test_previews_of_some_groups_have_no_filter(codec: package.Codec) -> None:
    data = codec.encode(textured(), 60)
    groups = container.parse(data).header.streams - 1
    for count, filtered in ((1, False), (groups, True)):
        shown, plain = (codec.decode_array(its, preview=count) for its in (data, without_filter(data)))
        assert np.array_equal(shown, plain) != filtered


def test_a_damaged_filter_is_said_and_a_preview_does_without(codec: package.Codec) -> None:
    whole = codec.encode(textured(), 60)
    plain = codec.decode_array(without_filter(whole))
    unreadable = replace(container.parse(whole), sections=(Section(FILTER, b"\xff"),))
    with pytest.raises(CorruptError, match="filter"):
        codec.decode(container.pack(unreadable))
    altered = container.pack(unreadable)[:-1] + b"?"
    truncated = whole[:-6]  # in the section, which stands last
    for data in (altered, truncated):
        assert np.array_equal(codec.decode_array(data, preview="auto"), plain)
    assert "without its filter" in codec.decode_result(truncated, preview="auto").notes


def test_another_distortion_has_a_say(codec: package.Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    better = [
        section.kind for section in container.parse(codec.encode(textured(), 60, tune="ms-ssim", effort=0)).sections
    ]
    assert better == [FILTER]
    seen: list[float] = []

    def rising(self: object, shown: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        seen.append(1.0)
        return len(seen) + 0 * shown.sum()

    monkeypatch.setattr(MsSsim, "error", rising)
    assert not container.parse(codec.encode(textured(), 60, tune="ms-ssim", effort=0)).sections


def test_ms_ssim_has_a_filter_of_its_own(demo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """More similar than with that of the least squared error, for hardly more bytes, if any."""
    codec, found, demo = package.Codec("base", "cpu"), [], demo[:, 192:576]
    for expansion in (MsSsim.expansion, SquaredError.expansion):
        monkeypatch.setattr(MsSsim, "expansion", expansion)
        data = codec.encode(demo, 65, tune="ms-ssim")
        found.append((-10 * math.log10(1 - ms_ssim(demo, codec.decode_array(data))), len(data)))
    assert found[0][0] > found[1][0] + 0.02 and found[0][1] < 1.002 * found[1][1]
