"""What a trainer asks of one device or several: every process with the whole student, or with a share of it.

`Engine` is accelerate as it comes: one process, or data parallelism (DDP). `ShardedEngine` is torch's fully sharded
data parallelism (FSDP2, `fully_shard`): weights, gradients, the optimiser's states and the averages are spread over the
processes, unit by unit. It is called here and not by accelerate, which shards on accelerators alone and takes a model
and its optimiser together once, where a training has phases with an optimiser each.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, cast

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.features import FeatureUNet
from asdm_compress.models.walk import steps_of

_SHARDS: Final = "shards"
_KIND: Final = "engine.json"


class Engine:
    """One process, or several with all of the student each."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def kind(self) -> str:
        """What has to be the same for a training to go on, in words: weights and scaler lie there otherwise."""
        several = "in one process" if self.accelerator.num_processes == 1 else "in several processes"
        return several + (", with --dtype fp16" if self.accelerator.mixed_precision == "fp16" else "")

    def begin(self, student: UNet2DConditionModel) -> None:
        """Called once, before anything is hung onto the student."""

    def place(self, wrapped: FeatureUNet, trained: Collection[str]) -> None:
        """Called once, before the averages are made; `trained` are the parameters that train in any phase."""

    def prepare(self, wrapped: FeatureUNet, optimiser: torch.optim.Optimizer, compiled: bool) -> tuple[Any, Any]:
        """The model to call and the optimiser to step, for one phase."""
        if compiled:
            wrapped.compile()  # in its place: the names in a checkpoint are those of a training that is not compiled
        model, prepared = self.accelerator.prepare(wrapped, optimiser)
        return model, prepared

    @contextmanager
    def passing(self, model: Any, last: bool) -> Iterator[None]:
        """Around one of the passes of a step; gradients are exchanged in the last."""
        with nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`; the norm before."""
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm

    @contextmanager
    def averaged(self, student: UNet2DConditionModel, average: EMAModel) -> Iterator[UNet2DConditionModel]:
        """The student with its averaged weights, on the main process; the others get it as it is."""
        if not self.accelerator.is_main_process:
            yield student
            return
        average.store(student.parameters())
        average.copy_to(student.parameters())
        try:
            yield student
        finally:
            average.restore(student.parameters())

    def save(self, folder: Path, student: nn.Module, optimiser: Any, average: EMAModel) -> None:
        """Write weights, optimiser and averages; every process calls this with the same folder."""
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            self.leave_kind(folder)
            torch.save(average.state_dict(), folder / "averages.pt")

    def load_average(self, folder: Path, student: nn.Module, average: EMAModel) -> None:
        """Put back what `save` has written of the averages, but for the number of their steps."""
        average.load_state_dict(torch.load(folder / "averages.pt", map_location="cpu", weights_only=True))
        average.to(self.accelerator.device)

    def load(self, folder: Path, student: nn.Module, optimiser: Any) -> None:
        """Put back what `save` has written of weights and optimiser, after `prepare`."""
        self.accelerator.load_state(str(folder))

    def finish(self, student: UNet2DConditionModel, average: EMAModel, weights: dict[str, Tensor] | None) -> Any:
        """The student, whole and with `weights` or else the averages; meant for the main process."""
        if weights is None:
            average.copy_to(student.parameters())
        else:
            student.load_state_dict(weights)
        return student

    def leave_kind(self, folder: Path) -> None:
        """Write down what kind of engine a checkpoint is of."""
        (folder / _KIND).write_text(json.dumps({"kind": self.kind}), encoding="utf-8")

    def check(self, folder: Path) -> None:
        """Raise AsdmError for a checkpoint that another kind of engine has written, an error of reading for none."""
        written = json.loads((folder / _KIND).read_text(encoding="utf-8"))["kind"]
        if written != self.kind:
            raise AsdmError(
                f"the checkpoint {folder} is of a training {written}, and this is one {self.kind}",
                "Go on as it was begun: the same launch, --shard and --dtype.",
            )


class ShardedEngine(Engine):
    """Several processes with a share of the student each. Numbers are too small to be shared: everybody has them."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._whole: UNet2DConditionModel | None = None
        self._trained: frozenset[str] = frozenset()
        self._numbers: list[nn.Parameter] = []

    @property
    def kind(self) -> str:
        """As the base's; of how many processes does not matter."""
        return f"{super().kind}, with --shard"

    def begin(self, student: UNet2DConditionModel) -> None:
        """The main process keeps a whole one on the CPU, for probes and the end."""
        if self.accelerator.is_main_process:
            self._whole = copy.deepcopy(student).to("cpu").eval().requires_grad_(False)

    def place(self, wrapped: FeatureUNet, trained: Collection[str]) -> None:
        """Share it out, each unit by itself, so that one at a time is whole on a device.

        Not each block: with gradient checkpointing a student runs unit by unit.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        unet = wrapped.unet
        self._trained = frozenset(trained)
        self._thaw(unet)
        self._numbers = [parameter for parameter in unet.parameters() if parameter.dim() == 0]
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for module in (module for step in steps_of(unet) for module in step.modules):
            if any(parameter.dim() for parameter in module.parameters()):
                fully_shard(module, mesh=mesh, ignored_params=set(self._numbers))
        fully_shard(wrapped, mesh=mesh, ignored_params=set(self._numbers))

    def prepare(self, wrapped: FeatureUNet, optimiser: torch.optim.Optimizer, compiled: bool) -> tuple[Any, Any]:
        """As they are; the optimiser's states are made now, as it would make them, so that a checkpoint has them."""
        self._thaw(wrapped.unet)
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                at = parameter.device if group.get("fused") else "cpu"
                optimiser.state[parameter] = {
                    "step": torch.zeros((), device=at),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return wrapped, optimiser

    @contextmanager
    def passing(self, model: Any, last: bool) -> Iterator[None]:
        """As the base's."""
        model.set_requires_gradient_sync(last)
        yield

    @torch.no_grad()
    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """As the base's; what everybody has gets the mean of its gradients here."""
        for number in self._numbers:
            if number.grad is not None:
                number.grad = cast(Tensor, self.accelerator.reduce(number.grad, "mean"))
        shared = torch.zeros((), device=self.accelerator.device)
        alone = torch.zeros_like(shared)
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                continue
            part = _part(parameter.grad)
            gradients.append(part)
            squares = part.float().square().sum()
            if part is parameter.grad:
                alone += squares
            else:
                shared += squares
        norm = (cast(Tensor, self.accelerator.reduce(shared, "sum")) + alone).sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))
        return norm

    @contextmanager
    def averaged(self, student: UNet2DConditionModel, average: EMAModel) -> Iterator[UNet2DConditionModel]:
        """The whole student that the main process keeps, with the averages of all; the others give their shares."""
        self._gather(average)
        if self._whole is None:
            yield student
            return
        self._whole.to(self.accelerator.device)
        try:
            yield self._whole
        finally:
            self._whole.to("cpu")

    def save(self, folder: Path, student: nn.Module, optimiser: Any, average: EMAModel) -> None:
        """As the base's, each process its share."""
        from torch.distributed.checkpoint.state_dict_saver import save

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on formats that torch itself uses
            save(_shares(student, optimiser, average), checkpoint_id=str(folder / _SHARDS))
        if self.accelerator.is_main_process:
            self.leave_kind(folder)

    def load_average(self, folder: Path, student: nn.Module, average: EMAModel) -> None:
        """As the base's; the number of processes may be another than when it was written."""
        self._load(folder, _shares(student, None, average))

    def load(self, folder: Path, student: nn.Module, optimiser: Any) -> None:
        """As the base's."""
        self._load(folder, _shares(student, optimiser, None))

    def finish(self, student: UNet2DConditionModel, average: EMAModel, weights: dict[str, Tensor] | None) -> Any:
        """As the base's."""
        self._gather(average)
        if self._whole is None:
            return student
        if weights is not None:
            self._whole.load_state_dict(weights)
        return self._whole

    def _thaw(self, student: nn.Module) -> None:
        """Let everything that trains in any phase have gradients: torch fixes at the first pass what has."""
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in self._trained)

    def _load(self, folder: Path, into: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(into, checkpoint_id=str(folder / _SHARDS))

    @torch.no_grad()
    def _gather(self, average: EMAModel) -> None:
        """Bring the averages of all processes into the whole student, one tensor at a time."""
        targets: Any = self._whole.parameters() if self._whole is not None else [None] * len(average.shadow_params)
        for share, target in zip(average.shadow_params, targets, strict=True):
            found = _whole(share)
            if target is not None:
                target.copy_(found)


def _shares(student: nn.Module, optimiser: Any, average: EMAModel | None) -> dict[str, Any]:
    """This process's part of a checkpoint, by names that do not depend on how it is shared out."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    content: dict[str, Any] = {}
    if average is None or optimiser is not None:
        content["student"] = {name: parameter.detach() for parameter, name in names.items()}
    if average is not None:
        content["averages"] = dict(zip(names.values(), average.shadow_params, strict=True))
    if optimiser is not None:
        content["optimiser"] = {names[p]: dict(state) for p, state in optimiser.state.items()}
    return content


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that the processes share, whole on each; every process calls this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that the processes share, or the tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
