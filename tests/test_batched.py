"""Lists of pictures: which go through the networks together, and that each comes out as it does alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

import lic
from lic import container, pipeline
from lic.grouping import batches, in_batches
from lic.images import psnr
from lic.model import store
from lic.pipeline import codec as pipeline_codec
from lic.quality import Tune

MODELS = sorted(path.stem for path in (DATA / "models").glob("*.safetensors"))


@pytest.fixture(scope="module")
def codec() -> lic.Codec:
    return lic.Codec("tiny", "cpu")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the networks got."""
    counts: list[int] = []
    encode, decode = pipeline.encode_rgbs, pipeline.decode_rgbs

    def encode_rgbs(model: store.LoadedModel, rgbs: Sequence[np.ndarray], codes: Sequence[int], tune: Tune) -> object:
        counts.append(len(rgbs))
        return encode(model, rgbs, codes, tune=tune)

    def decode_rgbs(model: store.LoadedModel, containers: Sequence[container.Container], bits: Sequence[int]) -> object:
        counts.append(len(containers))
        return decode(model, containers, bits)

    monkeypatch.setattr(pipeline, "encode_rgbs", encode_rgbs)
    monkeypatch.setattr(pipeline, "decode_rgbs", decode_rgbs)
    return counts


def mixed(demo: np.ndarray) -> list[np.ndarray]:
    """Sizes of four padded grids; gray, transparent and 16 bits among them."""
    sizes = [(44, 70), (64, 128), (1, 1), (60, 65), (64, 64), (50, 100), (130, 70), (63, 2), (10, 120)]
    found = [demo[40 * i : 40 * i + h, 60 * i : 60 * i + w] for i, (h, w) in enumerate(sizes)]
    found[1] = found[1][..., 1]
    found[3] = found[3].astype(np.uint16) * 257
    found[5] = np.concatenate([found[5], np.where(found[5][..., :1] > 90, 255, 100).astype(np.uint8)], axis=2)
    found[8] = found[8][..., 0].astype(np.uint16) * 250
    return found


# ----------------------------------------------------------------------------------------------------
# through the API


@pytest.mark.parametrize("quality", [5, 45, 95])
def test_a_list_gives_what_its_pictures_give_alone(
    codec: lic.Codec, demo: np.ndarray, together: list[int], quality: float
) -> None:
    pictures = mixed(demo)
    files = codec.encode(pictures, quality)
    assert sorted(together) == [1, 3, 5]
    for picture, file in zip(pictures, files, strict=True):
        alone = codec.encode(picture, quality)
        assert len(file) == pytest.approx(len(alone), rel=0.002, abs=2)
        back = codec.decode_array(file)
        assert back.shape == picture.shape and back.dtype == picture.dtype
        if (exact := psnr(picture, codec.decode_array(alone))) < 100:
            assert psnr(picture, back) == pytest.approx(exact, abs=0.01)


def test_a_list_decodes_as_its_files_do_alone(codec: lic.Codec, demo: np.ndarray, together: list[int]) -> None:
    files = [codec.encode(picture, quality) for picture, quality in zip(mixed(demo), range(5, 95, 10), strict=True)]
    decoded = codec.decode(iter(files))
    assert sorted(together) == [1, 3, 5]
    for image, file in zip(decoded, files, strict=True):
        alone = codec.decode(file)
        assert (image.mode, image.size) == (alone.mode, alone.size)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= (1 if image.mode != "I;16" else 257)


def test_old_files_of_several_models_decode_in_one_list(codec: lic.Codec, together: list[int]) -> None:
    paths = sorted((DATA / "golden").glob("*photo*.lic")) + sorted((DATA / "golden").glob("*tiled*.lic"))
    files = [path.read_bytes() for path in paths]
    decoded = codec.decode(files)
    assert len(together) > len(MODELS) and sum(together) == len(files) and max(together) > 1
    for image, file in zip(decoded, files, strict=True):
        alone = codec.decode(file)
        assert image.mode == alone.mode
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1


