"""The student class: a UNet that rebuilds its edits from its own `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from asdm_compress.core.edits import Edit, conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.call import UNetCall
from asdm_compress.models.edits import apply_edits
from asdm_compress.models.expert_conv import Moment, happening_at
from asdm_compress.models.loader import write_loader
from asdm_compress.models.residuals import NONE_ADDED, AddedResiduals
from asdm_compress.models.shared import SharedResnet
from asdm_compress.models.signatures import with_parameters_of
from asdm_compress.models.walk import finish, steps_of


class AssembledUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """A Stable Diffusion UNet with slots in the places of the modules that an assembly plan has taken out.

    `edits` maps unit and sub-unit paths to edits (see `core.edits`): convolutions, narrowings, `drop` and others; every
    other parameter is the base class's. Without edits the class is its base class. Saving and loading are diffusers'
    own, except that loading a folder whose weights do not fit the config raises AsdmError, where the base class would
    fill the gaps with random numbers.
    """

    # A saved pipeline names this as the class's library, and diffusers takes it from what has been imported: so
    # `import asdm_compress` is enough, and stays right wherever the class moves inside the package.
    __module__ = "asdm_compress"
    # Modules that accelerate keeps on one device are known by the names of their classes.
    _no_split_modules = [*UNet2DConditionModel._no_split_modules, SharedResnet.__name__]  # noqa: RUF012 - the base's

    @register_to_config  # type: ignore[untyped-decorator]
    @with_parameters_of(UNet2DConditionModel, "edits")
    def __init__(self, *args: Any, edits: Mapping[str, Edit] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        apply_edits(self, edits or {})
        specs = [conv_spec(edit) for edit in (edits or {}).values()]
        self.is_routed = any(spec is not None and spec.needs_timestep for spec in specs)

    @apply_lora_scale("cross_attention_kwargs")  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913, PLR0917 - the base class's signature
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: list[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As the base class: (B, C, H, W) to the same.

        The blocks of diffusers do not tell their modules the timestep. Where a convolution is routed by it, a context
        variable does; compiled, or with gradient checkpointing, which runs modules again when that is gone, the pass
        is made step by step instead.
        """
        checkpointed = torch.is_grad_enabled() and self.is_gradient_checkpointing
        added = NONE_ADDED
        if self.is_routed:
            added = AddedResiduals(
                down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals
            )
            added.check_count(sum(step.pushes_skip for step in steps_of(self)))
        if not (self.is_routed and (checkpointed or torch.compiler.is_compiling())):
            moment = Moment.of(timestep, sample.shape[0], sample.device) if self.is_routed else None
            with nullcontext() if moment is None else happening_at(moment):
                return super().forward(
                    sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask,
                    cross_attention_kwargs, added_cond_kwargs, down_block_additional_residuals,
                    mid_block_additional_residual, down_intrablock_additional_residuals, encoder_attention_mask,
                    return_dict,
                )  # fmt: skip
        call = UNetCall(
            sample, timestep, encoder_hidden_states, timestep_cond, attention_mask, cross_attention_kwargs,
            added_cond_kwargs, encoder_attention_mask=encoder_attention_mask,
        )  # fmt: skip
        prediction = finish(steps_of(self), call.begin(self), added, _checkpoint if checkpointed else None)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As the base class, with a loader for places where this package is not installed (see `models.loader`)."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        write_loader(Path(save_directory), type(self).__name__)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As the base class, which would remark on the loader's entry in the config."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the base class, but any missing, unexpected or mismatched weight raises AsdmError."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = {
            kind: [str(key) for key in info[kind]]
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        }
        if problems:
            kind, keys = next(iter(problems.items()))
            raise AsdmError(
                f"the weights in {args[0] if args else 'the folder'} do not fit its config.json: "
                f"{len(keys)} {kind.replace('_', ' ')}, the first is {keys[0]}",
                "The folder is damaged or was edited by hand; make it again with `asdm-compress apply`.",
            )
        return (model, info) if wants_info else model


def _checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    output: Tensor = checkpoint(function, *args, use_reentrant=False)
    return output
