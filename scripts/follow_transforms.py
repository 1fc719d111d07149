"""Carry weights files over to a base of which transforms, synthesis or refinement alone were trained again.

Usage: python scripts/follow_transforms.py OLD_WEIGHTS_FOLDER NEW_WEIGHTS_FOLDER --base base

Every model that shares arrays with OLD/base.safetensors is written to NEW, where the new base lies. It gets the new
transforms; where its own were others (modules of its own apart), it keeps its difference. It gets the new refinement
if its synthesis is that of the new base but for non-local modules. Its entropy model stays as it is, and so do its
record and its rates: those at quality 0 and 100 may be a little different now.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch

from lic.errors import LicError
from lic.model import store
from lic.model.codec import CodecModel

TRANSFORMS = ("g_a.", "h_a.", "g_s.", "log_igain.", "centroids")
REFINEMENT = "refinement."


@torch.no_grad()
def follow(net: CodecModel, old: CodecModel, new: CodecModel) -> None:
    """Move the transforms of ``net``, a relative of ``old``, as far as those of ``new`` moved.

    Raises LicError if anything else than transforms is another in ``new``.
    """
    own, before, after = net.state_dict(), old.state_dict(), new.state_dict()
    if any(not torch.equal(after[k], v) for k, v in before.items() if not k.startswith((*TRANSFORMS, REFINEMENT))):
        raise LicError("the new base is another in more than its transforms")
    for name in (k for k in before if k.startswith(TRANSFORMS)):  # not the refinement, which is taken as a whole
        same = torch.equal(own[name], before[name])
        own[name].copy_(after[name] if same else own[name] + (after[name] - before[name]))
    net.g_s.limit = new.g_s.limit
    synthesis = [k for k in own if k.startswith("g_s.") and ".non_local." not in k]
    if all(k in after and torch.equal(own[k], after[k]) for k in synthesis):
        net.config = replace(net.config, refinement=new.config.refinement)
        net.refinement = new.refinement


@click.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("new", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--base", default="base", show_default=True)
def main(old: Path, new: Path, base: str) -> None:
    parent = store.read_info(new / (base + store.SUFFIX))
    theirs = store.load_file(parent).net
    before = store.load_file(store.read_info(old / parent.path.name)).net
    for path in sorted(old.glob("*" + store.SUFFIX)):
        info = store.read_info(path)
        if info.shared_from != parent.path.name:
            continue
        net = store.load_file(info).net
        follow(net, before, theirs)
        store.write_model(new / path.name, net, {"provenance": info.provenance, "rate_range": info.rate_range}, parent)
        click.echo(path.name)


if __name__ == "__main__":
    main()
