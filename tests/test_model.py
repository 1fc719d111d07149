"""Transforms, hyperprior and the mathematics of the rate."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from hypothesis.strategies import integers
from reference_decoder import Weights
from safetensors import safe_open
from safetensors.numpy import load_file as read_arrays
from safetensors.numpy import save_file

from lic.coder import SCALES
from lic.errors import LicError, UnsupportedError
from lic.exact import Fixed, attend
from lic.model import store
from lic.model.codec import (
    CENTROIDS,
    FOR_SQUARED_ERROR,
    MAX_PULL,
    MIN_SCALE,
    OF_PULL,
    THRESHOLD,
    CodecModel,
    Corrections,
    Share,
    expected_offset,
    gaussian_bits,
    round_for_rate,
    softly_rounded,
)
from lic.model.complexity import kmac_per_pixel
from lic.model.config import CONFIGS, REFINEMENT, Config
from lic.model.context import Prediction
from lic.model.layers import CACHED, Matrix, Residual, depth_to_space, space_to_depth
from lic.model.transforms import LappedShortcut, lapped_basis
from lic.quality import MAX_CODE, code_of, step_of

NO_CENTROIDS = torch.zeros(len(SCALES), CENTROIDS)


def test_lapped_basis_is_an_orthogonal_transform() -> None:
    basis = lapped_basis(16)
    np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=1e-12)
    np.testing.assert_allclose(basis[:, :16] @ basis[:, 16:].T, np.zeros((16, 16)), atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (16, 64), (48, 32)])
def test_full_shortcut_reconstructs_perfectly_up_to_the_border(size: tuple[int, int]) -> None:
    shortcut = LappedShortcut(768)
    random = np.random.default_rng(0).normal(size=(768, 768))
    shortcut.set_basis(random @ random.T)
    x = torch.rand(2, *size, 3)
    torch.testing.assert_close(shortcut.synthesis(shortcut.analysis(x)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_energy_of_basis_functions_on_blocks(block: int) -> None:
    shortcut = LappedShortcut(20)
    torch.nn.init.normal_(shortcut.weight)
    worth = torch.rand(1, 64 // block, 64 // block, 3)
    energy = shortcut.energy(worth, block)
    assert energy.shape == (1, 4, 4, 20)
    pixels = worth[0].repeat_interleave(block, 0).repeat_interleave(block, 1)[8:40, 8:40].movedim(-1, 0)  # of (1, 1)
    unit = torch.zeros(20, 4, 4, 20)
    unit[:, 1, 1] = torch.eye(20)
    functions = shortcut.synthesis(unit)[:, 8:40, 8:40].movedim(-1, 1)
    means = torch.nn.functional.avg_pool2d(functions, block)
    means = means.repeat_interleave(block, 2).repeat_interleave(block, 3)
    torch.testing.assert_close(energy[0, 1, 1], (pixels * means.square()).sum(dim=(1, 2, 3)))


def test_latents_of_a_linear_orthonormal_transform_need_no_correction() -> None:
    net = CodecModel(CONFIGS["tiny"])  # its networks add nothing yet
    random = np.random.default_rng(0).normal(size=(768, 768))
    net.shortcut.set_basis(random @ random.T)
    x, code = torch.rand(2, 64, 128, 3) - 0.5, torch.tensor([0.0, MAX_CODE])
    y = net.analysis(x, code).detach()
    torch.testing.assert_close(net.corrected(x, y, code), y, atol=1e-4, rtol=1e-4)
    away = net.corrected(x, y + 1, code, corrections=Corrections((Share(0.45, 0.8),))) - y
    torch.testing.assert_close(away, torch.tensor([0.55, 0.2])[:, None, None, None].expand_as(away), atol=1e-3, rtol=0)


def test_the_pull_of_squared_error_is_what_is_missing() -> None:
    net = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors")).net
    x, code = torch.rand(2, 64, 128, 3) - 0.5, torch.tensor([0.0, MAX_CODE])
    y = net.analysis(x, code).detach()
    pulled = FOR_SQUARED_ERROR._replace(pull=lambda shown, seen: seen - shown)
    expected = net.corrected(x, y, code)
    torch.testing.assert_close(net.corrected(x, y, code, corrections=pulled), expected, atol=1e-3, rtol=1e-4)
    far = FOR_SQUARED_ERROR._replace(pull=lambda shown, seen: 1e6 * (seen - shown), shares=(Share(1.0, 1.0),))
    away = net.corrected(x, y, code, corrections=far) - net.corrected(x, y, code, corrections=far._replace(pull=None))
    assert away.abs().max() < OF_PULL * MAX_PULL + 1e-3


def test_soft_rounding_is_a_staircase_between_deadzones() -> None:
    y = torch.linspace(-5, 5, 1001)
    v = softly_rounded(y)
    assert torch.equal(softly_rounded(-y), -v) and (v.diff() >= 0).all()
    assert (v - y).abs().max() < THRESHOLD and v[y.abs() < 0.4].abs().max() < 0.03
    torch.testing.assert_close(v[::100], y[::100], atol=1e-3, rtol=0)


def test_soft_rounding_makes_zeros_of_more_where_errors_count_less() -> None:
    y = torch.linspace(0, 1, 101)
    v = [softly_rounded(y, torch.tensor(worth)) for worth in (4.0, 1.0, 0.25, 1e-9)]
    torch.testing.assert_close(v[1], softly_rounded(y))
    half = [int((values < 0.5).sum()) for values in v]
    assert half == sorted(half) and len(set(half)) == 4 and half[-1] < 101


def test_adapters_add_a_matrix_of_low_rank() -> None:
    layer = Matrix(7, 5)
    x, before = torch.randn(3, 7), layer.weight.detach().clone()
    plain = layer(x)
    layer.adapt(2)
    assert layer.left is not None and layer.right is not None
    torch.testing.assert_close(layer(x), plain)
    torch.nn.init.normal_(layer.left)
    added = layer(torch.eye(7)).T - layer.bias[:, None] - before
    torch.testing.assert_close(added, layer.left.T @ layer.right, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(added.detach(), rtol=1e-4) == 2


@given(
    arrays(
        np.int16,
        array_shapes(min_dims=2, max_dims=2, min_side=0).map(lambda s: (s[0], 2 * s[1])),
        elements=integers(-2048, 2047),
    )
)
def test_twelve_bits_are_unpacked(values: np.ndarray) -> None:
    packed = store.pack12(values)
    assert packed.nbytes * 2 == values.size * 3
    assert np.array_equal(store.unpack12(packed), values)


def test_shortcut_of_a_weights_file(tmp_path: Path) -> None:
    net = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors")).net
    before = net.shortcut.weight.clone()
    path, again = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    store.write_model(path, net, {"provenance": {}})
    loaded = store.load_file(store.read_info(path)).net
    assert torch.equal(loaded.shortcut.weight, net.shortcut.weight)  # what is written is what is computed with
    torch.testing.assert_close(net.shortcut.weight, before, atol=2.0**-13, rtol=0)
    store.write_model(again, loaded, {"provenance": {}})
    assert path.read_bytes() == again.read_bytes()


def test_large_arrays_are_deflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = store.load_file(store.read_info(DATA / "models" / "tiny.safetensors")).net
    paths = [tmp_path / "plain.safetensors", tmp_path / "small.safetensors"]
    for path, size in zip(paths, (1 << 30, 1000), strict=True):
        monkeypatch.setattr(store, "DEFLATE_FROM", size)
        store.write_model(path, net, {"provenance": {}})
    plain, small = (store.read_info(path) for path in paths)
    assert not plain.deflated and "tables.y.cdf" in small.deflated
    assert paths[1].stat().st_size < paths[0].stat().st_size
    assert (small.entropy_id, small.synthesis_id) == (plain.entropy_id, plain.synthesis_id)
    before, after = (store.read_arrays(info) for info in (plain, small))
    assert before.keys() == after.keys()
    for name, array in after.items():
        assert array.dtype == before[name].dtype and np.array_equal(array, before[name]), name
    assert Weights(paths[1]).entropy_id == small.entropy_id  # read by what bitstream_spec.md says
    store.load_file(small)


@pytest.mark.parametrize("change", [("|i1", [3]), ("|i1", [-1, 7]), ("|u9", [10]), ("<u2", [1 << 40])])
def test_arrays_that_do_not_inflate_to_what_they_should(tmp_path: Path, change: tuple[str, list[int]]) -> None:
    arrays = read_arrays(DATA / "models" / "tiny.safetensors")
    with safe_open(DATA / "models" / "tiny.safetensors", "np") as file:
        meta = json.loads(file.metadata()["lic"])
    name = "tables.y.cdf"
    arrays[name] = np.frombuffer(zlib.compress(arrays[name].tobytes()), np.uint8)
    save_file(arrays, tmp_path / "x.safetensors", {"lic": json.dumps(meta | {"deflated": {name: change}})})
    with pytest.raises(UnsupportedError, match=r"x\.safetensors: damaged"):
        store.load_file(store.read_info(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("value", [3, [1], {"a": 1}, {"a": [1, 2, 3]}])
def test_deflated_arrays_of_no_known_kind(tmp_path: Path, value: object) -> None:
    with safe_open(DATA / "models" / "tiny.safetensors", "np") as file:
        meta = json.loads(file.metadata()["lic"])
    save_file({}, tmp_path / "x.safetensors", {"lic": json.dumps(meta | {"deflated": value})})
    with pytest.raises(LicError, match="not a lic weights file"):
        store.read_info(tmp_path / "x.safetensors")


def test_space_to_depth_is_inverted() -> None:
    x = torch.randn(2, 8, 12, 3)
    assert torch.equal(depth_to_space(space_to_depth(x, 4), 4), x)


@pytest.mark.parametrize("limit", [math.inf, 0.5])
def test_a_block_is_the_same_in_pieces(limit: float) -> None:
    """As it computes in inference, a cache full at a time, and in training."""
    block = Residual(16)
    x = 3 * torch.randn(2, 40, 24, 16)
    whole = block(x, limit)
    given = x.clone()
    with torch.no_grad():
        assert x[..., 0].numel() > CACHED
        torch.testing.assert_close(block(x, limit), whole)
        torch.testing.assert_close(block(x.transpose(1, 2), limit), block(x.transpose(1, 2).contiguous(), limit))
    assert torch.equal(x, given)


def test_no_latents_make_the_synthesis_grow_without_bound() -> None:
    torch.manual_seed(0)
    net = CodecModel(CONFIGS["tiny"])
    for name, parameter in net.g_s.named_parameters():
        if name.endswith((".reduce.weight", ".outer.weight", "last.weight")):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    y, code = 1e4 * torch.randn(1, 4, 4, net.config.latent), torch.tensor([0.0])
    with torch.no_grad():
        limited = net.g_s(y, torch.zeros(1, 64, 64, 3), code).abs().max()
        net.g_s.limit = math.inf
        assert limited < 1e5 * y.abs().max() < net.g_s(y, torch.zeros(1, 64, 64, 3), code).abs().max()


def test_base_fits_its_decoder_budget() -> None:
    kmac = kmac_per_pixel(CodecModel(replace(CONFIGS["base"], refinement=REFINEMENT)))  # as `lic models` has it
    assert kmac["decoder"] <= 60
    assert CONFIGS["base"].latent >= 320


def test_configuration_survives_json() -> None:
    for config in CONFIGS.values():
        assert Config.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="fields"):
        Config.from_json({"name": "base"})


def test_fresh_model_quantises_with_the_theoretical_step() -> None:
    net = CodecModel(CONFIGS["tiny"])
    for quality in (0, 37.5, 100):
        code = code_of(quality)
        gain = net.gain(torch.tensor([float(code)]))
        torch.testing.assert_close(gain, torch.full_like(gain, 255 / step_of(code)), rtol=1e-5, atol=0)
        torch.testing.assert_close(net.igain(torch.tensor([float(code)])), 1 / gain)


def test_quality_table_is_continuous_and_hits_its_knots() -> None:
    net = CodecModel(CONFIGS["tiny"])
    table = net.log_gain
    torch.nn.init.normal_(table.table)
    knots = table.table.shape[0]
    codes = torch.arange(knots) * (MAX_CODE / (knots - 1))
    torch.testing.assert_close(table(codes), table.table.data, atol=1e-4, rtol=0)
    near = table(torch.tensor([12499.0, 12500.0, 12501.0]))
    assert (near[0] - near[2]).abs().max() < 1e-2


def test_masses_of_all_integers_sum_to_one() -> None:
    values = torch.arange(-60, 61, dtype=torch.float64)
    for mean, scale in ((0.0, 0.2), (0.3, 1.0), (-7.4, 5.0)):
        mass = 2 ** -gaussian_bits(values, torch.tensor(mean), torch.tensor(scale))
        assert abs(float(mass.sum()) - 1) < 1e-5


def test_expected_offset_is_the_conditional_mean() -> None:
    y = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.3
    for value in (-1.0, 0.0, 1.0, 2.0):
        inside = y[y.round() == value]
        offset = expected_offset(torch.tensor(value), torch.tensor(0.3), torch.tensor(0.8), NO_CENTROIDS)
        assert abs(float(inside.mean() - value) - float(offset)) < 2e-3
    far = expected_offset(torch.tensor([50.0, -50.0]), torch.zeros(2), torch.full((2,), 0.11), NO_CENTROIDS)
    assert far.tolist() == [-0.5, 0.5]


def test_centroids_move_what_is_far_from_the_mean_outwards() -> None:
    centroids = torch.arange(len(SCALES) * CENTROIDS).reshape(len(SCALES), CENTROIDS) / 1000
    mean, scale = torch.tensor(2.4), torch.tensor(SCALES[7], dtype=torch.float32)
    for value, outward in ((2.0, 0.0), (3.0, 0.021), (1.0, -0.021), (4.0, 0.022), (5.0, 0.023), (90.0, 0.023)):
        plain, moved = (expected_offset(torch.tensor(value), mean, scale, t) for t in (NO_CENTROIDS, centroids))
        assert float(moved - plain) == pytest.approx(outward, abs=1e-6)


def test_centroids_are_those_of_the_weights(tmp_path: Path) -> None:
    """They change pixels, not symbols' tables; weights without them have none."""
    info = store.read_info(DATA / "models/tiny.safetensors")
    net = store.load_file(info).net
    assert not net.centroids.any() and store.CENTROIDS not in read_arrays(info.path)
    shutil.copy(info.path, tmp_path)
    net.centroids[20, 0] = 0.3
    parent = store.read_info(tmp_path / info.path.name)
    store.write_model(tmp_path / "centroids.safetensors", net, {"provenance": {}}, parent)
    other = store.read_info(tmp_path / "centroids.safetensors")
    assert set(read_arrays(other.path)) == {store.CENTROIDS}
    assert other.entropy_id == info.entropy_id and other.synthesis_id != info.synthesis_id
    assert torch.equal(store.load_file(other).net.centroids, net.centroids)


