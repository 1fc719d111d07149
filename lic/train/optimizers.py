"""Which optimiser trains which parameter."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from lic.errors import LicError

# Learning rates relative to the networks': the fitted basis moves slowly, the few table entries quickly.
FACTORS = {"networks": 1.0, "shortcut": 0.03, "log_gain": 2.0, "log_igain": 2.0, "centroids": 2.0, "prior": 10.0}
MAX_PRECONDITIONED = 512  # longest side of a matrix that SOAP keeps a basis for: the cost grows with its cube


def make_optimizers(model: nn.Module, name: str) -> list[Optimizer]:
    """Those of the parameters that require gradients; every group has a ``name`` and a ``factor`` of FACTORS.

    ``adamw``: AdamW for everything. ``muon``: Muon (Jordan et al. 2024) for the matrices of the networks, scaled to
    the update size of AdamW (Liu et al. 2025), AdamW for the rest. ``soap``: SOAP (Vyas et al. 2024), that is Adam in
    the eigenbasis of Shampoo's preconditioner, likewise.

    Raises LicError on another name, and where PyTorch has no Muon or the package for SOAP is missing.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    matrices: list[nn.Parameter] = []
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = key.partition(".")[0]
        if name != "adamw" and part not in FACTORS and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            groups.setdefault(part if part in FACTORS else "networks", []).append(parameter)
    options = [{"name": k, "factor": FACTORS[k], "params": v} for k, v in groups.items()]
    optimizers: list[Optimizer] = [torch.optim.AdamW(options, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    networks = [{"name": "networks", "factor": FACTORS["networks"], "params": matrices}]
    if name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise LicError("--optimizer muon needs PyTorch 2.9 or newer")
        optimizers.append(torch.optim.Muon(networks, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    elif name == "soap":
        try:
            from pytorch_optimizer import SOAP
        except ImportError as error:
            raise LicError("--optimizer soap needs the package pytorch-optimizer: pip install lic[train]") from error
        optimizers.append(SOAP(networks, weight_decay=0.0, max_precondition_dim=MAX_PRECONDITIONED))
    elif name != "adamw":
        raise LicError(f"the optimiser must be adamw, muon or soap, not {name!r}")
    return optimizers
