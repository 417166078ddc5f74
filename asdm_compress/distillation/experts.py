"""How evenly a student's experts are used while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from asdm_compress.models.expert_conv import MultiExpertConv2d

IDLE: Final = 0.1  # of an even share: below that, an expert is as good as gone


class ExpertUse:
    """Watches the routers of every slot with several experts; `shares` tells what they gave since its last call."""

    def __init__(self, student: nn.Module) -> None:
        self._slots = {
            path: _Slot(module)
            for path, module in student.named_modules()
            if isinstance(module, MultiExpertConv2d) and module.spec.experts > 1
        }

    def shares(self) -> dict[str, list[float]]:
        """By slot, every expert's mean share of the rows, of this process; slots that have not run are left out."""
        return {path: slot.mean() for path, slot in self._slots.items() if slot.rows}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away, while the student runs on what it is not trained on."""
        for slot in self._slots.values():
            slot.watches = False
        try:
            yield
        finally:
            for slot in self._slots.values():
                slot.watches = True

    def release(self) -> None:
        """Watch no longer."""
        for slot in self._slots.values():
            for handle in slot.handles:
                handle.remove()


def idle_experts(shares: Mapping[str, Sequence[float]]) -> list[str]:
    """The experts that hardly any row is given to, as `slot: number`; sigmoid shares are taken against their sum."""
    found = []
    for path, values in shares.items():
        even = sum(values) / len(values)
        found += [f"{path}: {number}" for number, value in enumerate(values) if value < IDLE * even]
    return found


class _Slot:
    """The sum of one slot's shares."""

    def __init__(self, module: MultiExpertConv2d) -> None:
        self.spec, self.rows, self.watches = module.spec, 0, True
        self._total: Tensor | None = None
        self._of_time: Tensor | None = None
        routers = [router for router in (module.time_router, module.feature_router) if router is not None]
        # The last to run completes the logits.
        self.handles = [routers[-1].register_forward_hook(self._add)]
        if len(routers) == 2:
            self.handles.append(routers[0].register_forward_hook(self._keep))

    def mean(self) -> list[float]:
        assert self._total is not None
        found = [round(value, 4) for value in (self._total / self.rows).tolist()]
        self._total, self.rows = None, 0
        return found

    def _keep(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        self._of_time = logits.detach().float()

    @torch.no_grad()
    def _add(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        if not self.watches:
            self._of_time = None
            return
        logits = logits.detach().float()
        if self._of_time is not None:
            logits, self._of_time = logits + self._of_time, None
        spec = self.spec
        shares = logits.sigmoid() if spec.mixing == "sigmoid" else (logits / spec.temperature).softmax(dim=1)
        total = shares.sum(dim=0)
        self._total = total if self._total is None else self._total + total
        self.rows += len(shares)
