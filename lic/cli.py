"""The command line: arguments and messages. What the commands do is in :mod:`lic.api` and its neighbours.

Nothing here imports torch, numpy or Pillow before the arguments are known to be good: `lic --help` and usage
errors answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lic import __version__, batch, files, stdio
from lic.batch import STDIO, Job
from lic.container import DEFAULT_MAX_PIXELS
from lic.errors import LicError, UsageError
from lic.options import Command, device_options, option, set_up_logging, verbosity_options
from lic.outcome import Outcome, Report, failure_of, log, shows_progress
from lic.part import Preview, Region, parse_preview, parse_region
from lic.quality import DEFAULT_QUALITY, MAX_EFFORT, TUNES, Tune, code_of
from lic.rate import Target, parse_size

if TYPE_CHECKING:
    from lic.work import Operation

INTERRUPTED = 130  # exit code

_FORMATS = ("png", "ppm", "webp", "tiff", "jpeg", "bmp")  # lic.images.FORMATS, which imports numpy and Pillow
_SUFFIXES = ("jpg", "tif")  # other names of theirs
_FORMATS_16 = ("png", "ppm", "tiff")  # of them, those with 16 bits per sample
_COMPARISON = "compare.html"

# name: (module, attribute, help). Imported when called, since they import torch.
_LAZY_COMMANDS = {
    "bench": ("lic.bench.cli", "command", "Measure rate-distortion and speed, compare with other codecs."),
    "train": ("lic.train.cli", "command", "Train a model."),
    "export": ("lic.train.cli", "export_command", "Turn a checkpoint into a weights file."),
}


class _Group(click.Group):
    """A group whose further commands are imported when they are called, not to be listed in --help."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # here, or click prints an empty line first
            log.error("interrupted")
            return INTERRUPTED

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_LAZY_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY_COMMANDS:
            module, attribute, _ = _LAZY_COMMANDS[cmd_name]
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        rows += [(name, text) for name, (_, _, text) in _LAZY_COMMANDS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


# ----------------------------------------------------------------------------------------------------
# entry point and errors


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with one of the codes of :mod:`lic.errors`."""
    stdio.reserve_descriptors()
    # Threads of torch that wait for more to do are to sleep: spinning, they take the time of whatever else is running,
    # the compiled loops among it, and that takes theirs. Before torch is imported, or it is not heard.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    code = run(args)
    if code == INTERRUPTED:
        os._exit(code)  # now: not when the threads that still read have come to an end
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    Any failure is one line on standard error, with a traceback from -vv on.
    """
    set_up_logging(0)
    try:
        result = cli.main(args, prog_name="lic", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe can still be handled
        return result if isinstance(result, int) else 0
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):
            return _report("", abort.__cause__)
        log.error("interrupted")
        return INTERRUPTED
    except KeyboardInterrupt:
        log.error("interrupted")
        return INTERRUPTED
    except click.ClickException as error:
        message = error.format_message()
        if "\n" in message:  # `lic` alone: click makes the whole help its message
            error.show()
        else:
            command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lic"
            log.error("%s (see '%s --help')", message, command)
        return error.exit_code
    except Exception as error:
        return _report("", error)


def _report(name: str, error: BaseException) -> int:
    """Say in one line what went wrong with the file ``name``; the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader has gone, as `head` does: nobody is left to tell. Python would complain at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    failure = failure_of(error, name)
    failure.tell(name)
    return failure.exit_code


# ----------------------------------------------------------------------------------------------------
# options


def _model_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from lic.model import store

    return [model.name for model in store.available() if model.name.startswith(incomplete)]


def _check_quality(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None:
        try:
            code_of(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """A callback that makes of an option's text what ``parse`` does, if it is given."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except UsageError as error:
            raise click.BadParameter(str(error)) from None

    return callback


def _target(quality: float | None, size: str | None, bpp: float | None, psnr: float | None) -> Target | None:
    """The one target of --target-*. Raises UsageError for several, for one beside a quality, and for wrong values."""
    given: list[Target] = []
    try:
        if size is not None:
            given.append(Target("size", parse_size(size)))
        if bpp is not None:
            given.append(Target("bpp", bpp))
        if psnr is not None:
            given.append(Target("psnr", psnr))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if len(given) + (quality is not None) > 1:
        raise UsageError("-q, --target-size, --target-bpp and --target-psnr exclude each other")
    return given[0] if given else None


@dataclass(frozen=True)
class _Files:
    """The options of :func:`_file_options`."""

    output_dir: str | None
    recursive: bool
    no_clobber: bool
    jobs: int
    as_json: bool
    report: str | None
    engine: str
    scheduler: str | None

    def check(self) -> None:
        """Raises UsageError where options contradict each other, LicError where a package is missing."""
        if self.output_dir is None:
            given = {"-r": self.recursive, "--jobs": self.jobs > 1, "--engine": self.engine != "local"}
            for name in (name for name, there in given.items() if there):
                raise UsageError(f"{name} goes with --output-dir")
        if (self.engine == "dask") != (self.scheduler is not None):
            raise UsageError("--engine dask and --scheduler ADDRESS go together")
        if self.report == STDIO:
            raise UsageError("--report names a file; --json writes the same lines to standard error")
        if self.engine == "dask":
            if self.jobs > 1:
                raise UsageError("--jobs is for --engine local: a Dask cluster has as many workers as it has")
            from lic import cluster

            cluster.check()


def _file_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorator in (
        option(
            "Batches",
            "--scheduler",
            metavar="ADDRESS",
            help="Of the Dask cluster, for instance tcp://10.0.0.1:8786.",
        ),
        option(
            "Batches",
            "--engine",
            type=click.Choice(("local", "dask")),
            default="local",
            show_default=True,
            help="Where a batch runs: on this machine, or on a Dask cluster that runs already.",
        ),
        option(
            "Batches",
            "-j",
            "--jobs",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="Worker processes, which share the CPU's cores. Each takes the memory of one.",
        ),
        option("Batches", "-r", "--recursive", is_flag=True, help="Descend into subfolders."),
        option(
            "Batches",
            "--output-dir",
            type=click.Path(),
            metavar="DIR",
            help="Write all outputs into DIR, mirroring folders.",
        ),
        option(
            "Files",
            "--report",
            type=click.Path(),
            metavar="FILE.jsonl",
            help="Append a JSON line per file to FILE.jsonl.",
        ),
        option("Files", "--json", "as_json", is_flag=True, help="The same lines on standard error."),
        option("Files", "--no-clobber", is_flag=True, help="Leave out files whose output exists."),
    ):
        function = decorator(function)
    return function


_paths = click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="IN OUT | IN... --output-dir DIR")

