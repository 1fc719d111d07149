"""Files that must decode for ever, with the tiny model of the tests: format version 1.

They cover the modes, depths, tiles and metadata of the format; two hold arbitrary symbols: deviations from skipped
modes, long escapes, values at the limits. Never replace one: add others when the format grows.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DATA

import lic
from lic import conformance
from lic.container import parse
from lic.model import store

GOLDEN = DATA / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def codec() -> lic.Codec:
    return lic.Codec("tiny")


def test_every_golden_file_is_listed() -> None:
    assert {path.name for path in GOLDEN.glob("*.lic")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_file_decodes(codec: lic.Codec, name: str) -> None:
    data, expected = (GOLDEN / name).read_bytes(), EXPECTED[name]
    assert codec.decode_result(data).symbols_sha256 == expected["symbols_sha256"]
    image = codec.decode(data)
    assert list(image.size) == expected["size"] and image.mode == expected["mode"]
    pixels = np.asarray(image).astype(float).reshape(image.height, image.width, -1)
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), expected["mean"], atol=0.5)


@pytest.mark.parametrize("name", EXPECTED)
def test_stored_symbols_give_the_same_bytes(name: str) -> None:
    model = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors"))
    container = parse((GOLDEN / name).read_bytes())
    file = conformance.decoded(model, container)
    assert conformance.streams_of(model, file) == list(container.tiles)