def test_rounding_for_rate_never_costs_more() -> None:
    generator = torch.Generator().manual_seed(0)
    y, mean = 3 * torch.randn(2, 10_000, generator=generator)
    scale = torch.rand(10_000, generator=generator) * 2 + MIN_SCALE
    nearest = torch.round(y)

    def cost(value: torch.Tensor) -> torch.Tensor:
        error = y - value - expected_offset(value, mean, scale, NO_CENTROIDS)
        return gaussian_bits(value, mean, scale) + 8 * error.square()

    chosen = round_for_rate(y, mean, scale, torch.tensor(8.0), NO_CENTROIDS)
    assert bool((cost(chosen) <= cost(nearest)).all())
    assert (chosen - nearest).abs().max() == 1
    assert bool(((chosen - mean).abs() <= (nearest - mean).abs() + 0.5).all())
    assert torch.equal(round_for_rate(y, mean, scale, torch.tensor(1e6), NO_CENTROIDS), nearest)


def test_scale_bound_lets_gradients_raise_but_not_lower() -> None:
    index = torch.full((2,), -9.0, requires_grad=True)
    scale = Prediction(torch.zeros(2), index).scale
    torch.testing.assert_close(scale.detach(), torch.full((2,), MIN_SCALE))
    (scale * torch.tensor([1.0, -1.0])).sum().backward()
    assert index.grad is not None
    assert index.grad[0] == 0 and index.grad[1] < 0


