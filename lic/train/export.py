"""From a training state to a shipped weights file."""

from __future__ import annotations

import datetime
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lic.model.store import load_file, read_info, write_model
from lic.train.calibration import calibrate
from lic.train.data import Pictures
from lic.train.trainer import WITH_ENTROPY_MODEL, averaged_model, is_trained


def export(
    state: Path,
    target: Path,
    *,
    calibration: list[Path],
    shared_from: Path | None,
    name: str | None,
    data: str,
    rate_range: tuple[float, float] | None,
) -> None:
    """Write the averaged weights of a state as a weights file, its entropy path on integers.

    ``calibration`` are pictures that the units of the integers are fitted to; none are needed for a state that was
    trained on integers. With ``shared_from``, the weights file that a part alone was trained on, the new file holds
    what that part changed and shares the rest with that one; if that is the target itself, it gets what the part
    changed. ``data`` says what the state was trained on.

    Raises ValueError if a certificate fails, nothing can be shared or a quantiser would be lost, LicError if there are
    no pictures that fit, UnsupportedError for damaged weights.
    """
    net, book = averaged_model(state)
    part = book["settings"]["part"]
    if net.dependent is not None and shared_from is None:
        raise ValueError("weights with dependent quantisation of which a part was trained: give --shared-from")
    net.quantise(None)
    net.requires_grad_(False)
    if name is not None:
        net.config = replace(net.config, name=name)
    parent = units = dependent = None
    if shared_from is not None:
        if part == "all":
            raise ValueError("a model of which all parts were trained shares nothing: leave out --shared-from")
        parent = read_info(shared_from)
        theirs = load_file(parent).net
        if part == "nonlocal" or theirs.h_s.non_local is None:
            theirs.h_s.non_local = net.h_s.non_local
        net.h_s, dependent = theirs.h_s, theirs.dependent
        if part in WITH_ENTROPY_MODEL and dependent is not None:
            dependent = replace(dependent, neighbours=None)  # its first step is another one
        if not is_trained(part, "g_s.last.bias"):
            net.g_s.limit = theirs.g_s.limit
        if part not in WITH_ENTROPY_MODEL:
            net.context = theirs.context
        if torch.equal(net.log_gain.table, theirs.log_gain.table):  # of some adapters it is another one
            units = theirs.unit_tables  # which another machine may have rounded otherwise
    if not net.exact and any(layer.exponent is None for layer in net.exact_layers().values()):
        pictures = Pictures(calibration, torch.device("cpu"), seed=0, watch=False)
        try:
            calibrate(net, pictures)
        finally:
            pictures.close()
    net.quantise(dependent)  # which calibration does not know of
    net.freeze()
    net.unit_tables = units or net.unit_tables
    provenance: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "data": data,
        "licence": "Apache-2.0",
        "steps": book["step"],
        "minutes": round(book["seconds"] / 60, 1),
        "megapixels": round(book["pixels"] / 1e6),
        "settings": book["settings"],
    }
    write_model(target, net, {"provenance": provenance, "rate_range": rate_range}, parent)


def _commit() -> str:
    """The commit of the checkout that this code runs from, or "unknown": an installed copy may lie in any other."""
    root = Path(__file__).resolve().parents[2]
    try:
        if not (root / ".git").exists() or 'name = "lic"' not in (root / "pyproject.toml").read_text(encoding="utf-8"):
            return "unknown"
        run = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"
