"""Options that several commands share, and the messages that they switch on and off."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import click

from lic.device import check_device
from lic.errors import UsageError


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


def verbosity_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """-v, -vv and --quiet. They set the level of the logger; the command does not hear of them."""

    def apply(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            set_up_logging(-1 if value is True else int(value))

    function = click.option(
        "--quiet", is_flag=True, expose_value=False, callback=apply, help="Errors only, no progress."
    )(function)
    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=apply, help="Say more; -vv: tracebacks."
    )(function)


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--device and --threads."""
    function = click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads (default: torch's choice)."
    )(function)
    return click.option(
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
