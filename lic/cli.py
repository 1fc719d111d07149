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
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lic import __version__, batch, stdio
from lic.batch import STDIO, Job
from lic.container import DEFAULT_MAX_PIXELS
from lic.errors import LicError
from lic.options import device_options, set_up_logging, verbosity_options
from lic.quality import DEFAULT_QUALITY, code_of

if TYPE_CHECKING:
    from lic.api import Codec

log = logging.getLogger("lic")

_FORMATS = ("png", "ppm", "webp", "tiff", "jpeg", "bmp")  # lic.images.FORMATS, which imports numpy and Pillow

# name: (module, attribute, help). Imported when called, since they import torch.
_LAZY_COMMANDS = {
    "bench": ("lic.bench.cli", "command", "Measure rate-distortion and speed, compare with other codecs."),
    "train": ("lic.train.cli", "command", "Train a model."),
    "export": ("lic.train.cli", "export_command", "Turn a checkpoint into a weights file."),
}


class _Group(click.Group):
    """A group whose further commands are imported when they are called, not to be listed in --help."""

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
    sys.exit(run(args))


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
        return 130
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
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
    prefix = {"": "", STDIO: "standard input: "}.get(name, f"{name}: ")
    log.error("%s%s", prefix, _line(error, name), exc_info=error if log.isEnabledFor(logging.DEBUG) else None)
    return error.exit_code if isinstance(error, LicError) else 1


def _line(error: BaseException, name: str = "") -> str:
    """An exception in one line; ``name`` is the file that the line will be about anyway."""
    if isinstance(error, LicError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "not enough memory"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename is not None and str(error.filename) != name:
            text = f"{error.filename}: {text}"
    else:
        text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------------
# options


def _check_quality(ctx: click.Context, param: click.Parameter, value: float) -> float:
    try:
        code_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


def _file_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorator in (
        click.option("--json", "as_json", is_flag=True, help="A JSON line per file on standard error."),
        click.option("--no-clobber", is_flag=True, help="Leave out files whose output exists."),
        click.option("-r", "--recursive", is_flag=True, help="With --output-dir: descend into subfolders."),
        click.option("--output-dir", metavar="DIR", help="Write all outputs into DIR, mirroring folders."),
    ):
        function = decorator(function)
    return function


_max_pixels = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_PIXELS,
    show_default=True,
    metavar="N",
    help="Refuse larger pictures.",
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


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="IN OUT | IN... --output-dir DIR")
@click.option(
    "-q",
    "--quality",
    type=float,
    default=DEFAULT_QUALITY,
    show_default=True,
    callback=_check_quality,
    metavar="0..100",
    help="Higher looks better and takes more bytes.",
)
@click.option("--model", default="base", show_default=True, metavar="NAME", help="One of 'lic models'.")
@click.option("--strip", is_flag=True, help="Store no metadata. (This version stores none.)")
@device_options
@_file_options
@_max_pixels
@verbosity_options
def encode(
    paths: tuple[str, ...],
    quality: float,
    model: str,
    strip: bool,
    device: str,
    threads: int | None,
    output_dir: str | None,
    recursive: bool,
    no_clobber: bool,
    as_json: bool,
    max_pixels: int,
) -> int:
    """Encode pictures (8-bit RGB) as .lic files. '-' is standard input or output."""
    if output_dir is None:

        def accepts(out: str) -> bool:
            return out.lower().endswith(".lic")

        jobs = [_single_job(paths, recursive, accepts, "end in .lic or be '-'")]
    else:
        from lic.images import PICTURE_SUFFIXES

        jobs = batch.many(paths, output_dir, ".lic", PICTURE_SUFFIXES, recursive=recursive)

    def work(job: Job, codec: Codec, stdout: int | None) -> None:
        from lic import images

        picture = images.picture_of(_read(job.source), max_pixels=max_pixels)
        if not strip and (dropped := images.metadata_of(picture)):
            log.warning("%s: not stored by this version: %s", job.source, ", ".join(dropped))
        with _progress(jobs) as progress:
            result = codec.encode_result(picture, quality, progress=progress)
        _write(job.target, result.data, stdout)
        facts = {
            "input": job.source,
            "output": job.target,
            "width": picture.width,
            "height": picture.height,
            "bytes": len(result.data),
            "bpp": round(8 * len(result.data) / (picture.width * picture.height), 4),
            "estimated_bytes": round(result.estimated_bits / 8, 1),
            "psnr": round(result.psnr, 2) if math.isfinite(result.psnr) else None,  # JSON has no infinity
            "quality": quality,
            "model": model,
            "device": codec.device,
            "seconds": round(result.seconds, 3),
            "symbols_sha256": result.symbols_sha256,
        }
        _say(facts, as_json, "{bytes} bytes, {bpp} bpp, {psnr} dB, {seconds} s on {device}")

    return _run_jobs(jobs, work, model, device, threads, output_dir, no_clobber)


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="IN OUT | IN... --output-dir DIR")
@click.option(
    "--format",
    "format",
    type=click.Choice(_FORMATS),
    help="Of the output; default: OUT's suffix, png for '-' and --output-dir.",
)
@device_options
@_file_options
@_max_pixels
@verbosity_options
def decode(
    paths: tuple[str, ...],
    format: str | None,
    device: str,
    threads: int | None,
    output_dir: str | None,
    recursive: bool,
    no_clobber: bool,
    as_json: bool,
    max_pixels: int,
) -> int:
    """Decode .lic files as pictures. '-' is standard input or output."""
    if output_dir is None:
        from lic.images import format_of_suffix

        def accepts(out: str) -> bool:
            # Never a .lic file: `lic decode *.lic --format png` with two files must not replace the second.
            chosen = format or format_of_suffix(out)
            return chosen is not None and not out.lower().endswith(".lic")

        expected = f"end in .{', .'.join(_FORMATS)}, be '-' or come with --format and not end in .lic"
        jobs = [_single_job(paths, recursive, accepts, expected)]
        chosen = format or format_of_suffix(jobs[0].target) or "png"
    else:
        chosen = format or "png"
        jobs = batch.many(paths, output_dir, f".{chosen}", (".lic",), recursive=recursive)

    def work(job: Job, codec: Codec, stdout: int | None) -> None:
        from lic.images import picture_bytes

        with _progress(jobs) as progress:
            result = codec.decode_result(_read(job.source), max_pixels=max_pixels, progress=progress)
        data = picture_bytes(result.rgb, chosen)
        _write(job.target, data, stdout)
        height, width = result.rgb.shape[:2]
        facts = {
            "input": job.source,
            "output": job.target,
            "width": width,
            "height": height,
            "bytes": len(data),
            "device": codec.device,
            "seconds": round(result.seconds, 3),
            "symbols_sha256": result.symbols_sha256,
        }
        _say(facts, as_json, "{width}x{height} pixels, {seconds} s on {device}")

    return _run_jobs(jobs, work, None, device, threads, output_dir, no_clobber)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per file.")
