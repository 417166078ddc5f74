"""The ControlNet class for students: with a student's encoder, or with the residuals that a student has takers for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from diffusers import ControlNetModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetOutput, zero_module
from torch import Tensor, nn

from asdm_compress.core.edits import Edit, conv_spec
from asdm_compress.models.edits import apply_edits
from asdm_compress.models.expert_conv import Moment, happening_at
from asdm_compress.models.signatures import with_parameters_of
from asdm_compress.models.sites import modules_of


class AssembledControlNetModel(ControlNetModel):  # type: ignore[misc]
    """A ControlNet (2302.05543) that may lack its mid block, have another number of layers in every level, and slots.

    `edits` maps paths of the encoder and the mid block to edits, as in `AssembledUNet2DConditionModel`; `skips` are the
    numbers of the residuals that are given, in their order (all of them by default); every other parameter is the base
    class's, and `layers_per_block` may have a value per level and `mid_block_type` be None. Saving and loading are
    diffusers' own.
    """

    # For the same reason as `AssembledUNet2DConditionModel`'s.
    __module__ = "asdm_compress"

    @register_to_config  # type: ignore[untyped-decorator]
    @with_parameters_of(ControlNetModel, "edits", "skips")
    def __init__(
        self,
        *args: Any,
        layers_per_block: int | Sequence[int] = 2,
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        edits: Mapping[str, Edit] | None = None,
        skips: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        depths = [layers_per_block] if isinstance(layers_per_block, int) else list(layers_per_block)
        # The base class knows neither: it builds every level as deep as the deepest, and the smallest mid block.
        super().__init__(
            *args, layers_per_block=max(depths), mid_block_type=mid_block_type or "UNetMidBlock2D", **kwargs
        )
        self.register_to_config(layers_per_block=layers_per_block, mid_block_type=mid_block_type)
        if len(depths) > 1:
            self._shorten(depths)
        if mid_block_type is None:
            self.mid_block = None
        apply_edits(self, edits or {})
        specs = [conv_spec(edit) for edit in (edits or {}).values()]
        self.is_routed = any(spec is not None and spec.needs_timestep for spec in specs)

    def _shorten(self, depths: Sequence[int]) -> None:
        """Leave so many layers in each level, and one zero convolution per skip connection."""
        widths = [self.conv_in.out_channels]
        for block, depth in zip(self.down_blocks, depths, strict=True):
            block.resnets = block.resnets[:depth]
            if modules_of(block, "attentions"):
                block.attentions = block.attentions[:depth]
            widths += [resnet.out_channels for resnet in block.resnets]
            widths += [sampler.out_channels for sampler in modules_of(block, "downsamplers")]
        self.controlnet_down_blocks = nn.ModuleList([zero_module(nn.Conv2d(width, width, 1)) for width in widths])

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """As the base class: the residuals of the skip connections that are given, and that of the mid block.

        Routed slots are told the timestep by a context variable; neither compiling nor gradient checkpointing sees it.
        """
        moment = Moment.of(timestep, sample.shape[0], sample.device) if self.is_routed else None
        with nullcontext() if moment is None else happening_at(moment):
            residuals, mid = super().forward(sample, timestep, *args, return_dict=False, **kwargs)
        if self.config["skips"] is not None:
            residuals = [residuals[i] for i in self.config["skips"]]
        if not return_dict:
            return residuals, mid
        return ControlNetOutput(down_block_res_samples=tuple(residuals), mid_block_res_sample=mid)
