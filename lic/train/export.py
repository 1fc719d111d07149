"""From a training state to a shipped weights file."""

from __future__ import annotations

import datetime
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from lic.model.store import write_model
from lic.train.trainer import averaged_model


def export(state: Path, target: Path, *, name: str | None, data: str, rate_range: tuple[float, float] | None) -> None:
    """Write the averaged weights of a state as a weights file. ``data`` says what they were trained on."""
    net, book = averaged_model(state)
    if name is not None:
        net.config = replace(net.config, name=name)
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
    write_model(target, net, {"provenance": provenance, "rate_range": rate_range})


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
