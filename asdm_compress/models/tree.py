"""Copies of a module tree whose modules are new and whose tensors are chosen by the caller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
# What accelerate, diffusers, torch and runs that inherit features set on an instance, bound to the original.
_AROUND_FORWARD: Final = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")


def copy_tree(module: ModuleT, parameter: Callable[[nn.Parameter], nn.Parameter]) -> ModuleT:
    """A copy with new modules everywhere, hooks left behind, and `parameter(p)` in the place of every parameter p."""
    twin: ModuleT = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._modules = {name: None if m is None else copy_tree(m, parameter) for name, m in module._modules.items()}
    twin._parameters = {name: None if p is None else parameter(p) for name, p in module._parameters.items()}
    twin._buffers = dict(module._buffers)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(twin, hooks, type(getattr(module, hooks))())
    _free(twin)
    return twin


def meta_copy(module: ModuleT) -> ModuleT:
    """A copy with its parameters on the meta device; nothing of the original's tensors is read."""

    def on_meta(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)

    twin = copy_tree(module, on_meta)
    for part in twin.modules():
        part._buffers = {k: None if b is None else torch.empty_like(b, device="meta") for k, b in part._buffers.items()}
    return twin


def sharing_copy(module: ModuleT) -> ModuleT:
    """A copy with the very parameters of the original."""
    return copy_tree(module, lambda p: p)


def shallow_copy(module: ModuleT) -> ModuleT:
    """A copy whose list of children is its own, and whose hooks are: one put on the copy is none of the original's."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.__dict__ |= {name: copy.copy(value) for name, value in module.__dict__.items() if "_hooks" in name}
    _free(twin)
    return twin


def _free(twin: nn.Module) -> None:
    """Let a copy's calls be its own: what stands around the original's forward would call the original."""
    for name in _AROUND_FORWARD:
        twin.__dict__.pop(name, None)