_max_pixels = option(
    "Files",
    "--max-pixels",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_PIXELS,
    show_default=True,
    metavar="N",
    help="Refuse larger pictures; sides count in units of 64 pixels.",
)


# ----------------------------------------------------------------------------------------------------
# commands


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lic", message="%(prog)s %(version)s")
def cli() -> None:
    """A learned image codec: pictures to small .lic files and back.

    Exit codes: 0 done, 1 an operation failed, 2 usage, 3 damaged or no .lic file, 4 a .lic file that needs a
    newer version or another model, 130 interrupted.
    """


@cli.command(
    cls=Command,
    short_help="Encode pictures as .lic files.",
    epilog="""\b
Examples:
  lic encode photo.png photo.lic
  lic encode -q 70 - - < photo.png > photo.lic
  lic encode --target-size 100k photo.png photo.lic
  lic encode photos/ --output-dir coded -r --jobs 4 --report coded.jsonl
  lic encode photos/ --output-dir coded -r --no-clobber      # the rest of an interrupted batch

A batch goes on after a failure, names each failed file on standard error and exits with 1. Outputs are replaced
in one step when they are complete. More in docs/recipes.md.
""",
)
@_paths
@option(
    "Coding",
    "-q",
    "--quality",
    type=float,
    callback=_check_quality,
    metavar="0..100",
    help=f"Higher looks better and takes more bytes.  [default: {DEFAULT_QUALITY:g}]",
)
@option("Coding", "--target-size", metavar="BYTES", help="Of the file, never exceeded: 20000, 20k, 1.5M, 100Ki.")
@option("Coding", "--target-bpp", type=float, metavar="F", help="Bits per pixel of the file, never exceeded.")
@option("Coding", "--target-psnr", type=float, metavar="DB", help="PSNR of the decoded picture, met from above.")
@option(
    "Coding",
    "--tune",
    type=click.Choice(TUNES),
    default=TUNES[0],
    show_default=True,
    help="Measure to be good in: squared error, or structure as MS-SSIM sees it.",
)
@option(
    "Coding",
    "--effort",
    type=click.IntRange(0, MAX_EFFORT),
    default=0,
    show_default=True,
    metavar="N",
    help="How long to look for a smaller file of the same quality; decoding takes no longer.",
)
@option(
    "Coding",
    "--effort-seconds",
    type=click.FloatRange(min=0),
    metavar="S",
    help="With --effort: about how long each picture may take. No pass begins that would probably end later.",
)
@option(
    "Coding",
    "--model",
    default="base",
    show_default=True,
    metavar="NAME",
    help="One of 'lic models'.",
    shell_complete=_model_names,
)
@option("Coding", "--strip", is_flag=True, help="Store no colour profile, EXIF and XMP.")
@device_options
@_max_pixels
@_file_options
@verbosity_options
def encode(
    paths: tuple[str, ...],
    quality: float | None,
    target_size: str | None,
    target_bpp: float | None,
    target_psnr: float | None,
    tune: Tune,
    effort: int,
    effort_seconds: float | None,
    model: str,
    strip: bool,
    device: str,
    threads: int | None,
    max_pixels: int,
    **options: Any,
) -> int:
    """Encode pictures as .lic files: RGB or gray, with or without transparency, 8 or 16 bits per sample.

    '-' is standard input or output. With --output-dir, any number of files and folders; a folder stands for the
    pictures in it, and names keep their place in the tree.
    """
    target = _target(quality, target_size, target_bpp, target_psnr)
    if effort_seconds is not None and effort == 0:
        raise click.UsageError("--effort-seconds goes with --effort")
    run = _Files(**options)
    run.check()
    if run.output_dir is None:

        def accepts(out: str) -> bool:
            return out.lower().endswith(".lic")

        jobs = [_single_job(paths, accepts, "end in .lic or be '-'")]
    else:
        from lic.images import PICTURE_SUFFIXES

        jobs = batch.many(paths, run.output_dir, ".lic", PICTURE_SUFFIXES, recursive=run.recursive)
    from lic.work import Encode

    operation = Encode(
        quality=quality,
        target=target,
        tune=tune,
        effort=effort,
        effort_seconds=effort_seconds,
        model=model,
        strip=strip,
        max_pixels=max_pixels,
        device=device,
        threads=threads,
        measure=run.as_json or run.report is not None or log.isEnabledFor(logging.INFO),
    )
    return _run_jobs(operation, jobs, run)


