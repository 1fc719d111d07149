"""Files that must decode for ever, with the small models of the tests: format versions 1 to 3.

Those of the tiny model cover the modes, depths, tiles and metadata of the format, three each of three relatives of it
dependent quantisation; two hold arbitrary symbols: deviations from skipped modes, long escapes, values at the limits.
Those named denoised are of version 2 and those named matched of version 3, which differ in the filter behind the
synthesis: some pixels are compared.
Every other system has a picture, a tiled gray one and arbitrary symbols. Never replace one, nor a model: add others
when the format grows.
"""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from conftest import DATA

import lic
from lic import conformance
from lic.container import FORMAT_VERSION, parse
from lic.model import store
from lic.model.context import SYSTEMS

GOLDEN = DATA / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@cache
def codec_of(model: str) -> lic.Codec:
    return lic.Codec(model)


def test_every_golden_file_is_listed() -> None:
    assert {path.name for path in GOLDEN.glob("*.lic")} == set(EXPECTED)


def test_every_system_has_golden_files() -> None:
    models = {lic.info((GOLDEN / name).read_bytes()).model for name in EXPECTED}
    assert {store.find(model).config["system"] for model in models} == set(SYSTEMS)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_file_decodes(name: str) -> None:
    data, expected = (GOLDEN / name).read_bytes(), EXPECTED[name]
    codec = codec_of(lic.info(data).model)
    assert codec.decode_result(data).symbols_sha256 == expected["symbols_sha256"]
    image = codec.decode(data)
    assert list(image.size) == expected["size"] and image.mode == expected["mode"]
    pixels = np.asarray(image).astype(float).reshape(image.height, image.width, -1)
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), expected["mean"], atol=0.5)
    for at, values in expected.get("pixels", {}).items():
        column, row = map(int, at.split(","))
        np.testing.assert_allclose(pixels[row, column], values, atol=1)


def test_every_version_has_golden_files() -> None:
    assert {parse((GOLDEN / name).read_bytes()).header.version for name in EXPECTED} == set(
        range(1, FORMAT_VERSION + 1)
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_stored_symbols_give_the_same_bytes(name: str) -> None:
    container = parse((GOLDEN / name).read_bytes())
    model = store.load(container.header.model)
    file = conformance.decoded(model, container)
    assert conformance.streams_of(model, file) == list(container.tiles)
