"""Means, BD-rates and the files that show them: JSON, CSV, Markdown, HTML, plots."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lic.bench.bdrate import Curve, bd_rate, dump_curves, overlap
from lic.bench.measure import Failure, Row, row_fields
from lic.bench.plot import LABELS, png_chart, svg_chart

Table = list[list[str]]  # the first row is the heading

MEANS = (
    "bpp", "psnr", "ms_ssim", "encode_compute_s", "encode_total_s", "decode_compute_s", "decode_total_s",
    "framing_bytes",
)  # fmt: skip

STYLE = """body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}svg{max-width:60em}"""


@dataclass(frozen=True)
class Summary:
    """Means over the pictures at one quality."""

    quality: float
    images: int
    bpp: float
    psnr: float  # mean of the pictures' PSNRs
    ms_ssim: float
    encode_compute_s: float
    encode_total_s: float
    decode_compute_s: float
    decode_total_s: float
    framing_bytes: float
    coder_overhead_percent: float  # stream bytes of all pictures against the model's estimate


@dataclass(frozen=True)
class Comparison:
    """The model's BD-rate against one curve; None and a reason where there is none."""

    reference: str
    psnr: float | None  # percent
    ms_ssim: float | None  # percent
    overlap_db: tuple[float, float] | None  # PSNR that both reach
    note: str
    source: str


@dataclass(frozen=True)
class Report:
    """Everything one run of ``lic bench`` found."""

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Sequence[Row]
    failures: Sequence[Failure]
    summary: Sequence[Summary]
    curve: Curve
    peers: Sequence[Curve]  # measured on the same pictures
    anchors: Sequence[Curve]  # from files
    comparisons: Sequence[Comparison]

    @property
    def curves(self) -> list[Curve]:
        """All of them, the model's first."""
        return [self.curve, *self.peers, *self.anchors]

    @property
    def peak_memory_mb(self) -> float | None:
        """The largest of all rows, in 10^6 bytes."""
        return max((row.peak_memory_mb for row in self.rows if row.peak_memory_mb is not None), default=None)


def make_report(
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    rows: Sequence[Row],
    failures: Sequence[Failure],
    peers: Sequence[Curve],
    anchors: Sequence[Curve],
) -> Report:
    """Means and BD-rates of ``rows``, which come from one model, against ``peers`` and ``anchors``."""
    summary = summarise(rows)
    name = f"lic {rows[0].model}" if rows else "lic"
    source = "" if not rows else f"weights {rows[0].weights_sha256[:16]}, {rows[0].device}"
    points = {key: tuple(getattr(line, key) for line in summary) for key in ("bpp", "psnr", "ms_ssim")}
    curve = Curve(name, **points, source=source)
    comparisons = [compare(curve, reference) for reference in (*peers, *anchors)]
    return Report(config, environment, rows, failures, summary, curve, peers, anchors, comparisons)


