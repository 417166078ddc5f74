"""The matrix's columns: the teacher and students of it, each with diffusers' own forward pass of the edited teacher."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.other_starts import random_start
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.edits import Edit
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.expert_conv import Moment, happening_at

NARROWED_ATTENTION = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
PLANS: Mapping[str, Mapping[str, Edit]] = {
    "teacher": {},
    "stock student": load_recipe(find_recipe("bk-sdm-tiny-v1")).as_edits(),
    "timestep experts": {
        "down_blocks.0.resnets.0": "shared",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": "shared",
        "down_blocks.1.layers.1": "conv1x1*4@timestep",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn1": "drop",
        "mid_block.attentions.0": "conv1x1*4@timestep",
        "up_blocks.1.upsamplers.0": "subpixel",
        "up_blocks.2.resnets.1": "separable3x3*4@timestep",
        "up_blocks.3.attentions.0": "conv3x3*4@timestep",
        "up_blocks.3.resnets.2": "shortcut",
    },
    "no mid block": {"mid_block": "drop"},
    "narrowed": {
        "down_blocks.0.resnets.0": "narrow0.5",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1": "narrow0.5",
        "up_blocks.1.attentions.1.transformer_blocks.0.ff": "narrow0.75",
        NARROWED_ATTENTION: "narrow0.5",
        "up_blocks.3.resnets.1": "narrow0.25",
    },
}


@dataclass(frozen=True)
class Subject:
    """One column: a pipeline's UNet cut by a plan, with random kernels where it has convolutions of its own."""

    name: str
    teacher: StableDiffusionPipeline
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", Plan(PLANS[self.name]))

    @cached_property
    def weights(self) -> SlotWeights:
        """Small random kernels, so that slots do something and pictures stay pictures."""
        random = random_start(self.teacher.unet, self.plan)
        return {
            unit: {n: 0.3 * t if n.startswith("weights.") else t for n, t in w.items()} for unit, w in random.items()
        }

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The UNet itself; checks that change it take `fresh`."""
        return assemble(self.teacher.unet, self.plan, self.weights)

    def fresh(self) -> UNet2DConditionModel:
        """A copy of the UNet."""
        return copy.deepcopy(self.unet)

    def reference(self, teacher: UNet2DConditionModel | None = None) -> UNet2DConditionModel:
        """The teacher, or another UNet like it, edited in place: no renumbering, diffusers' own forward."""
        unet = edited(teacher or self.teacher.unet, self.plan, self.weights)
        _tell_the_moment(unet)
        return unet

    @property
    def is_teacher(self) -> bool:
        """Whether there is nothing to compare with."""
        return not self.plan.edits

    def pipeline(self, unet: UNet2DConditionModel, kind: Any = StableDiffusionPipeline, **parts: Any) -> Any:
        """A pipeline of any kind with a UNet and, beside its own text encoder, tokenizer and VAE, further parts."""
        components = {**self.teacher.components, **parts, "unet": unet}
        components["scheduler"] = copy.deepcopy(components["scheduler"])
        taken = inspect.signature(kind.__init__).parameters
        components = {name: part for name, part in components.items() if name in taken}
        made: DiffusionPipeline = kind(**components, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """A noisy latent, one timestep, and a text, for two images."""
        generator = torch.Generator().manual_seed(5)
        sample = torch.randn(2, 4, 16, 16, generator=generator)
        text = torch.randn(2, 40, self.teacher.unet.config["cross_attention_dim"], generator=generator)
        return sample, torch.tensor(400), text


@torch.no_grad()
def predict(unet: Any, inputs: tuple[Tensor, ...], **extra: Any) -> Tensor:
    """The noise prediction."""
    prediction: Tensor = unet(*inputs, **extra, return_dict=False)[0]
    return prediction


def _tell_the_moment(unet: UNet2DConditionModel) -> None:
    """Routed slots inside diffusers' own class: a hook tells them what the student class tells its own."""
    happening: list[AbstractContextManager[None]] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, timestep = args[0], args[1] if len(args) > 1 else kwargs["timestep"]
        happening.append(happening_at(Moment.of(timestep, len(sample), sample.device)))
        happening[-1].__enter__()

    def leave(*_: Any) -> None:
        happening.pop().__exit__(None, None, None)

    unet.register_forward_pre_hook(enter, with_kwargs=True)
    unet.register_forward_hook(leave, always_call=True)
