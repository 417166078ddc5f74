"""What a file of weights is, by the names in it, where it is no Stable Diffusion 1.x or 2.x UNet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import torch
from torch import Tensor

from asdm_compress.core.errors import AsdmError

# Parts of names that tell a kind of file; the first kind of which a name has one is the answer.
_KINDS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "a LoRA, which changes a checkpoint and is none itself",
        (".lora_down.", ".lora_A.", ".lora.down.", ".hada_w1_a", ".lokr_w1", ".oft_", "lora_unet_", "lora_te_"),
    ),
    ("a Flux model, which is not supported", ("double_blocks.", "single_transformer_blocks.")),
    ("a Stable Diffusion 3 model, which is not supported", ("joint_blocks.", "context_embedder.")),
    ("a Stable Diffusion unCLIP model, which is not supported", ("noise_augmentor.", "embedder.model.visual.")),
    ("a Stable Diffusion XL model, which is not supported", ("conditioner.embedders.", "label_emb.", "add_embedding.")),
    ("a ControlNet", ("control_model.", "controlnet_down_blocks.", "controlnet_cond_embedding.")),
    ("a T2I-Adapter", ("adapter.body.", "adapter.conv_in.")),
    ("an IP-Adapter", ("ip_adapter.", "image_proj.")),
    ("a motion module", ("motion_modules.",)),
    ("a textual-inversion embedding", ("emb_params", "string_to_param", "clip_g")),
    ("a VAE", ("first_stage_model.", "post_quant_conv.", "decoder.conv_in.")),
    ("a text encoder", ("cond_stage_model.", "text_model.", "token_embedding.")),
)
SHOWN: Final = 3
ONLY: Final = "Give a UNet or a whole checkpoint of Stable Diffusion 1.x or 2.x."


# Kinds that a file is of whatever else is in it.
_FOREIGN: Final = ("a LoRA", "a Flux", "a Stable Diffusion ", "a ControlNet")


def foreign_kind(names: Collection[str]) -> str | None:
    """The kind of file that has tensors of these names, where it is one that no UNet of 1.x or 2.x is found in."""
    kind = what_is(names)
    return kind if kind is not None and kind.startswith(_FOREIGN) else None


def what_is(names: Collection[str]) -> str | None:
    """The kind of file that has tensors of these names, or None where nothing is recognised."""
    for kind, marks in _KINDS:
        if any(mark in name for name in names for mark in marks):
            return kind
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds finite numbers alone.

    By its least and largest number, which are none where any is: on a CPU some 20 times as fast as a look at each.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    whole = tensor.half() if tensor.dtype.itemsize == 1 else tensor  # which floats of 8 bits are not compared in
    return all(bool(end.isfinite()) for end in torch.aminmax(whole))


def check_numbers(place: object, weights: Mapping[str, Tensor]) -> None:
    """Raise AsdmError, naming tensors, where weights are no finite numbers."""
    bad = [name for name, tensor in weights.items() if not tensor.is_meta and not is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise AsdmError(
            f"the weights in {place} are not all finite numbers: {', '.join(bad[:SHOWN])}{more}",
            "The file is damaged, or its training diverged.",
        )
