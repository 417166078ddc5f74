"""What stands in a slot: modules with the call signatures of those that a plan has taken out."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from asdm_compress.models.expert_conv import Moment, MultiExpertConv2d


class IdentityResnet(nn.Module):
    """In place of a ResNet whose input and output have the same channels."""

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) unchanged."""
        return hidden_states


class ShortcutResnet(nn.Module):
    """In place of a ResNet: only its own 1 x 1 shortcut, which still mixes a skip connection in."""

    def __init__(self, conv_shortcut: nn.Module, output_scale_factor: float = 1.0) -> None:
        super().__init__()
        self.conv_shortcut = conv_shortcut
        self.output_scale_factor = output_scale_factor

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        output: Tensor = self.conv_shortcut(hidden_states)
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class DiscardSkip(nn.Module):
    """In place of a decoder ResNet: the hidden state goes on, the skip connection concatenated to it is discarded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C + C_skip, H, W) to (B, C, H, W)."""
        return hidden_states[:, : self.channels]


class IdentityTransformer(nn.Module):
    """In place of a Transformer2DModel, whose residual connection goes around all of it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """(B, C, H, W) unchanged, in a tuple as the blocks expect it."""
        return (hidden_states,)


class PartialTransformerBlock(nn.Module):
    """A BasicTransformerBlock without some of its sub-units; what stays keeps its name and weights."""

    def __init__(self, block: nn.Module, dropped: frozenset[str]) -> None:
        super().__init__()
        self.norm1, self.attn1 = _kept(block, dropped, "norm1", "attn1")
        self.norm2, self.attn2 = _kept(block, dropped, "norm2", "attn2")
        self.norm3, self.ff = _kept(block, dropped, "norm3", "ff")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """(B, tokens, C) to (B, tokens, C)."""
        extra = cross_attention_kwargs or {}
        if self.norm1 is not None and self.attn1 is not None:
            attended = self.attn1(self.norm1(hidden_states), attention_mask=attention_mask, **extra)
            hidden_states = attended + hidden_states
        if self.norm2 is not None and self.attn2 is not None:
            attended = self.attn2(
                self.norm2(hidden_states),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **extra,
            )
            hidden_states = attended + hidden_states
        if self.norm3 is not None and self.ff is not None:
            hidden_states = self.ff(self.norm3(hidden_states)) + hidden_states
        return hidden_states


def _kept(block: nn.Module, dropped: frozenset[str], norm: str, part: str) -> tuple[nn.Module | None, nn.Module | None]:
    if part in dropped or getattr(block, part, None) is None:
        return None, None
    return block.get_submodule(norm), block.get_submodule(part)


class PooledDownsampler(nn.Module):
    """In place of a strided convolution: the mean of every 2 x 2 patch."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2)), as the strided convolution rounds."""
        return F.avg_pool2d(hidden_states, 2, ceil_mode=True)


class NearestUpsampler(nn.Module):
    """In place of an upsampling convolution: nearest-neighbour interpolation alone."""

    def forward(
        self, hidden_states: Tensor, output_size: tuple[int, int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W), or to `output_size`."""
        if output_size is None:
            return F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return F.interpolate(hidden_states, size=tuple(output_size), mode="nearest")


class ConvResnet(nn.Module):
    """In place of a ResNet: a multi-expert convolution, added to the input or to the ResNet's own 1 x 1 shortcut.

    Where widths differ and the convolution is dense, it has taken the shortcut in, and nothing is added.
    """

    def __init__(self, slot: MultiExpertConv2d, conv_shortcut: nn.Module | None, output_scale_factor: float) -> None:
        super().__init__()
        self.slot, self.conv_shortcut, self.output_scale_factor = slot, conv_shortcut, output_scale_factor

    @property
    def adds_input(self) -> bool:
        """Whether the input itself is the shortcut."""
        return self.conv_shortcut is None and self.slot.in_channels == self.slot.out_channels

    def around(self, hidden_states: Tensor) -> Tensor | None:
        """What the convolution's output is added to."""
        if self.conv_shortcut is not None:
            output: Tensor = self.conv_shortcut(hidden_states) / self.output_scale_factor
            return output
        return hidden_states if self.adds_input else None

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, *args: Any, moment: Moment | None = None, **kwargs: Any
    ) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        output: Tensor = self.slot(hidden_states, moment)
        around = self.around(hidden_states)
        return output if around is None else output + around


class ConvTransformer(nn.Module):
    """In place of a Transformer2DModel: its input plus a multi-expert convolution of it."""

    def __init__(self, slot: MultiExpertConv2d) -> None:
        super().__init__()
        self.slot = slot

    def forward(self, hidden_states: Tensor, *args: Any, moment: Moment | None = None, **kwargs: Any) -> tuple[Tensor]:
        """(B, C, H, W) to the same, in a tuple as the blocks expect it."""
        return (hidden_states + self.slot(hidden_states, moment),)


class ConvDownsampler(nn.Module):
    """In place of a strided convolution: the mean of every 2 x 2 patch, plus a multi-expert convolution of it."""

    def __init__(self, slot: MultiExpertConv2d) -> None:
        super().__init__()
        self.slot = slot

    def forward(self, hidden_states: Tensor, *args: Any, moment: Moment | None = None, **kwargs: Any) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        pooled = F.avg_pool2d(hidden_states, 2, ceil_mode=True)
        output: Tensor = pooled + self.slot(pooled, moment)
        return output


class ConvUpsampler(nn.Module):
    """In place of an upsampling convolution: a multi-expert one before the interpolation, on fewer pixels."""

    def __init__(self, slot: MultiExpertConv2d) -> None:
        super().__init__()
        self.slot = slot
        self.interpolate = NearestUpsampler()

    def forward(
        self,
        hidden_states: Tensor,
        output_size: tuple[int, int] | None = None,
        *args: Any,
        moment: Moment | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W), or to `output_size`."""
        output: Tensor = self.interpolate(hidden_states + self.slot(hidden_states, moment), output_size)
        return output


SlotModule = ConvResnet | ConvTransformer | ConvDownsampler | ConvUpsampler


def takes_moment(module: nn.Module) -> bool:
    """Whether a module in a unit's place wants to know the timestep."""
    slot = getattr(module, "slot", None)
    return isinstance(slot, MultiExpertConv2d) and slot.spec.needs_timestep
