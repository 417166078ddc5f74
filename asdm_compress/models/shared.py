"""What both guidance branches have in common is computed once: modules that run before the text comes in.

Under classifier-free guidance (Ho and Salimans, 2207.12598) every image is two rows of the batch, with the same latents
and timestep and other texts. Up to the first cross-attention both rows are the same numbers, which a plain UNet
computes twice. Where the halves of a batch are not equal, the modules here do what they always did. Hooks on their
parts see half of the rows.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from asdm_compress.models.graphs import in_a_graph
from asdm_compress.models.tree import shallow_copy

# Others may treat the rows of a batch differently, as those of perturbed-attention guidance do.
_ROW_BY_ROW: Final = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


class SharedResnet(ResnetBlock2D):  # type: ignore[misc]
    """A ResNet that computes one half of a batch whose halves are equal."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) and time embedding (B, D) to (B, C_out, H, W), as the base class."""
        half = _equal_half(self, input_tensor, temb)
        if half is None:
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        return _twice(super().forward(input_tensor[:half], None if temb is None else temb[:half], *args, **kwargs))


class SharedAttention(Attention):  # type: ignore[misc]
    """A self-attention that computes one half of a batch whose halves are equal."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """(B, tokens, C) to the same, as the base class; with a mask, or a processor of others, always in full."""
        plain = encoder_hidden_states is None and not args and all(value is None for value in kwargs.values())
        half = _equal_half(self, hidden_states) if plain and type(self.processor) in _ROW_BY_ROW else None
        if half is None:
            return super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        return _twice(super().forward(hidden_states[:half]))


_SHARED: Final[dict[type, type]] = {ResnetBlock2D: SharedResnet, Attention: SharedAttention}


def can_be_shared(module: Any) -> bool:
    """Whether there is a shared form of a module."""
    return type(module) in _SHARED


def shared(module: Any) -> Any:
    """A module's shared form, with its very parameters."""
    twin = shallow_copy(module)
    twin.__class__ = _SHARED[type(module)]
    return twin


def _equal_half(module: nn.Module, *inputs: Tensor | None) -> int | None:
    """The rows of one half where the halves of all inputs are equal; None where they are not or nobody can look.

    In training rows have noise of their own. On a GPU to look is to wait for it, once. Without numbers, which is where
    costs are counted, an even batch is taken for one with guidance.
    """
    given = [tensor for tensor in inputs if tensor is not None]
    if in_a_graph(given[0].device):
        return None
    rows = given[0].shape[0]
    if rows % 2 or any(tensor.shape[0] != rows for tensor in given):
        return None
    half, device = rows // 2, given[0].device.type
    if device == "meta":
        return half
    if module.training or torch.is_grad_enabled():
        return None
    if device == "cpu":
        return half if all(torch.equal(t[:half], t[half:]) for t in given) else None
    return half if bool(torch.stack([(t[:half] == t[half:]).all() for t in given]).all()) else None


def _twice(output: Tensor) -> Tensor:
    return torch.cat([output, output])
