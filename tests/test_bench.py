"""lic.bench: metrics, BD-rate, peers, measuring through files, the report and the command."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lic.bench import codec as bench_codec
from lic.bench.bdrate import Curve, bd_rate, dump_curves, load_curves, overlap
from lic.bench.cli import command
from lic.bench.measure import Failure, RowStore, measure
from lic.bench.metrics import MAX_PSNR, ms_ssim, ms_ssim_db, psnr
from lic.bench.peers import PEERS, Peer, PeerCache, measure_peer
from lic.bench.pictures import find
from lic.bench.plot import svg_chart
from lic.bench.report import summarise
from lic.errors import LicError, UsageError
from lic.quality import code_of, step_of


def photo(width: int = 48, height: int = 40, seed: int = 0) -> np.ndarray:
    """Smooth colours with some texture, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = [128 + 90 * np.sin(x / (5 + c) + seed) * np.cos(y / (7 - c)) for c in range(3)]
    return np.clip(np.stack(smooth, -1) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


# --- metrics ---------------------------------------------------------------------------------------


def test_psnr_of_a_known_error() -> None:
    a = np.full((4, 6, 3), 100, np.uint8)
    assert psnr(a, a + 5) == pytest.approx(10 * math.log10(255**2 / 25))
    assert psnr(a, np.full_like(a, 90)) == pytest.approx(10 * math.log10(255**2 / 100))  # no wrap-around


def test_psnr_of_equal_pictures_is_finite() -> None:
    assert psnr(photo(), photo()) == MAX_PSNR


@pytest.mark.parametrize("metric", [psnr, ms_ssim])
def test_metrics_refuse_unequal_arrays(metric) -> None:
    with pytest.raises(ValueError, match="uint8"):
        metric(photo(48, 40), photo(40, 48))
    with pytest.raises(ValueError, match="uint8"):
        metric(photo().astype(np.float32), photo())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_ms_ssim_is_one_for_equal_and_symmetric_at_any_size(width: int, height: int, seed: int) -> None:
    a, b = photo(width, height, seed), photo(width, height, seed + 1)
    assert ms_ssim(a, a) == pytest.approx(1)
    assert 0 <= ms_ssim(a, b) <= 1
    assert ms_ssim(a, b) == pytest.approx(ms_ssim(b, a))


def test_ms_ssim_falls_with_noise_and_forgives_brightness() -> None:
    a = photo(192, 176)
    noise = np.random.default_rng(1).normal(0, 1, a.shape)
    values = [ms_ssim(a, np.clip(a + s * noise, 0, 255).astype(np.uint8)) for s in (2, 8, 25, 60)]
    assert values == sorted(values, reverse=True)
    brighter = np.clip(a.astype(int) + 8, 0, 255).astype(np.uint8)
    assert ms_ssim(a, brighter) > values[1]  # noise of the same mean square error


def test_ms_ssim_agrees_with_the_usual_implementation() -> None:
    # pytorch_msssim 1.0.0 in float64 on this deterministic pair (even sizes at every scale)
    y, x = np.mgrid[:192, :256]
    a = np.stack([(x * 3 + y * 5) % 256, (x * y) % 256, (x + 2 * y) % 256], -1).astype(np.uint8)
    b = np.clip(a.astype(int) + ((x * 7 + y * 13) % 41 - 20)[..., None], 0, 255).astype(np.uint8)
    assert ms_ssim(a, b) == pytest.approx(0.9640825, abs=1e-5)


def test_ms_ssim_db() -> None:
    assert ms_ssim_db(0.99) == pytest.approx(20)
    assert math.isfinite(ms_ssim_db(1.0))


# --- BD-rate ---------------------------------------------------------------------------------------

ANCHOR = Curve("anchor", (0.1, 0.25, 0.5, 1.0, 2.0), (27.0, 30.0, 33.0, 36.5, 40.0), (0.9, 0.95, 0.97, 0.99, 0.995))


def scaled(factor: float) -> Curve:
    return replace(ANCHOR, name="test", bpp=tuple(factor * rate for rate in ANCHOR.bpp))


@given(st.floats(0.1, 10))
def test_bd_rate_of_a_constant_factor_is_exact(factor: float) -> None:
    for metric in ("psnr", "ms_ssim"):
        assert bd_rate(ANCHOR, scaled(factor), metric) == pytest.approx((factor - 1) * 100, abs=1e-6)


def test_ten_percent_more_bits_is_plus_ten() -> None:
    assert bd_rate(ANCHOR, scaled(1.1)) == pytest.approx(10.0)


def test_bd_rate_is_antisymmetric_in_log_rate() -> None:
    test = Curve("test", (0.15, 0.4, 0.9, 1.7), (28.0, 31.5, 35.0, 38.0))
    forth, back = bd_rate(ANCHOR, test), bd_rate(test, ANCHOR)
    assert (1 + forth / 100) * (1 + back / 100) == pytest.approx(1)


def test_bd_rate_of_straight_lines_over_their_overlap() -> None:
    # log-rate linear in PSNR: a doubles every 6 dB, b every 3 dB, equal at 30 dB; overlap 30..36 dB.
    a = Curve("a", (0.5, 1, 2, 4), (24, 30, 36, 42))
    b = Curve("b", (1, 2, 4), (30, 33, 36))
    assert overlap(a, b) == (30, 36)
    assert bd_rate(a, b) == pytest.approx((2**0.5 - 1) * 100)  # mean of log2: 1 - 0.5


def test_order_of_the_points_does_not_matter() -> None:
    backwards = Curve("b", scaled(0.8).bpp[::-1], ANCHOR.psnr[::-1] if ANCHOR.psnr else None)
    assert bd_rate(ANCHOR, backwards) == pytest.approx(-20)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (Curve("t", (0.01, 0.02), (10, 12)), "no overlap"),
        (Curve("t", (0.1,), (30,)), "fewer than two"),
        (Curve("t", (0.1, 0.2, 0.3), (30, 29, 33)), "does not grow"),
        (Curve("t", (0.1, 0.1, 0.3), (28, 29, 33)), "does not grow"),
        (Curve("t", (0.0, 0.1, 0.3), (28, 29, 33)), "does not grow"),
        (Curve("t", (0.1, 0.2), None), "has no psnr"),
    ],
)
def test_bd_rate_refuses(test: Curve, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bd_rate(ANCHOR, test)


def test_curves_survive_a_file(tmp_path: Path) -> None:
    only_ssim = Curve("s", (0.1, 0.2), None, (0.9, 0.95), "paper")
    path = tmp_path / "curves.json"
    path.write_text(dump_curves([ANCHOR, only_ssim], "about"), encoding="utf-8")
    assert load_curves(path) == [ANCHOR, only_ssim]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"curves": 3}', '{"curves": {"a": {}}}', '{"curves": {"a": {"bpp": [1], "psnr": [1, 2]}}}',
     '{"curves": {"a": {"bpp": [NaN, 1], "psnr": [1, 2]}}}'],
)  # fmt: skip
def test_a_bad_curve_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(LicError, match=r"bad\.json"):
        load_curves(tmp_path / "bad.json")
    with pytest.raises(LicError, match=r"none\.json"):
        load_curves(tmp_path / "none.json")