@pytest.mark.parametrize("exact", [True, False])
def test_attention_ignores_masked_keys(exact: bool) -> None:
    q, k, v = (Fixed(x, 5, 511) for x in torch.randint(-200, 201, (3, 2, 5, 8)).float().unbind(0))
    mask, bias = torch.tensor([True, True, False, True, False]), torch.zeros(5, 5)
    some_k, some_v = k._replace(x=k.x[:, mask]), v._replace(x=v.x[:, mask])
    masked = attend(q, k, v, bias, mask, exact)
    torch.testing.assert_close(masked.x, attend(q, some_k, some_v, bias[:, mask], None, exact).x)


def test_hyper_prior_is_a_distribution_and_matches_its_bits() -> None:
    net = CodecModel(CONFIGS["tiny"])
    pmf = net.prior.pmf()
    assert float((pmf.sum(-1) - 1).abs().max()) < 1e-6
    z = torch.full((1, 1, 1, CONFIGS["tiny"].hyper_latent), 2.0)
    bits = net.prior.bits(z, torch.tensor([0.0]))[0, 0, 0]
    torch.testing.assert_close(bits, -torch.log2(pmf[0, :, 63 + 2]).float(), atol=1e-3, rtol=1e-3)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    net = CodecModel(CONFIGS["tiny"])
    torch.nn.init.normal_(net.shortcut.weight, std=0.02)
    for layer in (net.g_a.last, net.g_s.last):
        torch.nn.init.normal_(layer.weight, std=0.01)
    x = torch.rand(2, 64, 128, 3) - 0.5
    out = net(x, torch.tensor([5000.0, 45000.0]))
    (out.y_bits.sum() + out.z_bits.sum() + 1e4 * (out.x_hat - x).square().sum()).backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
