"""What folds into a plain diffusers config: decided by building it and comparing outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import Plan, place
from asdm_compress.assembly.stock import fold_into_config
from asdm_compress.assembly.stock_check import computes_the_same, stock_parts
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.models.families import FAMILIES


def placed_on(unet, name):
    return place(unet, Plan(load_recipe(find_recipe(name)).as_edits()))


@pytest.mark.parametrize("name", ["bk-sdm-base-v1", "bk-sdm-tiny-v1", "shallow-1-1-1-2-v1"])
def test_published_students_fold_and_compute_what_their_plans_say(sd15_on_meta, name):
    placed = placed_on(sd15_on_meta, name)
    parts = stock_parts(sd15_on_meta, placed)
    assert not parts.edits
    # The same plan without folded layers is right too, and no plain config can hold it.
    plain = fold_into_config(sd15_on_meta, placed, folds_layers=False)
    assert computes_the_same(sd15_on_meta, placed, plain)
    assert plain.edits


@pytest.mark.parametrize(
    "change",
    [
        {"renamed": {}},  # the kept layers in the places of those taken out
        {"renamed": {f"up_blocks.{i}.resnets.1": f"up_blocks.{i}.resnets.0" for i in range(4)}},
        {"config": {"mid_block_type": "UNetMidBlock2D"}},
        {"config": {"layers_per_block": (1, 1, 1, 2)}},
        {"config": {"up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}},
        {"edits": {"up_blocks.1.attentions.0": "drop"}},
        {"config": {"down_block_types": ("DownBlock2D",)}},
    ],
)
def test_a_config_that_computes_something_else_is_found_out(sd15_on_meta, change):
    placed = placed_on(sd15_on_meta, "bk-sdm-base-v1")
    parts = stock_parts(sd15_on_meta, placed)
    if "config" in change:
        change = {"config": {**parts.config, **change["config"]}}
    assert not computes_the_same(sd15_on_meta, placed, replace(parts, **change))


def test_edits_that_bring_weights_stand_beside_what_folds(unet):
    plan = Plan(
        {
            "levels.3": "drop",
            "down_blocks.0.layers.1": "drop",
            "up_blocks.3.layers.1": "drop",
            "down_blocks.1.layers.1": "conv3x3*8@timestep",
            "up_blocks.2.resnets.0": "narrow0.5",
            "up_blocks.1.upsamplers.0": "subpixel",
        }
    )
    parts = stock_parts(unet, place(unet, plan))
    assert parts.config["layers_per_block"] == (1, 2, 2)
    assert set(parts.edits.values()) == {"conv3x3*8@timestep", "drop", "narrow0.5", "subpixel"}


def test_the_callers_device_and_random_numbers_stay_its_own():
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**FAMILIES["sd21"].unet_config)
        placed = placed_on(teacher, "shallow-1-2-2-2-v2")
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert not stock_parts(teacher, placed).edits
    assert torch.equal(torch.get_rng_state(), state)