@verbosity_options
def info(files: tuple[str, ...], as_json: bool) -> int:
    """Show the header of .lic files and the size of every section."""

    def work(name: str) -> None:
        from lic.info import info_of

        facts = info_of(_read(name))
        if as_json:
            click.echo(json.dumps({"file": name, **facts.as_dict()}))
        else:
            click.echo(f"{name}:\n{facts.as_text()}" if len(files) > 1 else facts.as_text())

    return _for_each(files, work)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per file on standard output.")
@device_options
@_max_pixels
@verbosity_options
def verify(files: tuple[str, ...], as_json: bool, device: str, threads: int | None, max_pixels: int) -> int:
    """Decode .lic files in memory and check all checksums. Writes nothing."""
    from lic.api import Codec

    codec = Codec(device=device, threads=threads)

    def emit(facts: dict[str, Any]) -> None:
        stdio.write_all(stdout, (json.dumps(facts) + "\n").encode())

    def work(name: str) -> None:
        try:
            result = codec.decode_result(_read(name), max_pixels=max_pixels)
        except Exception as error:
            if as_json:
                emit({"file": name, "ok": False, "problem": _line(error)})
            raise
        if as_json:
            emit({"file": name, "ok": True, "symbols_sha256": result.symbols_sha256})
        elif log.isEnabledFor(logging.WARNING):
            click.echo(f"{name}: ok", err=True)

    with stdio.claimed_stdout() as stdout:
        return _for_each(files, work)


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
            }
            click.echo(json.dumps({**facts, "path": str(model.path), "sha256": model.sha256}))
        return 0
    if not found:
        raise LicError("no models found: the weights/ folder is empty; $LIC_MODELS may name further folders")
    row = "{:<12} {:>10} {:>9} {:>9} {:>13}  {}"
    click.echo(row.format("name", "parameters", "kMAC/px", "decoder", "bpp", "sha256"))
    for model in found:
        rates = "{:.2f}-{:.2f}".format(*model.rate_range) if model.rate_range else "-"
        total = sum(value for part, value in model.kmac.items() if part != "decoder")
        kmac = (f"{total:.1f}", f"{model.kmac['decoder']:.1f}")
        click.echo(row.format(model.name, f"{model.parameters:,}", *kmac, rates, model.sha256[:16]))
    return 0


