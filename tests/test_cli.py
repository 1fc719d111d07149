"""The command line as a user meets it: processes, files, exit codes, one line per failure."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lic import api, atomic, batch, cli, container
from lic.batch import Job

Run = Callable[..., subprocess.CompletedProcess[bytes]]
SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = ("--model", "tiny", "--device", "cpu")


@pytest.fixture
def png(tmp_path: Path, picture: np.ndarray) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture).save(path)
    return path


@pytest.fixture(scope="session")
def coded() -> bytes:
    """A `.lic` file of the tiny model."""
    y, x = np.mgrid[0:44, 0:70]
    return api.encode(np.stack([3 * x, 5 * y, 60 + x + y], axis=-1).astype(np.uint8), model="tiny", device="cpu")


def failure(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one line that a failed command printed."""
    assert done.returncode == code, done.stderr
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lic: "), lines
    return lines[0]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# ----------------------------------------------------------------------------------------------------
# one picture


def test_encode_and_decode_a_file(lic: Run, tmp_path: Path, png: Path, picture: np.ndarray) -> None:
    encoded = lic("encode", png, "photo.lic", *TINY, "--json")
    assert (encoded.returncode, encoded.stdout) == (0, b"")
    facts = json.loads(encoded.stderr)
    assert facts["bytes_out"] == (tmp_path / "photo.lic").stat().st_size
    assert (facts["width"], facts["height"]) == (70, 44)

    decoded = lic("decode", "photo.lic", "back.ppm", "--json")
    assert (decoded.returncode, decoded.stdout) == (0, b"")
    assert json.loads(decoded.stderr)["symbols_sha256"] == facts["symbols_sha256"]
    back = pixels((tmp_path / "back.ppm").read_bytes())
    assert back.shape == picture.shape
    error = np.mean((back.astype(float) - picture) ** 2)
    assert 10 * np.log10(255**2 / error) == pytest.approx(facts["psnr"], abs=0.1)
    said = lic("encode", png, "photo.lic", *TINY, "-v").stderr.decode()
    assert f"{facts['psnr']} dB" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.ppm", "photo.lic", "photo.png"]


def test_standard_streams_hold_data_and_nothing_else(lic: Run, png: Path, picture: np.ndarray) -> None:
    encoded = lic("encode", "-", "-", *TINY, input=png.read_bytes())
    assert (encoded.returncode, encoded.stderr) == (0, b"")
    assert container.parse(encoded.stdout).header.width == 70
    decoded = lic("decode", "-", "-", input=encoded.stdout)
    assert (decoded.returncode, decoded.stderr) == (0, b"")
    assert Image.open(io.BytesIO(decoded.stdout)).format == "PNG"
    assert pixels(decoded.stdout).shape == picture.shape


@pytest.mark.slow
def test_standard_output_is_clean_on_the_very_first_run(lic: Run, tmp_path: Path, png: Path) -> None:
    first = {**os.environ, "LIC_CACHE_DIR": str(tmp_path / "fresh")}  # the coder has to be compiled
    encoded = lic("encode", png, "-", *TINY, env=first)
    assert encoded.returncode == 0, encoded.stderr
    again = lic("encode", png, "-", *TINY, env=first)
    assert encoded.stdout == again.stdout
    assert container.parse(encoded.stdout).header.width == 70


def test_nothing_that_prints_can_damage_standard_output(lic: Run, png: Path) -> None:
    # A compiler that a library starts writes to descriptor 1 behind Python's back.
    script = (
        "import os, sys; from lic import images, cli; read = images.picture_of\n"
        "def noisy(*a, **k): os.write(1, b'[1/2] c++'); print('built'); return read(*a, **k)\n"
        f"images.picture_of = noisy; cli.main(['encode', {str(png)!r}, '-', '--model', 'tiny'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert container.parse(done.stdout).header.width == 70
    assert b"c++" in done.stderr and b"built" in done.stderr


def test_format_wins_over_suffix(lic: Run, tmp_path: Path, coded: bytes) -> None:
    assert lic("decode", "-", "x.png", "--format", "bmp", input=coded).returncode == 0
    assert Image.open(tmp_path / "x.png").format == "BMP"


def test_quality_changes_the_size(lic: Run, png: Path) -> None:
    sizes = [len(lic("encode", png, "-", "-q", q, *TINY).stdout) for q in (5, 90)]
    assert 0 < sizes[0] < sizes[1]


def test_link_and_permissions_of_the_output_are_kept(lic: Run, tmp_path: Path, coded: bytes) -> None:
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "real.png").chmod(0o640)
    (tmp_path / "link.png").symlink_to("real.png")
    assert lic("decode", "-", "link.png", input=coded).returncode == 0
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").stat().st_mode & 0o777 == 0o640
    assert pixels((tmp_path / "real.png").read_bytes()).shape == (44, 70, 3)