def complete_images(rows: Sequence[Row]) -> set[str]:
    """SHA-256 of the pictures that have a row at every quality.

    Means are over these only: a picture that failed somewhere is left out everywhere, since points over
    different pictures make no curve.
    """
    codes = {row.quality_code for row in rows}
    seen: dict[str, set[int]] = {}
    for row in rows:
        seen.setdefault(row.image_sha256, set()).add(row.quality_code)
    return {image for image, done in seen.items() if done == codes}


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Means per quality, in order of quality, over :func:`complete_images`."""
    complete = complete_images(rows)
    columns: dict[int, list[Row]] = {}
    for row in rows:
        if row.image_sha256 in complete:
            columns.setdefault(row.quality_code, []).append(row)
    result = []
    for _, column in sorted(columns.items()):
        means = {key: float(np.mean([getattr(row, key) for row in column])) for key in MEANS}
        estimate = sum(row.estimated_bits for row in column)
        streams = sum((row.bytes - row.framing_bytes) * 8 for row in column)
        overhead = (streams / estimate - 1) * 100 if estimate > 0 else math.nan
        result.append(Summary(column[0].quality, len(column), **means, coder_overhead_percent=overhead))
    return result


def compare(curve: Curve, reference: Curve) -> Comparison:
    """BD-rate of ``curve`` against ``reference`` in both metrics."""
    rates: dict[str, float | None] = {}
    note = ""
    for metric in ("ms_ssim", "psnr"):
        try:
            rates[metric] = bd_rate(reference, curve, metric)
        except ValueError as error:
            rates[metric] = None
            # That many published curves have no MS-SSIM needs no words.
            note = str(error) if metric == "psnr" or reference.ms_ssim else ""
    shared = None if rates["psnr"] is None else overlap(reference, curve)
    return Comparison(reference.name, rates["psnr"], rates["ms_ssim"], shared, note, reference.source)


def summary_table(report: Report) -> Table:
    table = [
        ["quality", "bpp", "PSNR dB", "MS-SSIM", "encode s", "with files", "decode s", "with file",
         "coder overhead", "framing bytes", "images"]
    ]  # fmt: skip
    for line in report.summary:
        table.append([
            f"{line.quality:g}", f"{line.bpp:.4f}", f"{line.psnr:.3f}", f"{line.ms_ssim:.5f}",
            f"{line.encode_compute_s:.3f}", f"{line.encode_total_s:.3f}",
            f"{line.decode_compute_s:.3f}", f"{line.decode_total_s:.3f}",
            f"{line.coder_overhead_percent:+.2f} %", f"{line.framing_bytes:.1f}", str(line.images),
        ])  # fmt: skip
    return table


def comparison_table(report: Report) -> Table:
    table = [["against", "BD-rate PSNR", "BD-rate MS-SSIM", "PSNR shared", "note"]]
    for line in report.comparisons:
        rates = ["" if rate is None else f"{rate:+.2f} %" for rate in (line.psnr, line.ms_ssim)]
        shared = "" if line.overlap_db is None else "{:.1f}..{:.1f} dB".format(*line.overlap_db)
        table.append([line.reference, *rates, shared, line.note])
    return table


def problem_table(report: Report) -> Table:
    """Failures and failed checks, one line each; only a heading if there are none."""
    table = [["image", "quality", "problem"]]
    table += [[failure.image, f"{failure.quality:g}", failure.message] for failure in report.failures]
    table += [[row.image, f"{row.quality:g}", problem] for row in report.rows for problem in row.problems]
    return table


def text_table(table: Table) -> str:
    """Aligned columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The tables for a README or ``docs/``."""
    parts = [f"# {report.curve.name}", _facts_line(report)]
    for title, table in _sections(report):
        head, *body = [[cell.replace("|", "\\|") for cell in row] for row in table]
        rule = ["---", *["---:"] * (len(head) - 1)]
        parts += [f"## {title}", "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])]
    return "\n\n".join(parts) + "\n"


def html_page(report: Report) -> str:
    """One self-contained page: tables and charts."""
    parts = [
        "<!doctype html><meta charset=utf-8>", f"<title>{html.escape(report.curve.name)}</title>",
        f"<style>{STYLE}</style>", f"<h1>{html.escape(report.curve.name)}</h1>",
        f"<p>{html.escape(_facts_line(report))}</p>",
    ]  # fmt: skip
    parts += [svg_chart(report.curves, metric) for metric in LABELS]
    per_image = [["image", "quality", "bytes", "bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s"]]
    for row in report.rows:
        per_image.append([
            row.image, f"{row.quality:g}", str(row.bytes), f"{row.bpp:.4f}", f"{row.psnr:.3f}",
            f"{row.ms_ssim:.5f}", f"{row.encode_compute_s:.3f}", f"{row.decode_compute_s:.3f}",
        ])  # fmt: skip
    facts = [["", ""], *[[key, str(value)] for key, value in {**report.config, **report.environment}.items()]]
    for title, table in [*_sections(report), ("Pictures", per_image), ("Made with", facts)]:
        parts.append(f"<h2>{html.escape(title)}</h2><table>")
        for index, texts in enumerate(table):
            tag = "td" if index else "th"
            cells = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def write(report: Report, folder: Path) -> list[Path]:
    """Write every file of the report into ``folder``; returns the paths, plots only with matplotlib."""
    about = "Means over the pictures of one run of lic bench: bpp of whole files, RGB PSNR in dB, linear MS-SSIM."
    texts = {
        "results.json": json.dumps(_jsonable(report), indent=1, ensure_ascii=False) + "\n",
        "results.csv": _csv(report.rows),
        "curves.json": dump_curves([report.curve], about),
        "report.md": markdown(report),
        "report.html": html_page(report),
    }
    if report.peers:
        texts["peer_curves.json"] = dump_curves(report.peers, about)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    plots = [path for metric in LABELS if png_chart(report.curves, metric, path := folder / f"{metric}.png")]
    return [*(folder / name for name in texts), *plots]


def _sections(report: Report) -> list[tuple[str, Table]]:
    sections = [("Means", summary_table(report))]
    if report.comparisons:
        sections.append(("BD-rate: bits against each codec at equal quality", comparison_table(report)))
    if len(problems := problem_table(report)) > 1:
        sections.append(("Problems", problems))
    return sections


def _facts_line(report: Report) -> str:
    facts = report.environment
    memory = ""
    if report.peak_memory_mb is not None:
        memory = f", peak memory of the measuring process (encoder, decoder, metrics) {report.peak_memory_mb:.0f} MB"
    return f"{report.curve.source}; {facts.get('date')}, {facts.get('cpu')}, {facts.get('threads')} threads{memory}"


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, row_fields(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "problems": "; ".join(row.problems)} for row in rows)
    return buffer.getvalue()


def _jsonable(report: Report) -> dict[str, Any]:
    summary = [asdict(line) for line in report.summary]
    for line in summary:
        if math.isnan(line["coder_overhead_percent"]):
            line["coder_overhead_percent"] = None
    return {
        "config": dict(report.config),
        "environment": dict(report.environment),
        "summary": summary,
        "bd_rate": [asdict(line) for line in report.comparisons],
        "failures": [asdict(failure) for failure in report.failures],
        "images": [asdict(row) for row in report.rows],
    }
