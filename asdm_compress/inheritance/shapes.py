"""The shapes of a UNet's values at a size of its latents, found on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.graph import graph_of
from asdm_compress.inheritance.places import Feature
from asdm_compress.inheritance.program import program_of
from asdm_compress.models.call import UNetCall
from asdm_compress.models.tree import meta_copy

Shape = tuple[int, ...]  # of one row, for example (C, H, W)


@torch.no_grad()
def value_shapes(
    unet: UNet2DConditionModel, values: Collection[str], height: int, width: int, text_tokens: int = 77
) -> dict[str, Shape]:
    """The shape of every value that is named, without the rows, for latents of `height` x `width` cells.

    Raises AsdmError for a value that the UNet's graph does not have.
    """
    twin, config = meta_copy(unet), unet.config
    dtype = next(unet.parameters()).dtype
    sample = torch.empty(1, config["in_channels"], height, width, device="meta", dtype=dtype)
    text = torch.empty(1, text_tokens, config["cross_attention_dim"], device="meta", dtype=dtype)
    program = program_of(graph_of(twin), (), [Feature(value) for value in values])
    call = UNetCall(sample, torch.empty((), device="meta"), text)
    _, recorded = Evaluator(twin).evaluate(program, call, timestep=0.0)
    return {f.value: tuple(tensor.shape[1:]) for f, tensor in zip(program.recorded, recorded, strict=True)}