@cli.command()
@verbosity_options
def doctor() -> int:
    """Check the installation: versions, devices, coder, weights and a round trip."""
    from lic import doctor as checks

    with stdio.claimed_stdout() as stdout:  # the first use of the coder may start a compiler

        def write(line: str) -> None:
            stdio.write_all(stdout, f"{line}\n".encode(errors="surrogateescape"))

        return 0 if checks.run(write) else 1


# ----------------------------------------------------------------------------------------------------
# files


def _single_job(paths: Sequence[str], recursive: bool, accepts: Callable[[str], bool], expected: str) -> Job:
    if len(paths) != 2:
        raise click.UsageError("give IN and OUT, or any number of IN with --output-dir DIR")
    if recursive:
        raise click.UsageError("-r goes with --output-dir")
    return batch.single(paths[0], paths[1], accepts, expected)


def _run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job, Codec, int | None], None],
    model: str | None,
    device: str,
    threads: int | None,
    output_dir: str | None,
    no_clobber: bool,
) -> int:
    """Do ``work`` for every job; the exit code.

    Called when the arguments are known to be good, and checks the outputs. ``work`` gets the codec, which
    imports torch at first use, and the descriptor of standard output where that is the output.
    """
    to_stdout = jobs[0].target == STDIO
    if to_stdout:
        stdio.check_stdout()
    elif output_dir is None:
        _check_target(jobs[0].target)
    if no_clobber:
        existing = {job for job in jobs if job.target != STDIO and os.path.lexists(job.target)}
        for job in jobs:
            if job in existing:
                log.info("%s exists, left as it is", job.target)
        jobs = [job for job in jobs if job not in existing]
        if not jobs:
            return 0

    from lic.api import DEFAULT_MODEL, Codec

    codec = Codec(model or DEFAULT_MODEL, device, threads=threads)
    with stdio.claimed_stdout() as stdout:
        if output_dir is not None:
            # Without the device or the model no file would succeed: fail once.
            log.info("running on %s", codec.device)
            if model is not None:
                codec.load_encoder()
        return _for_each(
            jobs,
            lambda job: work(job, codec, stdout if to_stdout else None),
            name_of=lambda job: job.source,
            batch=output_dir is not None,
        )


def _check_target(target: str) -> None:
    path = Path(target)
    if path.is_dir():
        raise LicError(f"{target}: is a folder")
    if not path.absolute().parent.is_dir():
        raise LicError(f"{target}: its folder does not exist")


def _for_each(
    items: Sequence[Any],
    work: Callable[[Any], None],
    *,
    name_of: Callable[[Any], str] = str,
    batch: bool = False,
) -> int:
    """Do ``work`` for every item and report each failure.

    Returns the exit code of the one item that there is; of several, or in a batch, 1 if any failed.
    """
    codes = []
    with contextlib.ExitStack() as stack:
        progress = None
        if len(items) > 1 and _shows_progress():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            progress = stack.enter_context(tqdm(total=len(items), unit="file"))
            stack.enter_context(logging_redirect_tqdm([log]))
        for item in items:
            try:
                work(item)
            except Exception as error:
                codes.append(_report(name_of(item), error))
            if progress is not None:
                progress.update()
    if len(items) == 1 and not batch:
        return codes[0] if codes else 0
    return 1 if codes else 0


def _shows_progress() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and log.isEnabledFor(logging.WARNING)


@contextlib.contextmanager
def _progress(jobs: Sequence[Job]) -> Iterator[Callable[[int, int], None] | None]:
    """A progress callback for one picture, shown if it takes seconds; None where a bar counts files."""
    if len(jobs) > 1 or not _shows_progress():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=1, delay=2, leave=False, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _read(name: str) -> bytes:
    return stdio.read_stdin() if name in stdio.INPUT_NAMES else Path(name).read_bytes()


def _write(name: str, data: bytes, stdout: int | None) -> None:
    if stdout is not None:
        stdio.write_all(stdout, data)
        return
    from lic import atomic

    Path(name).parent.mkdir(parents=True, exist_ok=True)
    atomic.write(name, data)


def _say(facts: dict[str, Any], as_json: bool, summary: str) -> None:
    if as_json:
        click.echo(json.dumps(facts), err=True)
    elif log.isEnabledFor(logging.INFO):
        log.info("%s -> %s: %s", facts["input"], facts["output"], summary.format(**facts))