@cli.command(
    cls=Command,
    epilog="""\b
Examples:
  lic decode photo.lic photo.png
  lic decode photo.lic - --format ppm | display -
  lic decode --region 256,128,300,200 photo.lic detail.png
  lic decode --preview auto half-loaded.lic preview.png
  lic decode coded/ --output-dir back -r --format webp
  lic encode - - < photo.png | lic decode - - > back.png

A damaged file gives exit code 3, one that needs a newer version or another model 4, and no picture.
""",
)
@_paths
@option(
    "Coding",
    "--format",
    "format",
    type=click.Choice((*_FORMATS, *_SUFFIXES)),
    help="Of the output; default: OUT's suffix, png for '-' and --output-dir.",
)
@option(
    "Coding",
    "--bits",
    type=click.Choice(("8", "16")),
    help="Per sample of the output; default: 16 if the source had more than 8 and the format is png, ppm or tiff.",
)
@option(
    "Coding",
    "--region",
    callback=_parsed(parse_region),
    metavar="X,Y,W,H",
    help="Only these pixels of the upright picture, decoded from the tiles that they need.",
)
@option(
    "Coding",
    "--preview",
    callback=_parsed(parse_preview),
    metavar="N|auto",
    help="Only the first N groups of 'lic info'; auto: those that a truncated or damaged file holds as a whole.",
)
@device_options
@_max_pixels
@_file_options
@verbosity_options
def decode(
    paths: tuple[str, ...],
    format: str | None,
    bits: str | None,
    region: Region | None,
    preview: Preview | None,
    device: str,
    threads: int | None,
    max_pixels: int,
    **options: Any,
) -> int:
    """Decode .lic files as pictures.

    '-' is standard input or output. With --output-dir, any number of files and folders; a folder stands for the
    .lic files in it, and names keep their place in the tree.
    """
    run = _Files(**options)
    run.check()
    from lic.images import format_of_suffix

    if run.output_dir is None:

        def accepts(out: str) -> bool:
            # Never a .lic file: `lic decode *.lic --format png` with two files must not replace the second.
            chosen = format or format_of_suffix(out)
            return chosen is not None and not out.lower().endswith(".lic")

        expected = f"end in .{', .'.join(_FORMATS)}, be '-' or come with --format and not end in .lic"
        jobs = [_single_job(paths, accepts, expected)]
        chosen = format or format_of_suffix(jobs[0].target) or "png"
    else:
        chosen = format or "png"
        jobs = batch.many(paths, run.output_dir, f".{chosen}", (".lic",), recursive=run.recursive)
    chosen = format_of_suffix(f"picture.{chosen}") or chosen  # jpeg, of jpg
    depth = int(bits) if bits else None
    if depth == 16 and chosen not in _FORMATS_16:
        raise click.UsageError(f"{chosen} holds 8 bits per sample: --bits 16 goes with {', '.join(_FORMATS_16)}")
    from lic.work import Decode

    operation = Decode(
        format=chosen,
        bits=depth,
        region=region,
        preview=preview,
        max_pixels=max_pixels,
        device=device,
        threads=threads,
    )
    return _run_jobs(operation, jobs, run)


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="FILE_OR_DIR...")
@click.option("-r", "--recursive", is_flag=True, help="Descend into subfolders.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per file.")
@verbosity_options
def info(paths: tuple[str, ...], recursive: bool, as_json: bool) -> int:
    """Show the header of .lic files and the size of every section.

    A folder stands for the .lic files in it.
    """
    names = batch.sources_of(paths, (".lic",), recursive=recursive)

    def work(name: str) -> None:
        from lic.inspection import info_of

        facts = info_of(files.read(name))
        if as_json:
            click.echo(json.dumps({"file": name, **facts.as_dict()}))
        else:
            click.echo(f"{name}:\n{facts.as_text()}" if len(names) > 1 or names != list(paths) else facts.as_text())

    return _for_each(names, work)


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="FILE_OR_DIR...")
@click.option("-r", "--recursive", is_flag=True, help="Descend into subfolders.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per file on standard output.")
@device_options
@_max_pixels
@verbosity_options
def verify(
    paths: tuple[str, ...], recursive: bool, as_json: bool, device: str, threads: int | None, max_pixels: int
) -> int:
    """Decode .lic files in memory and check all checksums. Writes nothing.

    A folder stands for the .lic files in it.
    """
    names = batch.sources_of(paths, (".lic",), recursive=recursive)
    from lic.api import Codec

    codec = Codec(device=device, threads=threads)

    def emit(facts: dict[str, Any]) -> None:
        stdio.write_all(stdout, (json.dumps(facts) + "\n").encode())

    def work(name: str) -> None:
        try:
            result = codec.decode_result(files.read(name), max_pixels=max_pixels)
        except Exception as error:
            if as_json:
                emit({"file": name, "ok": False, "problem": failure_of(error).line})
            raise
        if as_json:
            emit({"file": name, "ok": True, "symbols_sha256": result.symbols_sha256})
        elif log.isEnabledFor(logging.WARNING):
            click.echo(f"{name}: ok", err=True)

    with stdio.claimed_stdout() as stdout:
        return _for_each(names, work)