def test_a_batch_of_coded_files_never_replaces_one(lic: Run, tmp_path: Path, coded: bytes) -> None:
    for name in ("a.lic", "b.lic"):  # what the shell makes of *.lic
        (tmp_path / name).write_bytes(coded)
    assert "--output-dir" in failure(lic("decode", "a.lic", "b.lic", "--format", "png"), 2)
    assert (tmp_path / "b.lic").read_bytes() == coded


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exif": b"Exif\0\0garbage"}, "damaged EXIF was left out"),
        ({"icc_profile": b"profile"}, "the colour profile does not fit the samples and was left out"),
    ],
)
def test_metadata_that_is_dropped_is_named(
    lic: Run, tmp_path: Path, picture: np.ndarray, options: dict[str, bytes], named: str
) -> None:
    Image.fromarray(picture).save(tmp_path / "photo.jpg", **options)
    done = lic("encode", "photo.jpg", "a.lic", *TINY)
    assert done.returncode == 0
    assert done.stderr.decode().splitlines() == [f"lic: photo.jpg: {named}"]


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("画" * 83 + ".lic")  # 253 bytes
    for data in (b"first", b"second"):
        atomic.write(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("source", "target"), [("/dev/stdin", "/dev/stdout"), ("/dev/fd/0", "/dev/fd/1")])