def test_batches_are_bounded(
    codec: lic.Codec, demo: np.ndarray, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lic.api.CPU_PIXELS", 3 * 64 * 64)
    pictures = [demo[i : i + 20, :30] for i in range(7)]
    large = demo[:128, :128]
    assert len(codec.encode([*pictures[:4], large, *pictures[4:]])) == 8
    assert together == [3, 1, 3, 1]


def test_targets_and_effort_take_one_at_a_time(codec: lic.Codec, demo: np.ndarray, together: list[int]) -> None:
    pictures = [demo[:30, :30], demo[30:60, :30]]
    sized = codec.encode(pictures, target=lic.Target("size", 600))
    assert [len(file) <= 600 for file in sized] == [True, True]
    tried = codec.encode(pictures, 40, effort=1)
    assert [lic.info(file).effort for file in tried] == [1, 1]
    assert [image.size for image in codec.decode(tried, region=(2, 3, 10, 9))] == [(10, 9)] * 2
    assert together == []


def test_the_first_failure_in_order_is_raised(codec: lic.Codec, demo: np.ndarray) -> None:
    small, large = demo[:30, :30], demo[:30, :100]
    files = codec.encode([small, large, small, small])
    wrong = []
    for parsed in map(container.parse, files):
        header = replace(parsed.header, symbols_crc=parsed.header.symbols_crc ^ 1)
        wrong.append(container.pack(replace(parsed, header=header)))
    with pytest.raises(lic.CorruptError, match="checksum"):
        codec.decode([files[0], wrong[1], files[2], wrong[3]])
    with pytest.raises(lic.CorruptError, match="checksum"):
        codec.decode([files[0], files[1], wrong[2], b"foreign"])
    with pytest.raises(lic.CorruptError, match=r"not a \.lic file"):
        codec.decode([files[0], b"foreign", wrong[2]])
    with pytest.raises(lic.UsageError, match="bytes, not str"):
        codec.decode([files[0], "name"])  # type: ignore[list-item]
    with pytest.raises(lic.UsageError, match="not bytes"):
        codec.encode([small, b"foreign", np.zeros((0, 0))])  # type: ignore[list-item]
    assert codec.encode([]) == codec.decode([]) == []


# ----------------------------------------------------------------------------------------------------
# through the networks


@pytest.mark.parametrize("name", MODELS)
def test_symbols_are_the_same_in_a_batch(demo: np.ndarray, name: str) -> None:
    """Of every context model, at different qualities."""
    model = store.load_file(store.read_info(DATA / "models" / f"{name}.safetensors"))
    pictures = [demo[:70, :128], demo[100:228, 100:170, :1], demo[200:300, 200:300].astype(np.uint16) * 257]
    codes, bits = [1_000, 25_000, 49_000], [8, 16, 16]
    encoded = pipeline.encode_rgbs(model, pictures, codes)
    decoded = pipeline.decode_rgbs(model, [one.container for one in encoded], bits)
    for picture, code, depth, one, back in zip(pictures, codes, bits, encoded, decoded, strict=True):
        alone = pipeline.decode_rgb(model, container.parse(container.pack(one.container)), bits=depth)
        assert back.symbols_sha256 == alone.symbols_sha256 == one.symbols_sha256
        assert back.rgb.shape == picture.shape and back.rgb.dtype == alone.rgb.dtype
        limit = 257 if depth == 16 else 1
        assert np.abs(back.rgb.astype(int) - alone.rgb).max() <= limit
        if back.rgb.dtype == picture.dtype:
            assert np.abs(back.rgb.astype(int) - one.reconstruction).max() <= limit
        plain = pipeline.encode_rgb(model, picture, code)
        assert one.estimated_bits == pytest.approx(plain.estimated_bits, rel=0.002)
        assert psnr(picture, one.reconstruction) == pytest.approx(psnr(picture, plain.reconstruction), abs=0.01)


def test_tiled_pictures_in_a_batch(demo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_codec, "TILE", 64)
    monkeypatch.setattr(pipeline_codec, "LARGEST_TILE", 64 * 64)
    model = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors"))
    encoded = pipeline.encode_rgbs(model, [demo[:65, :130], demo[:128, 200:380]], [20_000, 30_000])
    decoded = pipeline.decode_rgbs(model, [one.container for one in encoded], [8, 8])
    for one, back in zip(encoded, decoded, strict=True):
        assert len(one.container.tiles) == 6
        assert back.symbols_sha256 == one.symbols_sha256
        assert np.abs(back.rgb.astype(int) - one.reconstruction).max() <= 1


def test_pictures_that_do_not_go_together(demo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    model = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors"))
    with pytest.raises(ValueError, match="2 padded grids"):
        pipeline.encode_rgbs(model, [demo[:64, :64], demo[:64, :65]], [0, 0])
    whole = pipeline.encode_rgb(model, demo[:64, :128], 0).container
    monkeypatch.setattr(pipeline_codec, "TILE", 64)
    monkeypatch.setattr(pipeline_codec, "LARGEST_TILE", 64 * 64)
    tiled = pipeline.encode_rgb(model, demo[:64, :128], 0).container
    with pytest.raises(ValueError, match="tile sizes"):
        pipeline.decode_rgbs(model, [whole, tiled], [8, 8])


# ----------------------------------------------------------------------------------------------------
# which go together

SIZES = st.sampled_from([(64, 64), (64, 128), (128, 64), (256, 256)])


@given(st.lists(st.tuples(st.sampled_from("ab"), SIZES)), st.sampled_from([1, 20_000, 80_000]))
def test_batches_hold_what_is_alike(items: list[tuple[str, tuple[int, int]]], limit: int) -> None:
    found = list(batches(((key, size, (key, size, i)) for i, (key, size) in enumerate(items)), limit))
    assert sorted(i for batch in found for _, _, i in batch) == list(range(len(items)))
    for batch in found:
        assert len({(key, size) for key, size, _ in batch}) == 1
        assert len(batch) == 1 or sum(w * h for _, (w, h), _ in batch) <= limit
        assert [i for _, _, i in batch] == sorted(i for _, _, i in batch)


def test_few_wait() -> None:
    given_out = 0

    def items() -> Iterator[tuple[int, tuple[int, int], int]]:
        nonlocal given_out
        for i in range(1000):
            given_out += 1
            yield i, (64, 64), i

    first = next(batches(items(), 2 * 64 * 64))
    assert first == [0] and given_out < 20


@settings(max_examples=200)
@given(st.lists(st.tuples(SIZES, st.sampled_from(["well"] * 6 + ["unprepared", "uncoded"]))))
def test_results_and_the_first_failure_are_in_order(sources: list[tuple[tuple[int, int], str]]) -> None:
    numbered = [(i, *source) for i, source in enumerate(sources)]
    Source = tuple[int, tuple[int, int], str]

    def prepare(source: Source) -> tuple[None, tuple[int, int], Source]:
        if source[2] == "unprepared":
            raise lic.LicError(f"{source[0]}")
        return None, source[1], source

    def code(items: list[Source]) -> list[int]:
        for i, _, fate in items:
            if fate == "uncoded":
                raise lic.LicError(f"{i}")
        return [10 * i for i, _, _ in items]

    first = next((i for i, _, fate in numbered if fate != "well"), None)
    if first is None:
        assert in_batches(numbered, prepare, code, 40_000) == [10 * i for i in range(len(sources))]
    else:
        with pytest.raises(lic.LicError, match=f"^{first}$"):
            in_batches(numbered, prepare, code, 40_000)
