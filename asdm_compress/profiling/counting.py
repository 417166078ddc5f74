"""Exact MACs and peak activation memory from one forward pass on the meta device; needs no weights and no time."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from asdm_compress.models.expert_conv import Moment, happening_at
from asdm_compress.models.tree import meta_copy

# The kind of work that an operator's multiply-accumulates belong to; anything else that the counter knows is a linear.
_CONVOLUTIONS: Final = ("convolution", "_convolution", "convolution_backward")
_ATTENTION_PRODUCTS: Final = ("bmm", "baddbmm")


@dataclass(frozen=True, slots=True)
class MacCount:
    """Multiply-accumulate operations by kind of work.

    `total` is the true count: every product of the attention matrices once. `conv_linear` leaves these products out, as
    most published tables do.
    """

    convolution: int = 0
    linear: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """Convolutions, linear layers and attention products."""
        return self.convolution + self.linear + self.attention

    @property
    def conv_linear(self) -> int:
        """Convolutions and linear layers alone."""
        return self.convolution + self.linear

    def __add__(self, other: MacCount) -> MacCount:
        return MacCount(
            self.convolution + other.convolution, self.linear + other.linear, self.attention + other.attention
        )


@dataclass(frozen=True, slots=True)
class ModuleCounts:
    """Counts by module path; the empty path is the whole UNet. Bytes are live activations at the module's peak."""

    macs: Mapping[str, MacCount]
    peak_bytes: Mapping[str, int]


def count(unet: UNet2DConditionModel, batch: int, height: int, width: int, text_tokens: int) -> ModuleCounts:
    """Count one forward pass of `batch` samples with latents of `height` x `width` cells.

    Peak bytes follow the lifetime of every tensor of an eager pass in the model's own dtype, without weights and
    without the workspace of single kernels.
    """
    twin = meta_copy(unet)
    inputs, moment = _inputs(unet, batch, height, width, text_tokens)
    memory = _LiveBytes([p.untyped_storage() for p in twin.parameters()])
    # Without the fused kernel the meta device would hold whole attention matrices, which no real device does.
    with torch.no_grad(), happening_at(moment), _FusedAttention(), memory, _tracking(twin, memory):
        twin(*inputs, return_dict=False)
    return ModuleCounts(count_macs(unet, batch, height, width, text_tokens), dict(memory.peaks))


def count_macs(
    unet: UNet2DConditionModel, batch: int, height: int, width: int, text_tokens: int
) -> dict[str, MacCount]:
    """The MACs alone of what `count` counts, in a fraction of its time."""
    inputs, moment = _inputs(unet, batch, height, width, text_tokens)
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), happening_at(moment), _WholeLinear(), flops:
        meta_copy(unet)(*inputs, return_dict=False)
    root = type(unet).__name__
    macs: dict[str, MacCount] = {}
    for name, by_operator in flops.get_flop_counts().items():
        if name == "Global":
            continue
        path = name.removeprefix(root).removeprefix(".")
        macs[path] = sum((_as_macs(op, flop) for op, flop in by_operator.items()), MacCount())
    return macs


def count_row_macs(unet: UNet2DConditionModel, height: int, width: int, text_tokens: int) -> dict[str, MacCount]:
    """The MACs of one of the two rows of an image with guidance, half of both: some modules compute both at once."""
    both = count_macs(unet, 2, height, width, text_tokens)
    return {path: MacCount(m.convolution // 2, m.linear // 2, m.attention // 2) for path, m in both.items()}


def _inputs(
    unet: UNet2DConditionModel, batch: int, height: int, width: int, text_tokens: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Moment]:
    """Sample, timestep and text without numbers; an edited UNet has to be told the time, unlike a student."""
    config, dtype = unet.config, next(unet.parameters()).dtype
    sample = torch.empty(batch, config["in_channels"], height, width, device="meta", dtype=dtype)
    text = torch.empty(batch, text_tokens, config["cross_attention_dim"], device="meta", dtype=dtype)
    timestep = torch.empty((), device="meta", dtype=torch.long)
    return (sample, timestep, text), Moment.of(timestep, batch, sample.device)


def _as_macs(operator: Any, flop: int) -> MacCount:
    name = str(operator).split(".")[1]
    if name in _CONVOLUTIONS:
        return MacCount(convolution=flop // 2)
    if name in _ATTENTION_PRODUCTS or "attention" in name:
        return MacCount(attention=flop // 2)
    return MacCount(linear=flop // 2)


class _WholeLinear(TorchFunctionMode):
    """Linear layers as one matrix product: of strided inputs torch makes batched ones, which pass for attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """Scaled-dot-product attention as the fused kernels see it: inputs and output, no matrix in between."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = inspect.signature(_attention_inputs).bind(*args, **(kwargs or {})).args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _attention_inputs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> None: ...


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that are alive, and the peak inside every open module."""

    def __init__(self, weights: list[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.weights = weights  # held, so that a view of a weight is known as no activation
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(weights)
        self.open: list[tuple[str, int]] = []
        self.peaks: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._release, size)
        self.open = [(path, max(peak, self.live)) for path, peak in self.open]

    def _release(self, size: int) -> None:
        self.live -= size

    def enter(self, path: str) -> None:
        self.open.append((path, self.live))

    def leave(self) -> None:
        path, peak = self.open.pop()
        self.peaks[path] = max(peak, self.peaks.get(path, 0))


@contextmanager
def _tracking(twin: nn.Module, memory: _LiveBytes) -> Iterator[None]:
    handles = []
    for path, module in twin.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: memory.enter(path)))
        handles.append(module.register_forward_hook(lambda *_: memory.leave()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