def test_other_names_of_the_standard_streams(source: str, target: str) -> None:
    assert batch.single(source, target, lambda out: False, "") == Job("-", "-")


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
def test_dev_stdout_is_standard_output(lic: Run, tmp_path: Path, coded: bytes) -> None:
    with open(tmp_path / "out.ppm", "wb") as out:
        arguments = ("decode", "/dev/stdin", "/dev/stdout", "--format", "ppm")
        done = lic(*arguments, input=coded, capture_output=False, stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert pixels((tmp_path / "out.ppm").read_bytes()).shape == (44, 70, 3)


@pytest.mark.skipif(os.name == "nt", reason="POSIX shell")
@pytest.mark.parametrize("closed", [">&-", pytest.param("<&- >&-", marks=pytest.mark.slow)])
def test_closed_standard_streams_do_not_matter_between_files(lic: Run, tmp_path: Path, png: Path, closed: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        script = f'"$@" {closed}'
        command = ["sh", "-c", script, "sh", sys.executable, "-m", "lic", *arguments]
        return subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, check=False)

    done = run("encode", "photo.png", "a.lic", *TINY)
    assert (done.returncode, done.stderr) == (0, b"")
    assert lic("encode", "photo.png", "-", *TINY).stdout == (tmp_path / "a.lic").read_bytes()
    done = run("decode", "a.lic", "-")
    assert (done.returncode, done.stderr) == (1, b"lic: standard output is closed\n")


def test_no_clobber_leaves_the_output(lic: Run, tmp_path: Path, coded: bytes) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    assert lic("decode", "-", "a.png", "--no-clobber", input=coded).returncode == 0
    assert (tmp_path / "a.png").read_bytes() == b"old"


# ----------------------------------------------------------------------------------------------------
# failures


@pytest.mark.parametrize(
    ("data", "code", "word"),
    [
        (b"", 3, "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), 3, "not a .lic file"),
        (lambda coded: coded[: len(coded) // 2], 3, "truncated"),
        (lambda coded: coded[:60] + bytes([coded[60] ^ 4]) + coded[61:], 3, "damaged"),
        (lambda coded: coded[:3] + b"\xf0" + coded[4:], 4, "newer"),
    ],
    ids=["empty", "foreign", "truncated", "bit flip", "newer"],
)
def test_bad_files_leave_the_old_output(
    lic: Run, tmp_path: Path, coded: bytes, data: bytes | Callable[[bytes], bytes], code: int, word: str
) -> None:
    (tmp_path / "in.lic").write_bytes(data if isinstance(data, bytes) else data(coded))
    (tmp_path / "out.png").write_bytes(b"old")
    for command in (["decode", "in.lic", "out.png"], ["verify", "in.lic"], ["info", "in.lic"]):
        line = failure(lic(*command), code)
        assert line.startswith("lic: in.lic: ") and word in line
    assert (tmp_path / "out.png").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.lic", "out.png"]


def test_a_missing_model_is_named(lic: Run, coded: bytes) -> None:
    done = lic("decode", "-", "out.png", input=coded, env={**os.environ, "LIC_MODELS": ""})
    assert "needs a model that is not installed: tiny" in failure(done, 4)


def test_other_names_of_formats(lic: Run, tmp_path: Path, coded: bytes) -> None:
    (tmp_path / "a.lic").write_bytes(coded)
    assert lic("decode", "a.lic", "picture", "--format", "jpg").returncode == 0
    assert Image.open(tmp_path / "picture").format == "JPEG"
    assert lic("decode", "a.lic", "--output-dir", "back", "--format", "tif").returncode == 0
    assert Image.open(tmp_path / "back" / "a.tif").format == "TIFF"


@pytest.mark.parametrize("set_before", [None, "active"])
def test_threads_that_wait_sleep_unless_told_otherwise(set_before: str | None) -> None:
    code = (
        "import sys; sys.argv = ['lic', '--version']\nfrom lic.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    code += "import os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    variables |= {"OMP_WAIT_POLICY": set_before} if set_before else {}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, check=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{set_before or 'passive'} False"


def test_the_compiler_of_torch_is_left_alone(tmp_path: Path, png: Path) -> None:
    """To import it takes as long as to import torch."""
    code = "import sys; from lic.cli import run; print(run(sys.argv[1:]), 'torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, "encode", str(png), str(tmp_path / "a.lic")]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "0 False\n"


def test_an_unknown_model_is_a_failure(lic: Run, png: Path) -> None:
    assert "no model named 'nonsense'" in failure(lic("encode", png, "a.lic", "--model", "nonsense"), 1)


def test_cuda_is_never_replaced_silently(lic: Run, coded: bytes) -> None:
    done = lic(
        "decode",
        "-",
        "o.png",
        "--device",
        "cuda",
        input=coded,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "--device cuda: CUDA is not available" in failure(done, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "photo.png"],
        ["encode", "photo.png", "other.png"],
        ["encode", "photo.png", "a.lic", "b.lic"],
        ["encode", "photo.png", "a.lic", "-q", "101"],
        ["encode", "photo.png", "a.lic", "-q", "nan"],
        ["encode", "photo.png", "a.lic", "--device", "gpu"],
        ["encode", "photo.png", "a.lic", "--threads", "0"],
        ["encode", "photo.png", "a.lic", "--effort-seconds", "3"],
        ["encode", "photo.png", "a.lic", "--report", "-"],
        ["encode", "photo.png", "a.lic", "-r"],
        ["encode", "-", "--output-dir", "."],
        ["decode", "a.lic", "a.lic"],
        ["decode", "photo.png", "photo.png", "--format", "png"],
        ["decode", "a.lic", "b.lic", "--format", "png"],
        ["decode", "a.lic", "b.LIC", "--format", "png"],
        ["encode", "/dev/stdin", "--output-dir", "."],
        ["encode", "photo.png", "a.lic", "--device", "cuda:x"],
        ["decode", "a.lic", "a.gif"],
        ["decode", "a.lic", "a.png", "--format", "gif"],
        ["nonsense"],
        ["encode", "photo.png", "a.lic", "--nonsense"],
        ["info"],
    ],
    ids=" ".join,
)
def test_usage_errors_come_before_any_work(lic: Run, tmp_path: Path, png: Path, arguments: list[str]) -> None:
    before = png.read_bytes()
    failure(lic(*arguments), 2)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]
    assert png.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["encode", "missing.png", "a.lic"], "missing.png: No such file"),
        (["encode", "photo.png", "folder/a.lic"], "folder/a.lic: its folder does not exist"),
        (["encode", "photo.png", "folder.lic"], "folder.lic: is a folder"),
        (["encode", "text.png", "a.lic"], "text.png: not a picture"),
        (["encode", "float.tif", "a.lic"], "float.tif: floating-point pictures are not supported"),
        (
            ["encode", "photo.png", "a.lic", "--max-pixels", "8191"],
            "photo.png: 70x44, 8192 pixels in units of 64x64, is over",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failing_inputs_and_outputs(lic: Run, tmp_path: Path, png: Path, arguments: list[str], word: str) -> None:
    (tmp_path / "folder.lic").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")
    assert word in failure(lic(*arguments), 1)
    assert not (tmp_path / "a.lic").exists()


def test_pictures_and_files_are_limited_alike(lic: Run, tmp_path: Path, png: Path) -> None:
    for command in (["encode", "photo.png", "a.lic"], ["decode", "a.lic", "b.png"]):
        assert lic(*command, "--max-pixels", "8192").returncode == 0  # 70x44 pixels count as 128x64
    assert "--max-pixels" in failure(lic("decode", "a.lic", "b.png", "--max-pixels", "8191"), 1)


def test_without_arguments_it_helps(lic: Run) -> None:
    done = lic()
    assert b"Commands:" in done.stdout + done.stderr and b"Traceback" not in done.stderr


def test_traceback_only_with_vv(lic: Run) -> None:
    assert b"Traceback" not in lic("info", "missing.lic", "-v").stderr
    done = lic("info", "missing.lic", "-vv")
    assert done.returncode == 1 and b"Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "lic: photo.png: not enough memory"),
        (
            RuntimeError("CUDA out of memory.\nTried to allocate"),
            "lic: photo.png: RuntimeError: CUDA out of memory.",
        ),
        (OSError(28, "No space left on device"), "lic: photo.png: No space left on device"),
        (EOFError("ended"), "lic: photo.png: EOFError: ended"),
    ],
    ids=["memory", "torch", "disk", "end of file"],
)
def test_unexpected_exceptions_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], png: Path, error: Exception, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.chdir(png.parent)
    monkeypatch.setattr(api.Codec, "encode_result", fail)
    assert cli.run(["encode", "photo.png", "a.lic"]) == 1
    assert capfd.readouterr().err.strip() == line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_standard_output_is_one_line(lic: Run, coded: bytes) -> None:
    with open("/dev/full", "wb") as full:
        done = lic("decode", "-", "-", input=coded, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == ["lic: standard input: No space left on device"]


def test_a_failed_write_leaves_the_old_file_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, coded: bytes
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "in.lic").write_bytes(coded)
    (tmp_path / "out.png").write_bytes(b"old")
    monkeypatch.setattr("os.fsync", fail)
    assert cli.run(["decode", str(tmp_path / "in.lic"), str(tmp_path / "out.png")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.lic", "out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


# ----------------------------------------------------------------------------------------------------
# signals, pipes, terminals


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_exits_with_130() -> None:
    script = (
        "import os, signal, sys; from lic import cli, stdio\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "stdio.read_stdin = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main(['info', '-'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 130
    assert b"Traceback" not in done.stderr and b"interrupted" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("command", [["info"], ["decode"]], ids=lambda c: c[0])
def test_a_reader_that_goes_away_is_no_drama(tmp_path: Path, coded: bytes, command: list[str]) -> None:
    (tmp_path / "a.lic").write_bytes(coded)
    read, write = os.pipe()
    os.close(read)
    arguments = [*command, "a.lic", *(["-"] if command == ["decode"] else [])]
    done = subprocess.run(
        [sys.executable, "-m", "lic", *arguments],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode in (1, 128 + signal.SIGPIPE, -signal.SIGPIPE)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_terminals_are_no_place_for_binary_data(lic: Run, coded: bytes) -> None:
    main, terminal = os.openpty()
    try:
        done = lic("decode", "-", "-", input=coded, capture_output=False, stdout=terminal, stderr=subprocess.PIPE)
        assert done.returncode == 2 and b"refusing to write binary data to a terminal" in done.stderr
        done = lic("decode", "-", "a.png", stdin=terminal)
        assert done.returncode == 2 and b"standard input: it is a terminal" in done.stderr
    finally:
        os.close(main)
        os.close(terminal)


# ----------------------------------------------------------------------------------------------------
# batches


def test_batch_mirrors_folders_and_goes_on_after_failures(lic: Run, tmp_path: Path, png: Path) -> None:
    for name in ("in/a.png", "in/sub/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png.read_bytes())
    (tmp_path / "in/broken.png").write_bytes(png.read_bytes()[:60])
    (tmp_path / "in/notes.txt").write_text("no picture, not asked for")

    done = lic("encode", "in", png, "missing.png", "--output-dir", "out", "-r", *TINY)
    assert done.returncode == 1 and done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [os.path.join("in", "broken.png"), "missing.png"]
    made = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert made == ["a.lic", "photo.lic", "sub/b.lic"]

    done = lic("decode", "out", "--output-dir", "back", "--format", "ppm")
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["a.ppm", "photo.ppm"]  # no -r


def test_batch_resumes_with_no_clobber(lic: Run, tmp_path: Path, png: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/photo.lic").write_bytes(b"done before")
    (tmp_path / "second.png").write_bytes(png.read_bytes())
    done = lic("encode", png, "second.png", "--output-dir", "out", "--no-clobber", *TINY)
    assert done.returncode == 0
    assert (tmp_path / "out/photo.lic").read_bytes() == b"done before"
    assert (tmp_path / "out/second.lic").exists()


def test_no_clobber_passes_over_many_files_quickly(tmp_path: Path) -> None:
    for folder, suffix in (("in", "png"), ("out", "lic")):
        (tmp_path / folder).mkdir()
        for i in range(3000):
            (tmp_path / folder / f"{i}.{suffix}").touch()

    start = time.perf_counter()
    assert cli.run(["encode", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out"), "--no-clobber"]) == 0
    assert time.perf_counter() - start < 3  # comparing every file with every other takes longer


def test_name_collisions_are_found_before_any_work(lic: Run, tmp_path: Path, png: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_bytes(b"")
    line = failure(lic("encode", png, "other", "--output-dir", "out", *TINY), 2)
    assert "would both become" in line
    assert not (tmp_path / "out").exists()


def test_an_empty_batch_is_a_failure(lic: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "nothing to do" in failure(lic("encode", "in", "--output-dir", "out"), 1)


def test_a_missing_device_fails_a_batch_once(lic: Run, png: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = lic("encode", png, png.parent, "--output-dir", "o", "--model", "tiny", "--device", "cuda", env=environment)
    assert done.returncode == 2  # the same file twice
    done = lic("encode", png, "x.png", "--output-dir", "o", "--model", "tiny", "--device", "cuda", env=environment)
    assert "CUDA is not available" in failure(done, 1)


# ----------------------------------------------------------------------------------------------------
# the other commands


def test_info(lic: Run, tmp_path: Path, coded: bytes) -> None:
    (tmp_path / "a.lic").write_bytes(coded)
    text = lic("info", "a.lic").stdout.decode()
    assert "70x44 pixels" in text and "tiny" in text and "hyper" in text
    facts = json.loads(lic("info", "a.lic", "--json").stdout)
    assert facts["file"] == "a.lic" and facts["model"] == "tiny" and facts["quality"] == 40
    assert sum(section["bytes"] for section in facts["sections"]) == facts["bytes"] == len(coded)
    assert facts["lambda"] > 0 and len(facts["entropy_id"]) == 8
    assert json.loads(lic("info", ".", "--json").stdout) == facts
    (tmp_path / "empty").mkdir()
    assert "nothing to do: no .lic files; -r" in failure(lic("info", "empty"), 1)
    assert failure(lic("info", ""), 2)


def test_verify(lic: Run, tmp_path: Path, coded: bytes) -> None:
    (tmp_path / "good.lic").write_bytes(coded)
    (tmp_path / "bad.lic").write_bytes(coded[:-1])
    done = lic("verify", "good.lic", "bad.lic")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines()[0] == "good.lic: ok"
    (tmp_path / "folder/sub").mkdir(parents=True)
    for name in ("good.lic", "bad.lic"):
        (tmp_path / name).rename(tmp_path / "folder/sub" / name)
    done = lic("verify", "folder", "-r", "--json")
    bad, good = (json.loads(line) for line in done.stdout.splitlines())
    assert good["ok"] and len(good["symbols_sha256"]) == 64
    assert not bad["ok"] and "truncated" in bad["problem"]


def test_models(lic: Run) -> None:
    assert "tiny" in lic("models").stdout.decode()
    rows = [json.loads(line) for line in lic("models", "--json").stdout.splitlines()]
    tiny = next(row for row in rows if row["name"] == "tiny")
    assert tiny["parameters"] > 0 and tiny["kmac"]["decoder"] > 0 and len(tiny["sha256"]) == 64


@pytest.mark.slow
def test_doctor(lic: Run, tmp_path: Path) -> None:
    done = lic("doctor", "--all", timeout=1200)  # nine models, six ways each
    assert done.returncode == 0, done.stdout
    assert "dB on" in done.stdout.decode() and "everything works" in done.stdout.decode()
    assert "msp: same symbols" in done.stdout.decode()


def test_damaged_weights_exit_codes(lic: Run, tmp_path: Path, png: Path, coded: bytes) -> None:
    data = bytearray((Path(os.environ["LIC_MODELS"]) / "tiny.safetensors").read_bytes())
    data[-5000] ^= 1
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.safetensors").write_bytes(data)
    environment = {**os.environ, "LIC_MODELS": str(tmp_path / "models")}
    assert "damaged" in failure(lic("encode", png, "a.lic", *TINY, env=environment), 1)
    assert "damaged" in failure(lic("decode", "-", "a.png", input=coded, env=environment), 4)


@pytest.mark.slow
def test_the_script_that_checks_a_folder(lic: Run, tmp_path: Path, png: Path, picture: np.ndarray) -> None:
    def check(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / "kodak_check.py"), str(tmp_path), *options, "--device", "cpu"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    (tmp_path / "second.png").write_bytes(png.read_bytes())
    done = check("--qualities", "20,70", "--model", "tiny")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [20, 70]
    sizes = [len(api.encode(picture, q, model="tiny", device="cpu")) for q in (20, 70)]
    assert [row[1] for row in rows] == [2 * size for size in sizes]
    assert all(row[4] > 50 and row[5] > 50 for row in rows)  # megabytes: torch alone takes more
    (tmp_path / "broken.png").write_bytes(png.read_bytes()[:60])
    done = check("--qualities", "20", "--model", "tiny")
    assert done.returncode == 1 and "FAILED" in done.stdout and "broken.png" in done.stdout


def test_what_the_checks_of_doctor_print_is_kept_apart(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy() -> str:
        os.write(1, b"[1/2] c++\n")
        return "built"

    monkeypatch.setattr("lic.coder.backend_info", noisy)
    monkeypatch.setattr("lic.model.store.available", lambda: [])
    cli.run(["doctor"])
    captured = capfd.readouterr()
    assert "coder:      built" in captured.out and "c++" not in captured.out and "c++" in captured.err


def test_doctor_says_what_is_broken(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lic.model.store.available", lambda: [])
    assert cli.run(["doctor"]) == 1
    out = capfd.readouterr().out
    assert "weights:    BROKEN" in out and "packages:   torch" in out


# ----------------------------------------------------------------------------------------------------
# what stays unimported


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["encode", "--help"],
        ["encode", "photo.png", "wrong.suffix"],
        ["encode", "missing.png", "a.lic"],
        ["encode", "text.png", "a.lic"],
        ["encode", "photo.png", "a.lic", "--model", "nonsense"],
        ["encode", "photo.png", "nowhere/a.lic"],
        ["decode", "text.png", "a.png"],
        ["verify", "text.png"],
        ["info", "a.lic"],
        ["models"],
    ],
    ids=" ".join,
)
def test_torch_is_imported_only_to_code(tmp_path: Path, png: Path, coded: bytes, arguments: list[str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "a.lic").write_bytes(coded)
    script = "import sys; from lic import cli; cli.run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_all_commands_and_imports_no_picture_library() -> None:
    script = "import sys; from lic import cli; cli.run(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    for name in ("encode", "decode", "info", "verify", "models", "doctor", "bench", "train", "export"):
        assert f"  {name} " in done.stdout
    assert "'PIL'" not in done.stderr and "'numpy'" not in done.stderr and "'tqdm'" not in done.stderr


@pytest.mark.parametrize("name", ["bench", "train", "export"])
def test_lazy_commands_answer_to_help(lic: Run, name: str) -> None:
    done = lic(name, "--help")
    assert done.returncode == 0 and f"lic {name}" in done.stdout.decode()


def test_export_names_the_commit_of_its_own_checkout_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lic.train import export

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(export, "__file__", str(tmp_path / "lic" / "train" / "export.py"))
    assert export._commit() == "unknown"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert export._commit() == "unknown"  # somebody else's checkout, into which lic was installed
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "lic"\n')
    assert export._commit() == git("rev-parse", "HEAD")
