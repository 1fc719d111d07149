"""The mean of the averaged weights of several training runs, as a state to export or to start from.

Usage: python scripts/average_states.py runs/one/state.pt runs/two/state.pt runs/both.pt

The runs must have trained the same part of the same weights, each with a seed of its own: then what is noise in one of
them is mostly another noise in the others (model soups: Wortsman et al. 2022, arXiv 2203.05482). Steps, pixels and time
are those of all of them together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from lic.errors import LicError
from lic.train.trainer import read_state


def averaged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """A state like the first, with the mean of all. Raises LicError if they are not of one part of one model."""
    first = states[0]
    for other in states[1:]:
        same = all(first["settings"][key] == other["settings"][key] for key in ("model", "part", "rank", "tune"))
        if not same or first["config"] != other["config"]:
            raise LicError("the states are of different models, or of different parts of one")
    result = first | {key: sum(state[key] for state in states) for key in ("step", "pixels", "seconds")}
    result["average"] = {
        name: torch.stack([state["average"][name].double() for state in states]).mean(0).to(value.dtype)
        for name, value in first["average"].items()
    }
    result["model"] = result["average"]
    return result


@click.command()
@click.argument("states", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
def main(states: tuple[Path, ...], output: Path) -> None:
    if output.exists():
        raise click.UsageError(f"{output} is there already")
    torch.save(averaged([read_state(path) for path in states]), output)


if __name__ == "__main__":
    main()