@cli.command(
    cls=Command,
    short_help="Show pictures and .lic files over each other, in one HTML file.",
    epilog="""\b
Examples:
  lic compare photo.png photo.lic
  lic compare photo.png q20.lic q40.lic q60.lic --output qualities.html
""",
)
@click.argument("names", nargs=-1, required=True, type=click.Path(), metavar="A B...")
@option(
    "Files",
    "-o",
    "--output",
    default=_COMPARISON,
    show_default=True,
    type=click.Path(),
    metavar="FILE.html",
    help="'-' is standard output.",
)
@option("Files", "--no-clobber", is_flag=True, help="Do nothing if the output exists.")
@device_options
@_max_pixels
@verbosity_options
def compare(
    names: tuple[str, ...], output: str, no_clobber: bool, device: str, threads: int | None, max_pixels: int
) -> int:
    """Show pictures and .lic files of one size over each other, in one HTML file for a browser.

    With size in bytes, bits per pixel, and PSNR to the first (8 bits, without transparency).
    """
    if len(names) < 2:
        raise click.UsageError("give at least two pictures or .lic files")
    output = STDIO if output in stdio.OUTPUT_NAMES else output
    if output == STDIO:
        stdio.check_stdout()
    elif not output.lower().endswith((".html", ".htm")):
        raise click.UsageError(f"the output must end in .html or be '-', not {output!r}")
    elif no_clobber and files.exists(output):
        log.info("%s exists, left as it is", output)
        return 0
    else:
        _check_target(output)
    from lic import compare as viewer
    from lic.api import Codec

    codec = Codec(device=device, threads=threads)
    with stdio.claimed_stdout() as stdout:
        entries = []
        for name in names:
            try:
                entries.append(viewer.entry_of(codec, name, files.read(name), max_pixels=max_pixels))
            except Exception as error:
                return _report(name, error)
        data = viewer.page(entries)
        if output == STDIO:
            stdio.write_all(stdout, data)
        else:
            files.write(output, data)
            if log.isEnabledFor(logging.WARNING):
                click.echo(f"wrote {output}", err=True)  # a name that the user may not have given
    return 0


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON line per model.")
@verbosity_options
def models(as_json: bool) -> int:
    """List the models found, with size, work per pixel, rates and hash."""
    from lic.model import store

    found = store.available()
    if as_json:
        for model in found:
            facts = {
                key: value.hex() if isinstance(value, bytes) else value
                for key, value in dataclasses.asdict(model).items()
                if key != "deflated"
            }
            click.echo(json.dumps({**facts, "path": str(model.path), "sha256": model.sha256}))
        return 0
    if not found:
        raise LicError("no models found: weights/ holds none of this version; $LIC_MODELS may name further folders")
    row = "{:<14} {:>10} {:>9} {:>9} {:>13}  {}"
    click.echo(row.format("name", "parameters", "kMAC/px", "decoder", "bpp", "sha256"))
    for model in found:
        rates = "{:.2f}-{:.2f}".format(*model.rate_range) if model.rate_range else "-"
        total = sum(value for part, value in model.kmac.items() if part != "decoder")
        kmac = (f"{total:.1f}", f"{model.kmac['decoder']:.1f}")
        click.echo(row.format(model.name, f"{model.parameters:,}", *kmac, rates, model.sha256[:16]))
    return 0


