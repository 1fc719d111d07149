"""``lic bench``: arguments and messages only. Nothing heavy is imported until the arguments are checked."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from lic.errors import LicError
from lic.options import device_options
from lic.quality import TUNES, Tune, code_of, quality_of

if TYPE_CHECKING:
    from tqdm import tqdm

    from lic.bench.measure import Failure, Row

DEFAULT_QUALITIES = "10,25,40,55,70,85"


def _quality_codes(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return sorted({code_of(float(part)) for part in value.split(",")})
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _verbosity(context: click.Context, parameter: click.Parameter, value: int) -> None:
    if value:
        logging.getLogger("lic").setLevel(logging.INFO if value == 1 else logging.DEBUG)


@click.command("bench")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE_OR_DIR...", type=click.Path(path_type=Path))
@click.option(
    "--output-dir", required=True, metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="Where results go; a second run with the same DIR measures only what is missing.",
)  # fmt: skip
@click.option("--model", default="base", show_default=True, metavar="NAME")
@click.option(
    "--tune", type=click.Choice(TUNES), default=TUNES[0], show_default=True, help="As of lic encode, without effort."
)
@click.option(
    "--qualities", default=DEFAULT_QUALITIES, show_default=True, callback=_quality_codes, metavar="Q,Q,...",
    help="Values of -q, 0 to 100.",
)  # fmt: skip
@device_options
@click.option("--peers/--no-peers", default=True, help="Also measure JPEG, WebP and AVIF.")
@click.option(
    "--anchor-file", multiple=True, metavar="JSON", type=click.Path(path_type=Path),
    help="Published or earlier curves of the same pictures, as in curves.json. May be repeated.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="Errors only, no progress.")
@click.option("-v", "--verbose", count=True, expose_value=False, callback=_verbosity, help="Say more; -vv: tracebacks.")
def command(
    images: tuple[Path, ...],
    output_dir: Path,
    model: str,
    tune: Tune,
    qualities: list[int],
    device: str,
    threads: int | None,
    peers: bool,
    anchor_file: tuple[Path, ...],
    quiet: bool,
) -> None:
    """Rate, distortion and speed of a model on real files, beside other codecs.

    Every picture is encoded to a .lic file and decoded from it at every quality. DIR receives report.html,
    report.md, results.json, results.csv, curves.json, plots and the files themselves. Exit code 1 if a
    file fails: decoded pixels differ from the encoder's, or it is larger than the model's estimate allows.
    """
    try:
        from tqdm import tqdm

        from lic.bench import measure, pictures, report
        from lic.bench.bdrate import load_curves
        from lic.bench.codec import open_codec
        from lic.bench.peers import PEERS, PeerCache, measure_peer
    except ModuleNotFoundError as error:
        raise LicError(f"lic bench needs {error.name}, which is not installed") from error

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    found = pictures.find(images)
    anchors = []
    taken = {peer.name for peer in PEERS}
    for path in anchor_file:
        for curve in load_curves(path):
            clash = curve.name in taken
            anchors.append(replace(curve, name=f"{curve.name} ({path.name})") if clash else curve)
            taken.add(curve.name)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LicError(f"{output_dir}: {error.strerror or error}") from error
    codec = open_codec(model, device, threads, tune)

    def on_row(row: Row | Failure, reused: bool) -> None:
        if not quiet:
            tqdm.write(_line(row, reused), file=sys.stderr)
        bar.update()

    with _bar(len(found) * len(qualities), codec.name, quiet) as bar:
        rows, failures = measure.measure(codec, found, qualities, output_dir, on_row)

    peer_curves = []
    complete = report.complete_images(rows)
    measured = [picture for picture in found if picture.sha256 in complete]
    if peers and measured:
        with _bar(len(measured) * len(PEERS), "peers", quiet) as bar:
            cache = PeerCache(output_dir / "peers.json")
            for peer in PEERS:
                try:
                    peer_curves.append(measure_peer(peer, measured, cache, bar.update))
                except LicError as error:
                    say(f"left out: {error}")

    config = {
        "images": [str(picture.path) for picture in found],
        "qualities": [quality_of(code) for code in qualities],
        "model": codec.name,
        "weights_sha256": codec.weights_sha256,
        "anchor_files": list(map(str, anchor_file)),
    }
    result = report.make_report(config, measure.environment(codec), rows, failures, peer_curves, anchors)
    written = report.write(result, output_dir)
    say("\n" + report.text_table(report.summary_table(result)))
    if result.comparisons:
        say("\n" + report.text_table(report.comparison_table(result)))
    if result.peak_memory_mb is not None:
        say(f"\npeak memory of this process (encoder, decoder and metrics): {result.peak_memory_mb:.0f} MB")
    if not any(path.suffix == ".png" for path in written):
        say("no PNG plots: they need matplotlib (report.html has the charts)")
    say(f"report: {output_dir / 'report.html'}")
    problems = report.problem_table(result)[1:]
    for image, quality, problem in problems:
        click.echo(f"{image} -q {quality}: {problem}", err=True)
    if problems:
        raise LicError(f"{len(problems)} problems in {len(found) * len(qualities)} files, listed above")


def _bar(total: int, name: str, quiet: bool) -> tqdm[NoReturn]:
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    return tqdm(total=total, desc=name, file=sys.stderr, leave=False, disable=hidden)


def _line(row: Row | Failure, reused: bool) -> str:
    from lic.bench.measure import Failure

    if isinstance(row, Failure):
        return f"{row.image} -q {row.quality:g}: {row.message}"
    memory = "" if row.peak_memory_mb is None else f", process peak {row.peak_memory_mb:.0f} MB"
    return (
        f"{row.image} -q {row.quality:g}: {row.bpp:.4f} bpp, {row.psnr:.2f} dB, "
        f"encode {row.encode_compute_s:.2f} s, decode {row.decode_compute_s:.2f} s{memory}"
        + (" (measured before)" if reused else "")
        + "".join(f"; {problem}" for problem in row.problems)
    )
