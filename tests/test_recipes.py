"""The recipes that ship: their exact sizes, their replay on a trained UNet, and the commands that show them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from ladder import RUNGS, first_within, plan_of
from make_recipes import write_measured

from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.assembly.surgery import assemble, build, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import bundled_recipes, find_recipe, load_recipe
from asdm_compress.models.families import FAMILIES
from asdm_compress.profiling.counting import count
from asdm_compress.reporting.drawing import draw_unet
from asdm_compress.workflows.apply import check_fit
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
    assert found.sources
    assert found.parameters == PARAMETERS.get(name, found.parameters)
    saved = 1 - found.macs / found.teacher_macs
    assert saved == pytest.approx(SAVED_MACS.get(name, saved), abs=1e-3)
    assert found.is_stock or "latency" in name or "shared" in name
    assert sum(found.removed.values()) == found.teacher_parameters - found.parameters
    assert sum(found.removed_macs.values()) == found.teacher_macs - found.macs
    student = assemble(unet, Plan(found.recipe.as_edits()))
    with torch.no_grad():
        assert student(*inputs).sample.isfinite().all()


GENERATIONS = {"sd15": ("sd15",), "sd21-base": ("sd21-base", "sd21")}


@pytest.fixture(scope="module")
def published():
    """The UNets, without weights, of the checkpoints that a recipe is for: text to image, inpainting, depth."""
    found = {}
    for generation, families in GENERATIONS.items():
        cases = [(family, 4) for family in families] + [(families[0], 9), (families[0], 5)]
        with torch.device("meta"):
            found[generation] = [
                UNet2DConditionModel(**{**FAMILIES[family].unet_config, "in_channels": channels})
                for family, channels in cases
            ]
    return found


@pytest.mark.parametrize("name", [name for name in sorted(bundled_recipes()) if not name.startswith("mini-sd")])
def test_a_recipe_is_for_every_checkpoint_of_its_generation(name, published):
    recipe = load_recipe(find_recipe(name))
    for unet in published[recipe.base.model]:
        check_fit(recipe, unet, "a checkpoint")
    inpainting = next(u for u in published[recipe.base.model] if u.config["in_channels"] == 9)
    spec = specify(inpainting, Plan(recipe.as_edits()))
    weights = build(spec.config, spec.edits).state_dict()
    assert weights["conv_in.weight"].shape == (320, 9, 3, 3)
    assert spec.weight_map.keys() == weights.keys()  # every tensor has its source
    other = next(model for model in GENERATIONS if model != recipe.base.model)
    with pytest.raises(AsdmError, match="does not fit the recipe"):
        check_fit(recipe, published[other][0], "a checkpoint")


def test_every_rung_of_the_ladder_is_lighter_than_the_one_before(unet, inputs, published):
    costs = [count(edited(unet, Plan(plan_of(rungs))), 1, 16, 16, 40).macs[""].total for rungs in range(len(RUNGS) + 1)]
    assert costs == sorted(set(costs), reverse=True)
    student = assemble(unet, Plan(plan_of(len(RUNGS))))
    with torch.no_grad():
        assert student(*inputs).sample.isfinite().all()
    # What BK-SDM takes out of every level comes first, whole layers of which diffusers opens.
    assert plan_of(7) == load_recipe(find_recipe("bk-sdm-base-v1")).as_edits()
    stock = [specify(unet, Plan(plan_of(rungs))).is_stock for rungs in range(9)]
    assert stock == [True, False, False, False, True, True, True, True, False]
    for unets in published.values():
        specify(unets[-1], Plan(plan_of(len(RUNGS))))


@pytest.mark.parametrize("skew", [-0.2, 0.0, 0.2])
def test_a_budget_gets_the_fewest_rungs_that_keep_it(skew):
    ratios = [1.0, 0.97, 0.88, 0.86, 0.71, 0.7, 0.66, 0.59, 0.52]
    measured = []

    def measure(rungs):
        measured.append(rungs)
        return ratios[rungs]

    found = first_within((0.9, 0.8, 0.7, 0.6, 0.5), [ratio + skew for ratio in ratios], measure)
    assert found == {0.9: 2, 0.8: 4, 0.7: 5, 0.6: 7}
    assert len(measured) == len(set(measured))


def test_a_measured_budget_becomes_a_recipe_that_says_what_it_is(tmp_path, cli):
    edits = plan_of(5)
    row = {"model": "sd21-base", "edits": edits, "latency_ratio": 0.6951}
    measured = {
        "budgets": {"sd21-base": {"0.7": 5}}, "rows": [row], "device": "a machine", "threads": 3, "batch": 2,
        "clock": "time",
    }  # fmt: skip
    write_measured(measured, tmp_path, "recipes_of_ours.json")
    path = tmp_path / "sd21-latency-0.7x.yaml"
    found = describe(path)
    assert found.recipe.as_edits() == edits
    assert found.recipe.budget == ["latency=0.7x"]
    shown = cli("recipes", "show", str(path)).stdout
    for said in (
        "0.695 of the teacher's time, on a machine (CPU threads: 3)",
        "tools/results/recipes_of_ours.json",
        "DAMAGE: NOT MEASURED",
        "assemble YOUR-MODEL",
    ):
        assert said in found.sources
        assert said in shown
    assert "for sd21-base, inpainting, depth" in shown
    assert "decoder, level 0, 64x64" in shown


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
    lines = draw_unet(unet, Plan({"up_blocks.1.upsamplers.0": "subpixel"})).splitlines()
    assert lines[2].split() == ["level", "2", "RA", "RA", "v", "RA", "RA", "RA", "s"]


def test_recipes_are_compared_by_what_they_do():
    base, small, second = (find_recipe(name) for name in ("bk-sdm-base-v1", "bk-sdm-small-v1", "bk-sdm-base-v2"))
    assert [(d.what, d.first, d.second) for d in compare(base, small)] == [("mid_block", "kept", "drop")]
    assert "architecture: cross_attention_dim" in {d.what for d in compare(base, second)}
    assert compare(base, find_recipe("segmind-small")) == []


def test_a_recipe_is_found_by_path_or_name(tmp_path, monkeypatch):
    copy = tmp_path / "mine.yaml"
    copy.write_text(find_recipe("bk-sdm-tiny-v1").read_text())
    assert load_recipe(find_recipe(str(copy))).as_edits() == load_recipe(find_recipe("bk-sdm-tiny-v1")).as_edits()
    (tmp_path / "bk-sdm-base-v1").mkdir()  # a folder of that name hides no recipe
    monkeypatch.chdir(tmp_path)
    assert find_recipe("bk-sdm-base-v1").is_file()
    copy.rename(tmp_path / "bk-sdm-base-v1/recipe.yaml")  # but a student in it is one
    assert find_recipe("bk-sdm-base-v1").parent.name == "bk-sdm-base-v1"
    with pytest.raises(AsdmError, match="no recipe bk-sdm-tiny") as caught:
        find_recipe("bk-sdm-tiny")
    assert "Did you mean bk-sdm-tiny-v" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("site: mid_block", "site: mid_blok"), r"wrong\.yaml:49: this UNet has no site 'mid_blok'"),
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
    removed = next(line for line in shown.stdout.splitlines() if "mid_block" in line)
    assert [cell.strip() for cell in removed.strip("│").split("│")] == [
        "mid_block",
        "middle",
        "drop",
        "97,038,080",
        "1.5%",
    ]
    assert "482 M (56%)" in shown.stdout
    assert "BK-SDM (Kim et al., 2305.15798)" in shown.stdout
    assert cli("recipes", "check", "bk-sdm-small-v1").returncode == 0
    assert cli("recipes", "check", "nothing-like-it").returncode == 2
    assert "mid_block" in cli("recipes", "diff", "bk-sdm-base-v1", "bk-sdm-small-v1").stdout
    refused = cli("apply", "bk-sdm-small-v1", "mini-sd", "--out", "student")
    assert refused.returncode == 2
    assert "does not fit the recipe made for sd15" in refused.stderr
