"""The optimisers by the names that recipes use."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from asdm_compress.core.distillation import Optimiser
from asdm_compress.core.errors import AsdmError, ExitCode


def check_optimiser(settings: Optimiser) -> None:
    """Raise AsdmError, exit code 4, for one that this environment does not have."""
    if settings.name == "adamw-8bit" and find_spec("bitsandbytes") is None:
        raise AsdmError(
            "8-bit optimiser states need the package bitsandbytes",
            "Install it, or use --optimiser adamw.",
            ExitCode.ENVIRONMENT,
        )


def make_optimiser(parameters: Sequence[nn.Parameter], settings: Optimiser) -> torch.optim.Optimizer:
    """AdamW over the parameters; raises AsdmError, exit code 4, for 8-bit states without bitsandbytes."""
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "weight_decay": settings.weight_decay,
        "eps": settings.epsilon,
    }
    if settings.name == "adamw-8bit":
        check_optimiser(settings)
        from bitsandbytes.optim import AdamW8bit

        optimiser: torch.optim.Optimizer = AdamW8bit(parameters, **arguments)
        return optimiser
    return torch.optim.AdamW(parameters, fused=settings.name == "adamw-fused", **arguments)