# --- pictures --------------------------------------------------------------------------------------


def save(path: Path, rgb: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path)
    return path


def test_find_takes_files_and_folders_each_once(tmp_path: Path) -> None:
    a, b = save(tmp_path / "b.png", photo()), save(tmp_path / "a.png", photo(seed=1))
    (tmp_path / "notes.txt").write_text("no picture")
    assert [picture.path for picture in find([a, tmp_path])] == [a, b]
    with pytest.raises(UsageError, match="no such file"):
        find([tmp_path / "gone.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no pictures"):
        find([tmp_path / "empty"])


def test_load_gives_upright_8_bit_rgb_and_refuses_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn
    Image.fromarray(photo(20, 10)).save(tmp_path / "turned.png", exif=exif)
    assert find([tmp_path / "turned.png"])[0].load().shape == (20, 10, 3)
    save(tmp_path / "deep.png", np.arange(12, dtype=np.uint16).reshape(3, 4))
    deep = find([tmp_path / "deep.png"])[0].load()
    assert (deep.shape, deep.dtype) == ((3, 4, 3), np.uint8)
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGBA", (4, 3)).save(tmp_path / "clear.png")
    for name in ("clear.png", "text.png"):
        with pytest.raises(LicError, match=name):
            find([tmp_path / name])[0].load()


# --- peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.available()], ids=lambda peer: peer.name)
def test_peers_spend_more_bits_on_more_quality(tmp_path: Path, peer: Peer) -> None:
    pictures = find([save(tmp_path / "a.png", photo(64, 64))])
    few = replace(peer, qualities=(10, 50, 90))
    curve = measure_peer(few, pictures, PeerCache(tmp_path / "peers.json"))
    assert curve.psnr is not None and curve.ms_ssim is not None
    assert list(curve.bpp) == sorted(curve.bpp) and list(curve.psnr) == sorted(curve.psnr)
    assert "Pillow" in curve.source


def test_peer_cache_measures_once_and_survives_damage(tmp_path: Path, monkeypatch) -> None:
    (picture,) = find([save(tmp_path / "a.png", photo())])
    peer = replace(PEERS[0], qualities=(20, 80))
    cache = tmp_path / "peers.json"
    first = PeerCache(cache).measure(peer, picture)

    def no_encode(*args: object) -> bytes:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(Peer, "encode", no_encode)
        assert PeerCache(cache).measure(peer, picture) == first
        with pytest.raises(AssertionError):  # other settings are another measurement
            PeerCache(cache).measure(replace(peer, options={}), picture)
    cache.write_text("[{")
    assert PeerCache(cache).measure(peer, picture) == first


def test_peer_bits_are_those_of_the_file(tmp_path: Path) -> None:
    (picture,) = find([save(tmp_path / "a.png", photo(50, 30))])
    (row,) = PeerCache(tmp_path / "peers.json").measure(replace(PEERS[0], qualities=(50,)), picture)
    Image.fromarray(photo(50, 30)).save(tmp_path / "a.jpg", quality=50, subsampling="4:2:0", optimize=True)
    assert row.bytes == (tmp_path / "a.jpg").stat().st_size
    assert row.bpp == pytest.approx(row.bytes * 8 / 1500)


# --- measuring through files -----------------------------------------------------------------------

FRAMING = 7


@dataclass
class FakeCodec:
    """Uniform quantisation packed by zlib, with switches that break it."""

    name: str = "fake"
    weights_sha256: str = "0" * 64
    device: str = "cpu"
    threads: int = 1
    wrong_pixels: bool = False
    wrong_symbols: bool = False
    fat_file: bool = False
    refuse: str = ""  # SHA-256 of the pixels to refuse
    encoded: int = 0

    def encode(self, rgb: np.ndarray, quality_code: int) -> SimpleNamespace:
        import zlib

        self.encoded += 1
        if hashlib.sha256(rgb).hexdigest() == self.refuse:
            raise LicError("refused")
        step = step_of(quality_code)
        symbols = np.round(rgb / step).astype(np.int16)
        stream = zlib.compress(symbols.tobytes(), 9)
        container = SimpleNamespace(tiles=((stream,),), shape=rgb.shape, step=step)
        return SimpleNamespace(
            container=container, reconstruction=self._pixels(symbols, step),
            estimated_bits=len(stream) * (4.0 if self.fat_file else 8.0),
            symbols_sha256=hashlib.sha256(symbols).hexdigest(),
        )  # fmt: skip

    def decode(self, container: SimpleNamespace) -> SimpleNamespace:
        import zlib

        data = zlib.decompress(container.tiles[0][0])
        symbols = np.frombuffer(data, np.int16).reshape(container.shape)
        rgb = self._pixels(symbols, container.step)
        if self.wrong_pixels:
            rgb = rgb.copy()
            rgb[0, 0, 0] ^= 1
        digest = "" if self.wrong_symbols else hashlib.sha256(symbols).hexdigest()
        return SimpleNamespace(rgb=rgb, symbols_sha256=digest)

    def pack(self, container: SimpleNamespace) -> bytes:
        self._shape, self._step = container.shape, container.step  # a real container holds them
        return bytes(FRAMING) + container.tiles[0][0]

    def parse(self, data: bytes) -> SimpleNamespace:
        return SimpleNamespace(tiles=((data[FRAMING:],),), shape=self._shape, step=self._step)

    @staticmethod
    def _pixels(symbols: np.ndarray, step: float) -> np.ndarray:
        return np.clip(np.round(symbols * step), 0, 255).astype(np.uint8)


CODES = [code_of(q) for q in (30, 60, 90)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of one name in two folders."""
    save(tmp_path / "in" / "x.png", photo())
    save(tmp_path / "more" / "x.png", photo(seed=1))
    (tmp_path / "out").mkdir()
    return tmp_path


def both(folder: Path) -> list:
    return find([folder / "in", folder / "more"])


def test_rows_come_from_the_files(folder: Path) -> None:
    rows, failures = measure(FakeCodec(), both(folder), CODES, folder / "out")
    assert not failures and not any(row.problems for row in rows)
    assert len(rows) == 6
    files = {path.stat().st_size for path in (folder / "out" / "files").rglob("*.lic")}
    assert {row.bytes for row in rows} == files and len(files) == 6
    for row in rows:
        assert (row.width, row.height, row.streams, row.framing_bytes) == (48, 40, 1, FRAMING)
        assert row.bpp == pytest.approx(row.bytes * 8 / (48 * 40))
        assert 0 <= row.decode_compute_s <= row.decode_total_s
        assert 0 <= row.encode_compute_s <= row.encode_total_s


def test_a_second_run_measures_only_what_is_missing(folder: Path) -> None:
    out = folder / "out"
    first, _ = measure(FakeCodec(), both(folder)[:1], CODES[:2], out)
    with (out / "measurements.jsonl").open("a") as file:
        file.write('{"image": "torn by a kill')
    codec = FakeCodec()
    rows, _ = measure(codec, both(folder), CODES, out)
    assert codec.encoded == 4 + 1  # and the warm-up
    assert [row for row in rows if row in first] == first
    idle = FakeCodec()
    assert measure(idle, both(folder), CODES, out)[0] == rows
    assert idle.encoded == 0


def test_other_weights_devices_and_threads_are_measured_anew(folder: Path) -> None:
    measure(FakeCodec(), both(folder), CODES[:1], folder / "out")
    for change in ({"weights_sha256": "1" * 64}, {"threads": 2}, {"device": "cuda:0"}):
        codec = FakeCodec(**change)
        measure(codec, both(folder), CODES[:1], folder / "out")
        assert codec.encoded == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"wrong_pixels": True}, "pixels differ"),
        ({"wrong_symbols": True}, "symbols differ"),
        ({"fat_file": True}, "bytes, at most"),
    ],
)
def test_faults_of_a_codec_are_found_and_measured_again(folder: Path, fault: dict, message: str) -> None:
    rows, _ = measure(FakeCodec(**fault), both(folder)[:1], CODES[:1], folder / "out")
    assert len(rows[0].problems) == 1 and message in rows[0].problems[0]
    rows, _ = measure(FakeCodec(), both(folder)[:1], CODES[:1], folder / "out")
    assert not rows[0].problems


def test_a_refused_picture_is_a_failure_and_leaves_the_means(folder: Path) -> None:
    save(folder / "in" / "z.png", photo(seed=5))
    codec = FakeCodec(refuse=hashlib.sha256(photo(seed=5)).hexdigest())
    rows, failures = measure(codec, both(folder), CODES, folder / "out")
    assert [failure.message for failure in failures] == ["refused"] * 3
    assert isinstance(failures[0], Failure) and failures[0].image == "z"
    assert {line.images for line in summarise(rows)} == {2}


def test_an_empty_or_foreign_store_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    path.write_text('[]\n{"image": "a"}\n\n3\n')
    (picture,) = find([save(tmp_path / "a.png", photo())])
    assert RowStore(path).get(picture, 1, FakeCodec()) is None


# --- summary and report ----------------------------------------------------------------------------


def test_summary_is_the_mean_of_psnrs_over_complete_pictures(folder: Path) -> None:
    rows, _ = measure(FakeCodec(), both(folder), CODES, folder / "out")
    line = summarise(rows)[0]
    assert line.psnr == pytest.approx(np.mean([row.psnr for row in rows if row.quality == line.quality]))
    assert line.framing_bytes == FRAMING
    assert line.coder_overhead_percent == pytest.approx(0)
    partial = summarise(rows[:-1])  # the second picture lacks the last quality
    assert {entry.images for entry in partial} == {1}
    assert partial[0].psnr == pytest.approx(rows[0].psnr)


def test_chart_shows_every_curve_and_escapes_names() -> None:
    svg = svg_chart([ANCHOR, replace(scaled(2), name="<b> & c"), Curve("no psnr", (1, 2), None)], "psnr")
    ElementTree.fromstring(svg)
    assert svg.count("<polyline") == 2
    assert "&lt;b&gt; &amp; c" in svg and "no psnr" not in svg
    assert svg_chart([], "psnr") == ""


@pytest.fixture
def run(folder: Path, monkeypatch):
    """The command on two pictures with a codec of the test's choice."""

    def run(codec: FakeCodec, *options: str):
        monkeypatch.setattr(bench_codec, "open_codec", lambda name, device, threads, tune: codec)
        paths = [str(folder / "in"), str(folder / "more"), "--output-dir", str(folder / "out")]
        return CliRunner().invoke(command, [*paths, "--qualities", "30,60,90", *options])

    return run


def test_command_writes_a_whole_report(folder: Path, run) -> None:
    anchors = folder / "anchors.json"
    published = [replace(ANCHOR, name="published"), replace(ANCHOR, name="WebP")]
    anchors.write_text(dump_curves(published, ""), encoding="utf-8")
    result = run(FakeCodec(), "--no-peers", "--anchor-file", str(anchors))
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    out = folder / "out"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["qualities"] == [30, 60, 90]
    assert {"cpu", "date", "threads", "python"} <= set(results["environment"])
    assert len(results["images"]) == 6 and len(results["summary"]) == 3
    assert [line["reference"] for line in results["bd_rate"]] == ["published", "WebP (anchors.json)"]
    with (out / "results.csv").open(newline="") as file:
        assert [float(row["psnr"]) for row in csv.DictReader(file)] == [image["psnr"] for image in results["images"]]
    (curve,) = load_curves(out / "curves.json")  # a later run can take it as an anchor
    assert curve.bpp == pytest.approx([line["bpp"] for line in results["summary"]], abs=1e-6)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "http-equiv" not in page and 'src="' not in page
    assert "published" in (out / "report.md").read_text(encoding="utf-8")


def test_command_compares_with_peers(folder: Path, run, monkeypatch) -> None:
    jpeg = replace(PEERS[0], qualities=(20, 60, 95))
    absent = replace(jpeg, name="gone", feature="webp_of_tomorrow")
    monkeypatch.setattr("lic.bench.peers.PEERS", (jpeg, absent))
    monkeypatch.setattr(Peer, "available", lambda peer: peer.name != "gone")
    result = run(FakeCodec())
    assert result.exit_code == 0
    assert "left out: gone" in result.stderr
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert [line["reference"] for line in results["bd_rate"]] == ["JPEG 4:2:0"]
    assert [curve.name for curve in load_curves(folder / "out" / "peer_curves.json")] == ["JPEG 4:2:0"]


def test_command_goes_on_after_an_unreadable_picture(folder: Path, run, monkeypatch) -> None:
    (folder / "in" / "bad.png").write_text("no picture")
    monkeypatch.setattr("lic.bench.peers.PEERS", (replace(PEERS[0], qualities=(20, 95)),))
    result = run(FakeCodec())
    assert isinstance(result.exception, LicError) and "3 problems" in str(result.exception)
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert {line["images"] for line in results["summary"]} == {2}
    assert len(results["bd_rate"]) == 1 and len(results["failures"]) == 3


def test_command_lists_problems_and_fails(folder: Path, run) -> None:
    result = run(FakeCodec(wrong_pixels=True), "--no-peers", "--quiet")
    assert isinstance(result.exception, LicError) and result.exception.exit_code == 1
    assert result.stderr.count("pixels differ") == 6
    assert "pixels differ" in (folder / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("qualities", ["", "101", "-1", "a", "10,,20", "nan"])
def test_bad_qualities_are_usage_errors(folder: Path, qualities: str) -> None:
    arguments = [str(folder / "in"), "--output-dir", str(folder / "o"), "--qualities", qualities]
    assert CliRunner().invoke(command, arguments).exit_code == 2
    assert not (folder / "o").exists()


def test_arguments_are_checked_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom lic.bench.cli import command\nfrom lic.errors import UsageError\n"
        "try: command(['gone.png', '--output-dir', 'out'], standalone_mode=False)\n"
        "except UsageError: pass\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_real_model_passes_the_checks(tmp_path: Path, monkeypatch) -> None:
    import torch

    from lic.model import store
    from lic.model.codec import CodecModel
    from lic.model.config import CONFIGS

    torch.manual_seed(0)
    net = CodecModel(CONFIGS["tiny"])
    with net.calibration(), torch.no_grad():
        net.visit()
    net.freeze()
    store.write_model(tmp_path / "tiny.safetensors", net, {"provenance": {}})
    monkeypatch.setenv("LIC_MODELS", str(tmp_path))
    codec = bench_codec.open_codec("tiny", "cpu", None)
    tuned = bench_codec.open_codec("tiny", "cpu", None, "ms-ssim")  # which has no weights of its own
    assert (codec.name, tuned.name, tuned.weights_sha256) == ("tiny", "tiny-ms-ssim", codec.weights_sha256)
    pictures = find([save(tmp_path / "in" / "a.png", photo(70, 90))])
    rows, failures = measure(codec, pictures, CODES[:2], tmp_path)
    assert not failures and not any(row.problems for row in rows)
    with pytest.raises(LicError, match="no model"):
        bench_codec.open_codec("absent", "cpu", None)
