"""The recipes that ship: their exact sizes, their replay on a trained UNet, and the commands that show them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import bundled_recipes, find_recipe, load_recipe
from asdm_compress.reporting.drawing import draw_unet
from asdm_compress.workflows.recipes import compare, describe

# BK-SDM's published students (its model cards, and counted with diffusers), and depth patterns.
PARAMETERS = {
    "bk-sdm-base-v1": 579_384_964,
    "bk-sdm-small-v1": 482_346_884,
    "bk-sdm-tiny-v1": 323_384_964,
    "bk-sdm-base-v2": 583_480_964,
    "bk-sdm-small-v2": 485_787_524,
    "bk-sdm-tiny-v2": 326_825_604,
    "segmind-small": 579_384_964,
    "segmind-tiny": 323_384_964,
}
SAVED_MACS = {"shallow-1-2-2-2-v1": 0.146, "shallow-1-1-2-2-v1": 0.244, "shallow-1-1-1-2-v1": 0.337}


def test_every_recipe_of_the_repository_ships():
    names = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")}
    assert names == set(bundled_recipes())
    assert set(PARAMETERS) | set(SAVED_MACS) < names


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_a_recipe_replays_at_full_size_and_on_a_trained_unet(name, unet, inputs):
    found = describe(find_recipe(name))
    assert found.parameters == PARAMETERS.get(name, found.parameters)
    saved = 1 - found.macs / found.teacher_macs
    assert saved == pytest.approx(SAVED_MACS.get(name, saved), abs=1e-3)
    assert found.is_stock == (name != "mini-sd-latency-0.7x")
    assert sum(found.removed.values()) == found.teacher_parameters - found.parameters
    student = assemble(unet, Plan(found.recipe.as_edits()))
    with torch.no_grad():
        assert student(*inputs).sample.isfinite().all()


def test_the_drawing_shows_every_unit_and_what_is_gone(unet):
    whole = draw_unet(unet, Plan({}))
    art = whole.split("\n\n")[0].replace("level", "")
    assert (art.count("R"), art.count("A"), art.count("v"), art.count("^")) == (22, 16, 3, 3)
    plan = Plan(
        {
            "mid_block": "drop",
            "down_blocks.0.layers.1": "conv1x1",
            "up_blocks.3.resnets.0": "narrow0.5",
            "up_blocks.3.attentions.0.transformer_blocks.0.ff": "drop",
        }
    )
    lines = draw_unet(unet, plan).splitlines()
    assert lines[0].split() == ["level", "0", "RA", "c.", "v", "n-", "RA", "RA"]
    assert lines[4].split() == ["mid", ".", ".."]


def test_recipes_are_compared_by_what_they_do():
    base, small, second = (find_recipe(name) for name in ("bk-sdm-base-v1", "bk-sdm-small-v1", "bk-sdm-base-v2"))
    assert [(d.what, d.first, d.second) for d in compare(base, small)] == [("mid_block", "kept", "drop")]
    assert "architecture: cross_attention_dim" in {d.what for d in compare(base, second)}
    assert compare(base, find_recipe("segmind-small")) == []


def test_a_recipe_is_found_by_path_or_name(tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_text(find_recipe("bk-sdm-tiny-v1").read_text())
    assert load_recipe(find_recipe(str(copy))).as_edits() == load_recipe(find_recipe("bk-sdm-tiny-v1")).as_edits()
    with pytest.raises(AsdmError, match="no recipe bk-sdm-tiny") as caught:
        find_recipe("bk-sdm-tiny")
    assert "Did you mean bk-sdm-tiny-v" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("site: mid_block", "site: mid_blok"), "no site 'mid_blok'"),
        (("edit: drop", "edit: dorp"), "unknown edit 'dorp'"),
        (("- 320", "- 321"), "architecture is none that can be built"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, change, message):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(find_recipe("bk-sdm-small-v1").read_text().replace(*change))
    with pytest.raises(AsdmError, match=message):
        describe(wrong)


def test_the_commands_show_recipes(cli):
    listed = json.loads(cli("recipes", "list", "--json").stdout)["recipes"]
    assert {r["name"]: r["parameters"] for r in listed if r["name"] in PARAMETERS} == PARAMETERS
    shown = cli("recipes", "show", "bk-sdm-small-v1")
    assert shown.returncode == 0
    assert "mid_block" in shown.stdout
    assert "482 M (56%)" in shown.stdout
    assert cli("recipes", "check", "bk-sdm-small-v1").returncode == 0
    assert cli("recipes", "check", "nothing-like-it").returncode == 2
    assert "mid_block" in cli("recipes", "diff", "bk-sdm-base-v1", "bk-sdm-small-v1").stdout
    refused = cli("apply", "bk-sdm-small-v1", "mini-sd", "--out", "student")
    assert refused.returncode == 2
    assert "does not fit the recipe made for sd15" in refused.stderr
