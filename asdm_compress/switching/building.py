"""What members are built from, and which UNets may be members of one model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.members import HasMembers
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel


def plain_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The base class's parameters of a UNet, by name."""
    names = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    return {key: value for key, value in unet.config.items() if key in names}


def build(config: Mapping[str, Any], edits: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet of this configuration; with edits an assembled one."""
    return AssembledUNet2DConditionModel(**config, edits=dict(edits)) if edits else UNet2DConditionModel(**config)


def as_list(value: Any) -> Any:
    """A tuple as the list that it becomes in a file."""
    return list(value) if isinstance(value, tuple) else value


def check_plain(name: str, unet: UNet2DConditionModel) -> None:
    """Raise AsdmError for a UNet that is switched itself, of which the body alone would be taken."""
    if isinstance(unet, HasMembers):
        raise AsdmError(f"{name} is a switched UNet itself", "Give its members.")


def check_exchangeable(first: str, one: UNet2DConditionModel, second: str, other: UNet2DConditionModel) -> None:
    """Raise AsdmError for UNets that do not take and give the same, and for another that is switched itself."""
    check_plain(second, other)
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        a, b = as_list(one.config.get(key)), as_list(other.config.get(key))
        if a != b:
            raise AsdmError(f"{first} and {second} cannot take turns: {key} is {a} and {b}")
    if (one.dtype, one.device) != (other.dtype, other.device):
        raise AsdmError(
            f"{first} and {second} cannot take turns: one is {one.dtype} on {one.device}, the other {other.dtype} on "
            f"{other.device}",
            "Open both in one precision and on one device.",
        )
