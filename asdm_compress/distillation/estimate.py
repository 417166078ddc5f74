"""What a training will take, before its first step: memory by what it is for, and seconds from a measured pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from asdm_compress.core.distillation import Losses
from asdm_compress.models.families import latent_size_of
from asdm_compress.models.tree import meta_copy
from asdm_compress.models.walk import run, start, steps_of

_FP32: Final = 4
_MOMENTS: Final = 8  # AdamW's two, in fp32
_SHARED: Final = ("weights", "gradients", "optimiser", "averages")
_TIMED: Final = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device: `activations` are what a pass keeps for its backward pass, for all rows run at once.

    `encoders` are what else of the teacher's pipeline stays on the device: text encoder and VAE, for which probes and
    their pictures ask again, and its UNet too where no loss runs it. The total is without what allocators and
    convolutions' workspaces take.
    """

    weights: int
    gradients: int
    optimiser: int
    averages: int
    teacher: int
    activations: int
    encoders: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def shared(self, processes: int) -> Memory:
        """What is left on each of so many where weights and all that goes with them are sharded."""
        parts = {name: -(-getattr(self, name) // processes) for name in _SHARED}
        return replace(self, **parts)


def estimate_memory(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel | None,
    trained: int,
    rows: int,
    text_tokens: int,
    gradient_checkpointing: bool = False,
    eight_bit: bool = False,
    half: bool = False,
) -> Memory:
    """Count the memory of a training of `trained` parameters with so many rows at once, on the meta device.

    `half` is for mixed precision, which keeps activations in two bytes and weights in four. `encoder_bytes` counts what
    else of the teacher's pipeline is there.
    """
    parameters = sum(p.numel() for p in student.parameters())
    kept = saved_bytes(student, text_tokens, gradient_checkpointing) * rows
    return Memory(
        weights=_FP32 * parameters,
        gradients=_FP32 * trained,
        optimiser=(_MOMENTS // _FP32 if eight_bit else _MOMENTS) * trained,
        averages=_FP32 * parameters,
        teacher=0 if teacher is None else bytes_of(teacher),
        activations=kept // 2 if half else kept,
    )


def rows_kept(rows: int, losses: Losses) -> int:
    """Rows whose activations are there at once: those of a pass, and of every step of those that are rolled out."""
    steps = losses.trajectory_steps
    return rows + (math.ceil(rows / steps) * steps if losses.trajectory else 0)


def encoder_bytes(pipeline: StableDiffusionPipeline, runs_unet: bool = True) -> int:
    """Bytes of a teacher's pipeline beside its UNet, which counts too unless a loss runs it (`runs_unet`)."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return sum(bytes_of(part) for name, part in parts.items() if name != "unet" or not runs_unet)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def saved_bytes(unet: UNet2DConditionModel, text_tokens: int, gradient_checkpointing: bool = False) -> int:
    """Bytes in fp32 that one row's forward pass keeps for the backward pass, counted unit by unit.

    With gradient checkpointing these are the units' inputs, and everything inside the one that keeps most.
    """
    twin = meta_copy(unet).float().requires_grad_(True)
    size = latent_size_of(unet)
    sample = torch.empty(1, int(unet.config["in_channels"]), size, size, device="meta")
    text = torch.empty(1, text_tokens, int(unet.config["cross_attention_dim"]), device="meta")
    state = start(twin, sample, torch.empty((), device="meta"), text)
    weights = {p.untyped_storage() for p in twin.parameters()}
    hidden, skips = state.hidden, list[Tensor]()
    inputs, inside = 0, list[int]()
    everything: set[torch.UntypedStorage] = set()  # what several units keep is there once
    for step in steps_of(twin):
        if step.kind == "decoder-resnet":
            hidden = torch.cat((hidden, skips.pop()), dim=1)
        wanted = tuple(skips[-1].shape[2:]) if step.kind == "upsampler" and skips else None
        inputs += hidden.untyped_storage().nbytes()
        kept: set[torch.UntypedStorage] = set()

        def keep(tensor: Tensor, kept: set[torch.UntypedStorage] = kept) -> Tensor:
            kept.add(tensor.untyped_storage())
            return tensor

        with (
            torch.enable_grad(),
            _FusedAttention(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            hidden = run(step, hidden.detach().requires_grad_(True), state.conditioning, wanted)
        inside.append(sum(storage.nbytes() for storage in kept - weights))
        everything |= kept - weights
        if step.pushes_skip:
            skips.append(hidden)
    return inputs + max(inside) if gradient_checkpointing else sum(storage.nbytes() for storage in everything)


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels keep it: inputs and output. The meta device would keep the matrices between."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            fused: Any = _Kept.apply
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return fused(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class _Kept(torch.autograd.Function):
    """Shapes alone: what a fused attention saves for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, heads, tokens, width) each, to the same."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def seconds_per_pass(one_pass: Callable[[], None], device: torch.device) -> float:
    """The seconds of a forward and backward pass, the better of two after one that warms the machine up."""
    one_pass()
    seconds = []
    for _ in range(_TIMED):
        _synchronise(device)
        began = time.perf_counter()
        one_pass()
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
