"""One call of a UNet's forward with its arguments by name, and the half of it that carries the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.expert_conv import Moment
from asdm_compress.models.residuals import AddedResiduals
from asdm_compress.models.walk import State, start

_ORDER: Final = (
    "class_labels", "timestep_cond", "attention_mask", "cross_attention_kwargs", "added_cond_kwargs",
    "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
    "encoder_attention_mask",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class UNetCall:
    """The arguments of `UNet2DConditionModel.forward` that a Stable Diffusion UNet heeds, under diffusers' names."""

    sample: Tensor
    timestep: Tensor | float
    encoder_hidden_states: Tensor
    timestep_cond: Tensor | None = None
    attention_mask: Tensor | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    added_cond_kwargs: Mapping[str, Any] | None = None
    down_block_additional_residuals: Sequence[Tensor] | None = None
    mid_block_additional_residual: Tensor | None = None
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None
    encoder_attention_mask: Tensor | None = None

    @staticmethod
    def of(
        sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *args: Any, **named: Any
    ) -> UNetCall:
        """The call with these arguments, in the order of `UNet2DConditionModel.forward`.

        Raises AsdmError for class labels, which no Stable Diffusion UNet takes.
        """
        named |= dict(zip(_ORDER, args, strict=False))
        if named.pop("class_labels", None) is not None:
            raise AsdmError("a Stable Diffusion UNet takes no class labels")
        return UNetCall(sample, timestep, encoder_hidden_states, **named)

    def arguments(self) -> dict[str, Any]:
        """By name, for `UNet2DConditionModel.forward`."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def has_both_branches(self) -> bool:
        """Whether the rows are two halves with the same samples and other texts, as those of guidance are.

        Of two pictures that only begin with the same noise this ceases to be so after one step.
        """
        half, odd = divmod(len(self.sample), 2)
        if odd or self.encoder_hidden_states.shape[0] != len(self.sample):
            return False
        sample, texts = self.sample, self.encoder_hidden_states
        return torch.equal(sample[:half], sample[half:]) and not torch.equal(texts[:half], texts[half:])

    def second_half(self) -> UNetCall:
        """The call for the second half of the rows, which in diffusers' pipelines are those with the prompt."""
        return self.rows(slice(len(self.sample) // 2, None))

    def rows(self, picked: slice | Tensor) -> UNetCall:
        """The call for some of the rows."""
        rows = len(self.sample)

        def part_of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[picked] if value.ndim and len(value) == rows else value
            if isinstance(value, Mapping):
                return {key: part_of(part) for key, part in value.items()}
            if isinstance(value, (list, tuple)):
                return [part_of(part) for part in value]
            return value

        # Attention settings are no rows: masks of an IP-Adapter are one for each adapter.
        parts = {name: part_of(getattr(self, name)) for name in self.__slots__ if name != "cross_attention_kwargs"}
        return replace(self, **parts)

    def added(self) -> AddedResiduals:
        """What a ControlNet or a T2I-Adapter adds."""
        return AddedResiduals(
            self.down_block_additional_residuals,
            self.mid_block_additional_residual,
            self.down_intrablock_additional_residuals,
        )

    def begin(self, unet: UNet2DConditionModel, moment: Moment | None = None) -> State:
        """The state before `conv_in`, the text as the UNet's own projection leaves it."""
        text = unet.process_encoder_hidden_states(
            encoder_hidden_states=self.encoder_hidden_states, added_cond_kwargs=self.added_cond_kwargs
        )
        attention = {
            "cross_attention_kwargs": self.cross_attention_kwargs,
            "attention_mask": _as_bias(self.attention_mask, self.sample),
            "encoder_attention_mask": _as_bias(self.encoder_attention_mask, self.sample),
        }
        return start(unet, self.sample, self.timestep, text, self.timestep_cond, attention, moment)


def _as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask (B, tokens), 1 to keep and 0 to discard, as what is added to the attention scores, (B, 1, tokens)."""
    return None if mask is None else ((1 - mask.to(like.dtype)) * -10000.0).unsqueeze(1)
