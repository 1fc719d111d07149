"""Latents of finished transforms, computed once and stored: what context models are trained on alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lic.errors import LicError
from lic.model.codec import CodecModel
from lic.model.config import DOWNSAMPLING
from lic.train.data import Pictures, sample
from lic.train.dependent import ToQuantise, dependently_quantised

SUFFIX = ".safetensors"
CROPS_AT_A_TIME = 8
_TYPES = {"y": torch.int16, "z": torch.int8, "code": torch.int32, "below": torch.int8, "above": torch.int8}


@torch.no_grad()
def store_latents(net: CodecModel, pictures: Pictures, target: Path, count: int, side: int, seed: int) -> None:
    """Write the latents of ``count`` random crops of ``side`` pixels, drawn as in training, as the encoder quantises.

    y (count, h, w, M), z (count, h/4, w/4, C) and the quality codes (count,), all integers; below and above (count, h,
    w, M), half the distances to the values that y could have instead, in half integers. Raises OSError.
    """
    generator = torch.Generator(net.sigma.device).manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in _TYPES}
    for start in range(0, count, CROPS_AT_A_TIME):
        batch = max(2, min(CROPS_AT_A_TIME, count - start))
        x, code = sample(pictures, batch, side, generator)
        if net.dependent is None:
            y, z = net.latents(x, code)
            below = above = torch.ones_like(y)
        else:
            y, z, _ = ToQuantise.of(net, x, code)
            y, (below, above) = dependently_quantised(net, y, z, code)
        for name, value in zip(parts, (y, z, code, below, above), strict=True):
            parts[name].append(value.to(_TYPES[name]).cpu())
    temporary = target.with_suffix(".tmp")
    tensors = {name: torch.cat(values)[:count] for name, values in parts.items()}
    save_file(tensors, temporary, {"spacing": str(net.spacing)})
    temporary.replace(target)


class StoredLatents:
    """Files of :func:`store_latents`, read into memory; batches are drawn from all of them alike.

    Raises LicError if one cannot be read or if they do not go together.
    """

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        self._parts: list[dict[str, Tensor]] = []
        spacings = set()
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    spacings.add(float(file.metadata()["spacing"]))
                    self._parts.append({name: file.get_tensor(name) for name in _TYPES})
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise LicError(f"{path}: no stored latents: {error}") from error
        if len({tuple(t.shape[1:] for t in part.values()) for part in self._parts}) != 1 or len(spacings) != 1:
            raise LicError("stored latents of one size are needed, from one model")
        self.spacing = spacings.pop()  # of the integers, as CodecModel.spacing
        self._ends = torch.tensor([len(part["y"]) for part in self._parts]).cumsum(0)
        self.count = int(self._ends[-1])
        if device.type == "cuda":  # whole, so that a batch is drawn without leaving it
            self._parts = [{name: torch.cat([p[name] for p in self._parts]).to(device) for name in _TYPES}]

    @property
    def side(self) -> int:
        """Of the crops, in pixels."""
        return self._parts[0]["y"].shape[1] * DOWNSAMPLING

    def refresh(self) -> None:
        """There is nothing that could have arrived."""

    def close(self) -> None:
        """There is nothing to stop."""

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random y (count, h, w, M) and z (count, h/4, w/4, C), as floats, their quality codes (count,), and below and
        above as (2, count, h, w, M)."""
        drawn = torch.randint(self.count, (count,), generator=generator, device=generator.device)
        if drawn.is_cuda:
            y, z, code, *halves = (self._parts[0][name][drawn].float() for name in _TYPES)
            return y, z, code, torch.stack(halves)
        places = torch.searchsorted(self._ends, drawn, right=True).tolist()
        rows = [
            (self._parts[place], int(index - self._ends[place]))  # counted from the end
            for place, index in zip(places, drawn, strict=True)
        ]
        y, z, code, *halves = (torch.stack([part[name][row] for part, row in rows]).float() for name in _TYPES)
        return y, z, code, torch.stack(halves)