@cli.command()
@click.option(
    "--all", "every_model", is_flag=True, help="Check that all models are exact, not base alone: takes minutes."
)
@verbosity_options
def doctor(every_model: bool) -> int:
    """Check the installation: versions, devices, coder, weights and a round trip."""
    from lic import doctor as checks

    with stdio.claimed_stdout() as stdout:  # the first use of the coder may start a compiler

        def write(line: str) -> None:
            stdio.write_all(stdout, f"{line}\n".encode(errors="surrogateescape"))

        return 0 if checks.run(write, every_model) else 1


# ----------------------------------------------------------------------------------------------------
# files


def _single_job(paths: Sequence[str], accepts: Callable[[str], bool], expected: str) -> Job:
    if len(paths) != 2:
        raise click.UsageError("give IN and OUT, or any number of IN with --output-dir DIR")
    return batch.single(paths[0], paths[1], accepts, expected)


def _run_jobs(operation: Operation, jobs: Sequence[Job], run: _Files) -> int:
    """Do all jobs; the exit code. Called when the arguments are known to be good, and checks the outputs."""
    to_stdout = jobs[0].target == STDIO
    if to_stdout:
        stdio.check_stdout()
    if run.no_clobber:
        existing = {job for job in jobs if job.target != STDIO and files.exists(job.target)}
        for job in jobs:
            if job in existing:
                log.info("%s exists, left as it is", job.target)
        jobs = [job for job in jobs if job not in existing]
        if not jobs:
            return 0
    batched = run.output_dir is not None
    if run.output_dir is not None:
        _check_output_dir(run.output_dir)
    elif not to_stdout:
        _check_target(jobs[0].target)
    with (
        stdio.claimed_stdout() as stdout,
        Report(jobs, as_json=run.as_json, path=run.report, bar=batched) as report,
    ):
        if run.scheduler is not None:
            from lic import cluster

            cluster.run(operation, jobs, run.scheduler, report)
        elif batched:
            from lic import engine

            engine.run(operation, jobs, run.jobs, report)
        else:
            return _run_single(operation, jobs[0], report, stdout)
        return 1 if report.codes else 0


