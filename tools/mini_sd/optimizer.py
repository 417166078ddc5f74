"""Muon for the matrices and kernels of a network, AdamW for the rest, behind one optimizer's face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

WEIGHT_DECAY: Final = 1e-2


class MuonWithAdamW:
    """Orthogonalised momentum (Muon) where a weight is a matrix, AdamW for vectors, embeddings, first and last layers.

    torch's Muon takes matrices only, so a kernel (C_out, C_in, k, k) is given to it as the matrix (C_out, C_in k k)
    that shares its memory.
    """

    def __init__(self, module: nn.Module, learning_rate: float, is_matrix: Callable[[str], bool]) -> None:
        named = list(module.named_parameters())
        matrices = [p for name, p in named if p.ndim >= 2 and is_matrix(name)]
        taken = {id(p) for p in matrices}
        self.views = [(p, nn.Parameter(p.data.view(len(p), -1))) for p in matrices]
        self.muon = torch.optim.Muon(
            [view for _, view in self.views],
            lr=learning_rate,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            [p for _, p in named if id(p) not in taken], lr=learning_rate, betas=(0.9, 0.995), weight_decay=WEIGHT_DECAY
        )
        self.module = module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both, whose learning rates are on one scale; loading a state gives each of them new ones."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.module.zero_grad()

    def step(self) -> None:
        """Update every parameter from its gradient."""
        for parameter, view in self.views:
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' states."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
