"""Neighbours in the first step: each latent once, predicted from what is known; fewer bits where these are alike."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file
from small_models import MODELS, TINY

from lic.coder import SCALES
from lic.errors import UnsupportedError
from lic.model import store
from lic.model.context import Geometry
from lic.model.neighbours import MEAN_LIMIT, Neighbours, levels_of, sum_around
from lic.model.store import LoadedModel
from lic.pipeline.codec import decode_rgb, encode_rgb, encode_rgbs
from lic.pipeline.tile import Latents, Writer, code_tiles
from lic.train.dependent import LEVELS, ToQuantise, chosen_steps, fit_neighbours
from lic.train.export import export
from lic.train.trainer import Settings, Trainer

SOURCE = TINY.with_stem("tiny-neighbours")
grids = st.tuples(st.integers(1, 20), st.integers(1, 20))
levels = st.sampled_from([3, 5, 7, 9, 11])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return store.load_file(store.read_info(SOURCE))


def without_neighbours(source: Path = SOURCE) -> LoadedModel:
    model = store.load_file(store.read_info(source))
    assert model.net.dependent is not None
    model.net.quantise(replace(model.net.dependent, neighbours=None))
    return model


def random_neighbours(random: np.random.Generator, count: int, width: int) -> Neighbours:
    channels = np.sort(random.choice(width, min(count, width), replace=False))
    shape = len(channels), LEVELS
    return Neighbours(channels, random.integers(-128, 128, (shape[0], LEVELS - 1)), random.integers(-5, 13, shape))


@settings(max_examples=100, deadline=None)
@given(grid=grids, count=levels)
def test_every_position_is_in_one_level_and_its_neighbours_in_levels_before(grid: tuple[int, int], count: int) -> None:
    found = levels_of(grid, count)
    assert len(found) == count
    assert sorted(np.concatenate([level.positions for level in found])) == list(range(grid[0] * grid[1]))
    known: set[tuple[int, int]] = set()
    for number, (positions, d, is_diagonal) in enumerate(found):
        places = [divmod(int(at), grid[1]) for at in positions]
        assert places == sorted(places)
        steps = itertools.product((-d, d), (-d, d)) if is_diagonal else [(-d, 0), (d, 0), (0, -d), (0, d)]
        around = {(r + down, s + right) for (r, s), (down, right) in itertools.product(places, steps)}
        if number:
            assert {(r, s) for r, s in around if 0 <= r < grid[0] and 0 <= s < grid[1]} <= known
        known.update(places)


@settings(max_examples=60, deadline=None)
@given(grid=grids, distance=st.sampled_from([1, 2, 4]), is_diagonal=st.booleans(), seed=seeds)
def test_sum_around(grid: tuple[int, int], distance: int, is_diagonal: bool, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-9, 10, (2, *grid, 3))
    found = sum_around(x, distance, is_diagonal)

    def one(at: int, to: int, size: int) -> int | None:
        """``to``, or what lies as far on the other side."""
        return next((n for n in (to, 2 * at - to) if 0 <= n < size), None)

    d = distance
    steps = list(itertools.product((-d, d), (-d, d))) if is_diagonal else [(-d, 0), (d, 0), (0, -d), (0, d)]
    for r, s in np.ndindex(grid):
        places = [(one(r, r + down, grid[0]), one(s, s + right, grid[1])) for down, right in steps]
        expected = sum(x[:, p, q] for p, q in places if p is not None and q is not None)
        assert np.array_equal(found[:, r, s], expected + np.zeros((2, 3), np.int64))


@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=seeds)
def test_pieces_hold_every_latent_once_and_change_only_some_channels(grid: tuple[int, int], seed: int) -> None:
    random = np.random.default_rng(seed)
    width = int(random.integers(1, 12))
    neighbours = random_neighbours(random, int(random.integers(1, 5)), width)
    n = grid[0] * grid[1] * width
    mean, scale_index = random.integers(-900, 900, (2, n)), random.integers(0, len(SCALES), (2, n))
    integers, seen = np.zeros((2, n), np.int64), np.zeros(n, int)
    pieces = []
    for piece in neighbours.pieces(grid, mean, scale_index, integers):
        seen[piece.at] += 1
        integers[:, piece.at] = np.rint(piece.mean / 8).astype(int) + random.integers(-2, 3, piece.mean.shape)
        assert piece.scale_index.min(initial=0) >= 0 and piece.scale_index.max(initial=0) < len(SCALES)
        pieces.append(piece)
    assert np.all(seen == 1)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    first, last = pieces[0], pieces[-1]
    assert np.array_equal(first.mean, mean[:, first.at])
    assert np.array_equal(last.mean, mean[:, last.at]) and np.array_equal(last.scale_index, scale_index[:, last.at])
    assert not set(last.at % width) & set(neighbours.channels)


def test_a_quarter_of_the_sum_is_their_mean() -> None:
    """Where the mean misses the same everywhere, all levels but the coarsest know it."""
    neighbours = Neighbours(np.array([1]), np.full((1, LEVELS - 1), 64), np.zeros((1, LEVELS), np.int64))
    mean, integers = np.full((1, 7 * 9 * 2), 3), np.zeros((1, 7 * 9 * 2), np.int64)
    for number, piece in enumerate(neighbours.pieces((7, 9), mean, mean, integers)):
        assert np.all(piece.mean == (40 if 0 < number < LEVELS else 3))
        integers[:, piece.at] = 5


@pytest.mark.parametrize(
    ("channels", "weight", "narrower", "reason"),
    [
        ([0], (1, 3), (1, 4), "levels"),
        ([0], (1, 0), (1, 1), "levels"),
        ([0], (1, 12), (1, 13), "levels"),
        ([0, 1], (1, 4), (2, 5), "weights"),
        ([0, 1], (2, 4), (1, 5), "weights"),
        ([0, 0], (2, 4), (2, 5), "increase"),
        ([-1, 0], (2, 4), (2, 5), "increase"),
        ([], (0, 4), (0, 5), "weights"),
        ([1 << 15], (1, 4), (1, 5), "channels out of range"),
    ],
)
def test_neighbours_that_are_none(
    channels: list[int], weight: tuple[int, int], narrower: tuple[int, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Neighbours(np.array(channels, np.int64), np.zeros(weight, np.int64), np.zeros(narrower, np.int64))


def test_weights_of_more_than_eight_bits_are_none() -> None:
    with pytest.raises(ValueError, match="weight out of range"):
        Neighbours(np.array([0]), np.full((1, 4), 128), np.zeros((1, 5), np.int64))


# In the codec


@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_symbols_come_back(name: str, model: LoadedModel, tmp_path: Path, demo: np.ndarray) -> None:
    """With any neighbours, of every system that has a grid in its first step."""
    random = np.random.default_rng(1)
    shutil.copy(TINY, tmp_path)
    net = store.load_file(store.read_info(TINY.with_stem(name))).net
    schedule = net.context.schedule
    width = schedule.take(torch.empty(1, 8, 8, net.config.latent), 0).shape[-1]
    assert model.net.dependent is not None
    quantiser = replace(model.net.dependent, neighbours=random_neighbours(random, 9, width))
    if schedule.first_grid(Geometry(1, 8, 8)) is None:
        with pytest.raises(ValueError, match="first step"):
            net.quantise(quantiser)
        return
    net.quantise(quantiser)
    path = tmp_path / "other.safetensors"
    store.write_model(path, net, {"provenance": {}}, store.read_info(tmp_path / TINY.name))
    loaded = store.load_file(store.read_info(path))
    pictures = [np.ascontiguousarray(demo[top : top + 130, 100:250]) for top in (0, 200)]
    encoded = [encode_rgb(loaded, pictures[0], 15_000), *encode_rgbs(loaded, pictures, [5_000, 40_000])]
    for its in encoded:
        decoded = decode_rgb(loaded, its.container)
        assert decoded.symbols_sha256 == its.symbols_sha256
        assert np.abs(decoded.rgb.astype(int) - its.reconstruction).max() <= 1


def test_every_way_of_quantising_agrees(model: LoadedModel, demo: np.ndarray) -> None:
    """The loop that fits tables and the one that codes."""
    net = model.net
    x = torch.from_numpy(demo[:192, :256].copy()).float()[None] / 255 - 0.5
    code = torch.tensor([20_000.0])
    with torch.no_grad():
        y, z, _ = ToQuantise.of(net, x, code)
        weight = net.rounding_weight(code, True)[:, None, None].expand_as(y).contiguous()
        coded = code_tiles(model, Geometry(*y.shape[:3]), [20_000], [Writer()], Latents(z, y, weight))
        for step, chosen in enumerate(chosen_steps(net, y, z, code)):
            of_step = net.context.schedule.take(coded.latents.y, step).flatten(1).numpy()
            quantisers = chosen.quantisers % 2
            assert np.array_equal(of_step - chosen.shift, 2 * chosen.symbols - np.sign(chosen.symbols) * quantisers)


def test_fitted_neighbours_save_bits(demo: np.ndarray) -> None:
    """On other parts of the picture than they were fitted to."""
    plain, fitted = without_neighbours(), without_neighbours()
    crops = [(top, left) for top in (0, 256) for left in (0, 256, 512)]
    with torch.no_grad():
        latents = []
        for n, (top, left) in enumerate(crops[:4]):
            x = torch.from_numpy(demo[top : top + 256, left : left + 256].copy()).float()[None] / 255 - 0.5
            latents.append(ToQuantise.of(fitted.net, x, torch.tensor([5_000.0 + 8_000 * n])))
        found = fit_neighbours(fitted.net, latents)
    assert found is fitted.net.dependent and found.neighbours is not None
    for top, left in crops[4:]:
        rgb = np.ascontiguousarray(demo[top : top + 256, left : left + 256])
        before, after = (encode_rgb(model, rgb, 10_000) for model in (plain, fitted))
        sizes = [len(its.container.tiles[0][1]) for its in (before, after)]  # of the first step
        assert sizes[1] < 0.97 * sizes[0]


def test_nothing_is_learnt_where_there_is_no_grid(demo: np.ndarray) -> None:
    net = store.load_file(store.read_info(TINY.with_stem("tiny-econtextformer"))).net
    net.quantise(without_neighbours().net.dependent)
    x = torch.from_numpy(demo[:128, :128].copy()).float()[None] / 255 - 0.5
    with torch.no_grad():
        found = fit_neighbours(net, [ToQuantise.of(net, x, torch.tensor([20_000.0]))])
    assert found is net.dependent and found.neighbours is None


def test_a_preview_of_the_first_step(model: LoadedModel, demo: np.ndarray) -> None:
    container = encode_rgb(model, np.ascontiguousarray(demo[:128, :128]), 30_000).container
    cut = replace(container, tiles=tuple(streams[:2] for streams in container.tiles))
    shown = [decode_rgb(model, its, preview=preview) for its, preview in ((container, 1), (cut, 1), (cut, "auto"))]
    assert all(its.groups == (1,) and np.array_equal(its.rgb, shown[0].rgb) for its in shown)


def test_means_stay_within_their_limit() -> None:
    """However far off the integers of damaged streams are."""
    neighbours = Neighbours(np.array([0]), np.full((1, 10), 127), np.zeros((1, 11), np.int64))
    mean, integers = np.full((1, 40 * 40), MEAN_LIMIT), np.zeros((1, 40 * 40), np.int64)
    for piece in neighbours.pieces((40, 40), mean, mean, integers):
        assert np.abs(piece.mean).max(initial=0) <= MEAN_LIMIT
        integers[:, piece.at] = piece.shift + (1 << 22)


@pytest.mark.parametrize("part", ["context", "transforms"])
def test_only_a_first_step_that_stays_keeps_them(part: str, tmp_path: Path, demo: np.ndarray) -> None:
    """In what is exported: a context model that was trained has another one."""
    Image.fromarray(demo).save(tmp_path / "demo.png")
    net = store.load_file(store.read_info(SOURCE)).net
    net.config = replace(net.config, name="tiny")
    store.write_model(tmp_path / "whole.safetensors", net, {"provenance": {}, "rate_range": None})
    settings = Settings(model="tiny", part=part, steps=1, batch=2, crop=64, late_crop=64)
    trainer = Trainer(settings, torch.device("cpu"))
    trainer.start_from(net.state_dict(), net.dependent)
    trainer.save(tmp_path / "state.pt")
    export(
        tmp_path / "state.pt",
        tmp_path / "new.safetensors",
        calibration=[tmp_path],
        shared_from=tmp_path / "whole.safetensors",
        name="new",
        data="",
        rate_range=None,
    )
    found = store.load_file(store.read_info(tmp_path / "new.safetensors")).net.dependent
    assert found is not None and (found.neighbours is None) == (part == "context")
    if part == "transforms":
        with pytest.raises(ValueError, match="--shared-from"):
            export(
                tmp_path / "state.pt",
                tmp_path / "other.safetensors",
                calibration=[tmp_path],
                shared_from=None,
                name="other",
                data="",
                rate_range=None,
            )


# In weights files


def test_a_weights_file_keeps_them(model: LoadedModel, tmp_path: Path) -> None:
    assert model.net.dependent is not None
    ours = model.net.dependent.neighbours
    shutil.copy(TINY, tmp_path)
    store.write_model(
        tmp_path / "again.safetensors", model.net, {"provenance": {}}, store.read_info(tmp_path / TINY.name)
    )
    again = store.load_file(store.read_info(tmp_path / "again.safetensors"))
    assert again.info.entropy_id == model.info.entropy_id
    assert again.net.dependent is not None and again.net.dependent.neighbours is not None and ours is not None
    for name, array in vars(again.net.dependent.neighbours).items():
        assert np.array_equal(array, getattr(ours, name))


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("weight", None, "no known kind"),
        ("channels", None, "no known kind"),
        ("else", np.zeros((10, 4), np.int8), "no known kind"),
        ("weight", np.zeros((10, 4), np.int16), "no known kind"),
        ("channels", np.arange(10, dtype=np.int64), "no known kind"),
        ("channels", np.arange(10, dtype=np.float32), "no known kind"),
        ("channels", np.zeros((10, 1), np.int16), "no known kind"),
        ("channels", np.arange(7, 17, dtype=np.int16), "first step"),
        ("channels", np.arange(9, dtype=np.int16), "other neighbours"),
        ("narrower", np.zeros((10, 4), np.int8), "levels"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, name: str, array: np.ndarray | None, reason: str) -> None:
    shutil.copy(TINY, tmp_path)
    with safe_open(SOURCE, "np") as file:
        information = json.loads(file.metadata()["lic"])
    arrays = load_arrays(SOURCE)
    arrays.pop(f"neighbours.{name}", None)
    if array is not None:
        arrays[f"neighbours.{name}"] = array
    entropy, synthesis = store.identities(information["config"], information["grids"], load_arrays(TINY) | arrays)
    information |= {"entropy_id": entropy.hex(), "synthesis_id": synthesis.hex()}
    save_file(arrays, tmp_path / SOURCE.name, {"lic": json.dumps(information)})
    with pytest.raises(UnsupportedError, match=reason):
        store.load_file(store.read_info(tmp_path / SOURCE.name))
