"""Options that several commands share, and the messages that they switch on and off."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import click

from lic.device import check_device
from lic.errors import UsageError

_OTHERS = "Messages and help"


def set_up_logging(verbosity: int) -> None:
    """-1: errors only; 0: warnings; 1: what is done and with what; 2: tracebacks as well."""
    log = logging.getLogger("lic")
    handler = logging.StreamHandler()  # on sys.stderr as it is now
    handler.setFormatter(logging.Formatter("lic: %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    log.setLevel(level)
    if verbosity < 2:
        warnings.simplefilter("ignore")  # Python warnings of libraries mean nothing to a user


class _Option(click.Option):
    """An option that --help lists under the heading ``group``."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class Command(click.Command):
    """A command whose --help lists options by group, in the order in which the groups first appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (row := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(parameter, "group", _OTHERS), []).append(row)
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(rows)


def option(group: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """click.option under a heading of --help; see :class:`Command`."""
    return click.option(*args, cls=_Option, group=group, **kwargs)


def verbosity_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """-v, -vv and --quiet. They set the level of the logger; the command does not hear of them."""

    def apply(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            set_up_logging(-1 if value is True else int(value))

    function = option(
        _OTHERS, "--quiet", is_flag=True, expose_value=False, callback=apply, help="Errors only, no progress."
    )(function)
    return option(
        _OTHERS, "-v", "--verbose", count=True, expose_value=False, callback=apply, help="Say more; -vv: tracebacks."
    )(function)


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--device and --threads."""
    function = option(
        "Machine", "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads (default: torch's choice)."
    )(function)
    return option(
        "Machine",
        "--device",
        default="auto",
        show_default=True,
        callback=_device,
        metavar="auto|cpu|cuda[:N]",
        help="Where the networks run.",
    )(function)


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        return check_device(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None