def _run_single(operation: Operation, job: Job, report: Report, stdout: int) -> int:
    from lic import work

    try:
        picture, size = work.load(operation, job)  # before torch is imported
        with _progress() as progress:
            codec = operation.codec()
            result = operation.code(codec, picture, progress)
        facts = work.save(operation, job, picture, size, result, codec.device, stdout)
    except BrokenPipeError:
        raise
    except Exception as error:
        report(Outcome(job, failure=failure_of(error, job.source)))
    else:
        report(Outcome(job, facts))
    return report.codes[0] if report.codes else 0


def _check_output_dir(folder: str) -> None:
    if files.is_url(folder):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LicError(f"{folder}: permission denied")  # once, and not for every file


def _check_target(target: str) -> None:
    if files.is_url(target):
        return
    path = Path(target)
    if path.is_dir():
        raise LicError(f"{target}: is a folder")
    if not path.absolute().parent.is_dir():
        raise LicError(f"{target}: its folder does not exist")


def _for_each(names: Sequence[str], work: Callable[[str], None]) -> int:
    """Do ``work`` for every file and report each failure.

    Returns the exit code of the one file that there is; of several 1 if any failed.
    """
    codes = []
    with contextlib.ExitStack() as stack:
        progress = None
        if len(names) > 1 and shows_progress():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            progress = stack.enter_context(tqdm(total=len(names), unit="file"))
            stack.enter_context(logging_redirect_tqdm([log]))
        for name in names:
            try:
                work(name)
            except Exception as error:
                codes.append(_report(name, error))
            if progress is not None:
                progress.update()
    if len(names) == 1:
        return codes[0] if codes else 0
    return 1 if codes else 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A progress callback for one picture, shown if it takes seconds."""
    if not shows_progress():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=1, delay=2, leave=False, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
