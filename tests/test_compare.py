"""`lic compare`: one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import lic as package
from lic import api, cli

Run = Callable[..., subprocess.CompletedProcess[bytes]]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class Page(HTMLParser):
    """The pictures, the cells of the table and all references of a page."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.images: list[Image.Image] = []
        self.cells: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self._cell = False
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        facts = dict(attributes)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            kind, _, text = (facts["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(text))))
        self._cell = tag == "td"
        if self._cell:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells[-1] += data.rstrip("\n")

    @property
    def rows(self) -> list[list[str]]:
        """Name, bytes, bpp and PSNR of each picture."""
        return [self.cells[start + 3 : start + 7] for start in range(0, len(self.cells), 7)]


@pytest.fixture
def files(tmp_path: Path, picture: np.ndarray) -> list[str]:
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "b.lic").write_bytes(api.encode(picture, 50, model="tiny", device="cpu"))
    Image.fromarray(picture).save(tmp_path / "c.bmp")
    return ["a.png", "b.lic", "c.bmp"]


def test_a_page_holds_the_pictures_and_their_facts(lic: Run, tmp_path: Path, files: list[str]) -> None:
    done = lic("compare", *files, "--output", "page.html", "--device", "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"wrote page.html\n")
    page = Page((tmp_path / "page.html").read_bytes())
    original = np.asarray(Image.open(tmp_path / "a.png"))
    decoded = np.asarray(package.decode((tmp_path / "b.lic").read_bytes(), device="cpu"))
    for image, expected in zip(page.images, (original, decoded, original), strict=True):
        assert np.array_equal(np.asarray(image), expected)
    sizes = [(tmp_path / name).stat().st_size for name in files]
    psnrs = ["", f"{api.psnr(original, decoded):.2f} dB", "identical"]
    assert page.rows == [
        [name, f"{size:,}", f"{8 * size / (44 * 70):.3f}", value]
        for name, size, value in zip(files, sizes, psnrs, strict=True)
    ]


def test_a_page_refers_to_nothing_outside(lic: Run, files: list[str]) -> None:
    done = lic("compare", *files, "--output", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    page = Page(done.stdout)
    assert len(page.references) == 3 and all(text.startswith("data:") for text in page.references)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    text = re.sub(rb'"data:[^"]*"', b"", done.stdout)
    assert not re.search(rb"https?:|url\(|@import|fetch\(|import ", text)


def test_the_default_output(lic: Run, tmp_path: Path, files: list[str]) -> None:
    assert lic("compare", *files[:2], "--quiet").stderr == b""
    page = tmp_path / "compare.html"
    before = page.read_bytes()
    page.write_bytes(b"old")
    assert lic("compare", *files[:2], "--no-clobber").returncode == 0
    assert page.read_bytes() == b"old"
    assert lic("compare", *files[:2]).returncode == 0
    assert page.read_bytes() == before


def test_modes_depths_and_private_metadata(lic: Run, tmp_path: Path) -> None:
    y, x = np.mgrid[0:20, 0:30]
    exif = Image.Exif()
    exif[271] = "a camera"
    Image.fromarray((8 * x).astype(np.uint8)).convert("RGB").save(
        tmp_path / "a.png", icc_profile=SRGB, exif=exif.tobytes()
    )
    Image.fromarray((8 * x).astype(np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray((2056 * x).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([8 * x, 9 * y], -1).astype(np.uint8), "LA").save(tmp_path / "alpha.png")
    done = lic("compare", "a.png", "gray.png", "deep.png", "alpha.png", "-o", "-")
    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert [image.mode for image in page.images] == ["RGB", "L", "L", "LA"]
    assert [row[3] for row in page.rows] == ["", "identical", "identical", ""]
    assert page.images[0].info["icc_profile"] == SRGB
    assert "exif" not in page.images[0].info


def test_names_are_text(lic: Run, tmp_path: Path, files: list[str]) -> None:
    names = ['"><script>alert(1)&amp;', "{style} é.png"]
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes((tmp_path / "a.png").read_bytes())
    done = lic("compare", *names, os.fsdecode(odd), "-o", "-")
    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert [row[0] for row in page.rows[:2]] == names and page.tags.count("script") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a.png"], 2, "at least two"),
        (["a.png", "b.lic", "-o", "c.bmp"], 2, "must end in .html"),
        (["a.png", "missing.png"], 1, "missing.png: "),
        (["a.png", "b.lic", "-o", "nowhere/x.html"], 1, "folder"),
        (["a.png", "small.png"], 1, "small.png has 5x6 pixels and a.png 70x44"),
        (["a.png", "cut.lic"], 3, "cut.lic: truncated"),
        (["a.png", "c.bmp", "--max-pixels", "3079"], 1, "a.png: "),
    ],
)
def test_failures_are_one_line(
    lic: Run, tmp_path: Path, files: list[str], arguments: list[str], code: int, words: str
) -> None:
    Image.new("RGB", (5, 6)).save(tmp_path / "small.png")
    (tmp_path / "cut.lic").write_bytes((tmp_path / "b.lic").read_bytes()[:-9])
    done = lic("compare", *arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr.decode()
    assert not list(tmp_path.glob("*.html"))


def test_nothing_is_written_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.run(["compare", *files, "-o", "-"]) == 2
    assert "terminal" in capsys.readouterr().err
