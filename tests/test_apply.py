"""`apply` of recipes whose weights are fitted to the checkpoint at hand, and of those that leave that to a training."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe, load_recipe
from asdm_compress.models.families import architecture

SITE = "mid_block"
FEW = ("--calibration-prompts", "3", "--calibration-triples", "24", "--steps", "16", "-q")


@pytest.fixture
def recipe(unet, tmp_path):
    """The path of a recipe of one edit."""

    def write(edit, refit="none"):
        content = Recipe(
            asdm_recipe=1,
            base=Base(model="mini-sd", architecture=architecture(unet)),
            edits=[EditEntry(site=SITE, edit=edit)],
            refit=refit,
        )
        (tmp_path / "recipe.yaml").write_text(dump_recipe(content), encoding="utf-8")
        return "recipe.yaml"

    return write


def test_more_experts_than_bands_are_fitted_in_as_many_bands(recipe, cli, tmp_path):
    result = cli("apply", recipe("conv1x1*16@timestep"), "mini-sd", "--out", "student", *FEW)
    assert result.returncode == 0, result.stderr
    student = StableDiffusionPipeline.from_pretrained(tmp_path / "student").unet
    weights = dict(student.named_parameters())
    (kernels,) = (tensor for name, tensor in weights.items() if name.endswith("slot.weights.0"))
    assert len(kernels) == 16
    assert torch.isfinite(kernels).all()
    assert not torch.equal(kernels[0], kernels[-1])
    few = cli("apply", "recipe.yaml", "mini-sd", "--out", "other", *FEW[:4], "--steps", "8", "-q")
    assert (few.returncode, "Traceback" in few.stderr) == (2, False)
    assert "8 sampling steps cannot be split into 16 timestep bands" in few.stderr


def test_a_student_that_is_not_refitted_does_not_say_that_it_is(recipe, cli, tmp_path):
    result = cli("apply", recipe("drop", "full"), "mini-sd", "--out", "student", "--slot-start", "zero")
    assert result.returncode == 0, result.stderr
    assert "not refitted (zero): train before use" in result.stdout
    assert load_recipe(tmp_path / "student/recipe.yaml").refit == "none"
    assert "refit" not in (tmp_path / "student/README.md").read_text(encoding="utf-8")


def test_a_bare_cut_says_so_and_can_be_refitted(recipe, cli, tmp_path):
    """Recipes of published students take out and bring nothing along."""
    path = tmp_path / recipe("drop")
    trained = load_recipe(path).model_copy(update={"provenance": {"distilled": {"steps": 8}, "sampler": "DDIM"}})
    path.write_text(dump_recipe(trained), encoding="utf-8")
    bare = cli("apply", "recipe.yaml", "mini-sd", "--out", "bare")
    assert bare.returncode == 0, bare.stderr
    # What was trained was the student that the recipe lay beside, and not this one.
    assert load_recipe(tmp_path / "bare/recipe.yaml").provenance == {"sampler": "DDIM"}
    assert "trained against" not in (tmp_path / "bare/README.md").read_text(encoding="utf-8")
    assert "Nothing makes up for what is taken out" in bare.stdout
    assert "--refit full" in bare.stdout
    result = cli("apply", "recipe.yaml", "mini-sd", "--out", "refitted", "--refit", "full", *FEW[:4], "--steps", "8")
    assert result.returncode == 0, result.stderr
    assert "Nothing makes up" not in result.stdout
    assert load_recipe(tmp_path / "refitted/recipe.yaml").refit == "full"
    cut, solved = (StableDiffusionPipeline.from_pretrained(tmp_path / name).unet for name in ("bare", "refitted"))
    changed = {n for n, t in solved.named_parameters() if not torch.equal(t, dict(cut.named_parameters())[n])}
    assert changed
    assert all(name.startswith(("down_blocks.3", "up_blocks", "conv_out")) for name in changed)
    unknown = cli("apply", "recipe.yaml", "mini-sd", "--out", "none", "--refit", "much")
    assert (unknown.returncode, "unknown refit 'much'" in unknown.stderr) == (2, True)
    refused = cli("apply", "recipe.yaml", "mini-sd", "--out", "none", "--refit", "full", "--slot-start", "zero")
    assert refused.returncode == 2
    assert "--refit does nothing with --slot-start zero" in " ".join(refused.stderr.split())
    refused = cli("apply", "shared-v1", "mini-sd", "--out", "none", "--refit", "full")
    assert (refused.returncode, "takes nothing out" in refused.stderr) == (2, True), refused.stderr


def test_options_of_a_fit_are_refused_where_nothing_is_fitted(recipe, cli, tmp_path):
    refused = cli("apply", recipe("drop", "full"), "mini-sd", "--slot-start", "zero", "--bands", "4", "--out", "out")
    assert refused.returncode == 2
    assert "--bands does nothing with --slot-start zero" in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_without_weights_does_not_take_is_refused(cli, tmp_path):
    refused = cli("apply", "shallow-1-2-2-2-v1", "mini-sd", "--steps", "50", "--out", "out")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr
    assert "--steps does nothing with a recipe that fits nothing" in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()
