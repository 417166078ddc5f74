"""What a distillation compares and weighs: pairs from the plan, terms of the loss, draws, what trains."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble, build, specify
from asdm_compress.core.distillation import (
    Data,
    Distillation,
    Losses,
    Pair,
    changed,
    distillation_presets,
    load_preset,
    rate_for,
)
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.distillation.experts import ExpertUse, idle_experts
from asdm_compress.distillation.features import FeatureUNet
from asdm_compress.distillation.losses import Batch, loss_terms, row_weights, weighted_sum
from asdm_compress.distillation.pairs import check_student, find_pairs, given_pairs
from asdm_compress.distillation.selection import SMALL_CUT, choose_parameters, phases_of, units_around_cuts
from asdm_compress.distillation.trajectory import rolled_rows, rollout, trajectory_loss
from asdm_compress.models.expert_conv import Moment, MultiExpertConv2d
from asdm_compress.models.loading import load_unet
from asdm_compress.models.source import LoadOptions
from asdm_compress.workflows.training_section import damage_before

PLAN = Plan({"mid_block": "drop", "up_blocks.1.attentions.1": "conv1x1*4@timestep", "down_blocks.1.layers.1": "drop"})
LOSSES = Losses(task=1, output=0.5, feature=0.1, normalise=True)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    text = torch.randn(4, 5, 12, generator=generator)
    return Batch(
        clean,
        noise,
        torch.tensor([10, 300, 600, 990]),
        text,
        torch.tensor([True, True, False, True]),
        rolled_rows(4, 2),
    )


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def noising(request):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=request.param
    )


def bk_pairs(name, sd15_on_meta):
    plan = Plan(load_recipe(find_recipe(name)).as_edits())
    spec = specify(sd15_on_meta, plan)
    student = build(spec.config, spec.edits)
    check_student(student, sd15_on_meta, plan)
    return [(p.student, p.teacher) for p in find_pairs(student, sd15_on_meta, plan, "blocks")]


def test_bk_sdms_pairs_are_its_own(sd15_on_meta):
    """The ends of all blocks, as its public code has them, decoder units with the teacher's numbers."""
    ends = [(f"down_blocks.{i}.downsamplers.0",) * 2 for i in range(3)]
    base = [
        *ends,
        ("down_blocks.3.resnets.0", "down_blocks.3.resnets.1"),
        *((f"up_blocks.{i}.upsamplers.0",) * 2 for i in range(3)),
        ("up_blocks.3.attentions.1", "up_blocks.3.attentions.2"),
    ]
    assert bk_pairs("bk-sdm-base-v1", sd15_on_meta) == base
    assert bk_pairs("bk-sdm-small-v1", sd15_on_meta) == base
    assert bk_pairs("bk-sdm-tiny-v1", sd15_on_meta) == [
        *ends[:2],
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("up_blocks.0.upsamplers.0", "up_blocks.1.upsamplers.0"),
        ("up_blocks.1.upsamplers.0", "up_blocks.2.upsamplers.0"),
        ("up_blocks.2.attentions.1", "up_blocks.3.attentions.2"),
    ]


@pytest.mark.parametrize("kind", ["blocks", "borders", "self-attention"])
@pytest.mark.parametrize("name", ["mini-sd-latency-0.7x", "bk-sdm-tiny-v1", "bk-sdm-small-v1", "shallow-1-2-2-2-v1"])
def test_pairs_of_any_plan_have_equal_shapes_and_share_no_module(tiny, batch, kind, name):
    plan = Plan(load_recipe(find_recipe(name)).as_edits())
    student = assemble(tiny, plan)
    pairs = find_pairs(student, tiny, plan, kind)
    assert len({p.student for p in pairs}) == len({p.teacher for p in pairs}) == len(pairs) > 3
    outputs = []
    with torch.no_grad():
        for unet, places in ((student, [p.student for p in pairs]), (tiny, [p.teacher for p in pairs])):
            wrapped = FeatureUNet(unet, places)
            prediction, found = wrapped(batch.noise, batch.timesteps, batch.text)
            assert torch.equal(wrapped.release()(batch.noise, batch.timesteps, batch.text).sample, prediction)
            outputs.append([tuple(f.shape) for f in found])
    assert outputs[0] == outputs[1]


def test_every_input_of_a_unit_that_stays_is_compared_with_what_it_was(tiny):
    """Behind a dropped layer the student's feature is compared with the teacher's behind that layer."""
    plan = Plan({"down_blocks.1.layers.1": "drop", "mid_block": "drop"})
    pairs = {p.student: p.teacher for p in find_pairs(assemble(tiny, plan), tiny, plan, "borders")}
    assert pairs["down_blocks.1.attentions.0"] == "down_blocks.1.attentions.1"
    assert pairs["down_blocks.3.resnets.1"] == "mid_block.resnets.1"
    assert pairs["down_blocks.0.resnets.0"] == "down_blocks.0.resnets.0"


def test_pairs_that_a_recipe_names_hold_and_are_checked(tiny):
    student = assemble(tiny, PLAN)
    found = given_pairs(student, tiny, [Pair(student="up_blocks.2.resnets.0", teacher="up_blocks.2.resnets.1")])
    assert [str(pair) for pair in found] == ["up_blocks.2.resnets.0 ← up_blocks.2.resnets.1"]
    with pytest.raises(AsdmError, match=r"features of mid_block\.resnets\.0, which the student does not have"):
        given_pairs(student, tiny, [Pair(student="mid_block.resnets.0", teacher="mid_block.resnets.0")])


def test_a_plan_that_cuts_nothing_loses_nothing(tiny, batch, noising):
    """The student is its teacher, so output and features are at zero, and the task loss is the teacher's own."""
    student = assemble(tiny, Plan({}))
    pairs = find_pairs(student, tiny, Plan({}), "borders")
    ours = FeatureUNet(student, [p.student for p in pairs])
    theirs = FeatureUNet(tiny, [p.teacher for p in pairs])
    losses = LOSSES.model_copy(update={"trajectory": 1.0, "trajectory_steps": 2})
    terms = loss_terms(ours, theirs, batch, noising, losses)
    theirs.release()
    assert {name: float(term) for name, term in terms.items() if name != "task"} == {
        "output": 0, "feature": 0, "trajectory": 0,
    }  # fmt: skip
    assert float(terms["task"]) > 0


@torch.no_grad()
def test_the_terms_are_their_formulas(tiny, batch, noising):
    student = assemble(tiny, PLAN)
    pairs = find_pairs(student, tiny, PLAN, "blocks")
    ours, theirs = FeatureUNet(student, [p.student for p in pairs]), FeatureUNet(tiny, [p.teacher for p in pairs])
    terms = loss_terms(ours, theirs, batch, noising, LOSSES)
    alpha = noising.alphas_cumprod[batch.timesteps].reshape(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch.clean + (1 - alpha).sqrt() * batch.noise
    mine, my_features = ours(noisy, batch.timesteps, batch.text)
    wanted, their_features = theirs(noisy, batch.timesteps, batch.text)
    theirs.release()
    is_v = noising.config.prediction_type == "v_prediction"
    target = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.clean if is_v else batch.noise
    per_row = (mine - target).square().mean((1, 2, 3))
    torch.testing.assert_close(terms["task"], per_row[[0, 1, 3]].sum() / 4)  # the third has another's caption
    torch.testing.assert_close(terms["output"], F.mse_loss(mine, wanted))
    expected = sum(
        ((a - b).square().mean((1, 2, 3)) / b.square().mean((1, 2, 3))).mean()
        for a, b in zip(my_features, their_features, strict=True)
    )
    torch.testing.assert_close(terms["feature"], expected)
    total = terms["task"] + 0.5 * terms["output"] + 0.1 * terms["feature"]
    torch.testing.assert_close(weighted_sum(terms, LOSSES), total)


def test_a_weight_of_zero_costs_nothing(tiny, batch, noising):
    calls = []
    theirs = FeatureUNet(tiny)
    handle = theirs.register_forward_hook(lambda *_: calls.append(1))
    student = FeatureUNet(assemble(tiny, PLAN))
    assert set(loss_terms(student, theirs, batch, noising, Losses(output=0, feature=0))) == {"task"}
    assert calls == []
    assert set(loss_terms(student, theirs, batch, noising, Losses(task=0, feature=0))) == {"output"}
    assert calls == [1]
    handle.remove()
    with pytest.raises(ValueError, match="above 0"):
        Losses(task=0, output=0)


def test_weights_of_timesteps_are_those_of_min_snr(noising):
    """Hang et al., 2303.09556: the clean latents' error weighs min(SNR, γ), whatever the model predicts."""
    times = torch.arange(0, 1000, 37)
    alpha = noising.alphas_cumprod[times]
    snr = alpha / (1 - alpha)
    per_clean = snr + 1 if noising.config.prediction_type == "v_prediction" else snr
    found = row_weights(times, noising, Losses(weighting="min-snr", snr_gamma=5))
    torch.testing.assert_close(found * per_clean, snr.clamp(max=5), rtol=1e-4, atol=1e-6)
    found = row_weights(times, noising, Losses(weighting="truncated", snr_gamma=5))
    torch.testing.assert_close(found * per_clean, (snr + 1).clamp(max=5), rtol=1e-4, atol=1e-6)
    assert row_weights(times, noising, Losses()).eq(1).all()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_batch_in_parts_has_the_mean_of_their_losses(tiny, batch, noising, rows):
    losses = LOSSES.model_copy(update={"trajectory": 0.3, "trajectory_steps": 2})
    student = FeatureUNet(assemble(tiny, PLAN), ["down_blocks.0.downsamplers.0"])
    theirs = FeatureUNet(tiny, ["down_blocks.0.downsamplers.0"])
    parts = [
        Batch(*(getattr(batch, field.name)[first : first + rows] for field in fields(Batch)))
        for first in range(0, 4, rows)
    ]
    whole = weighted_sum(loss_terms(student, theirs, batch, noising, losses), losses)
    parts = [weighted_sum(loss_terms(student, theirs, part, noising, losses), losses) for part in parts]
    theirs.release()
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(tiny, batch, noising):
    found = []
    for saves_memory in (False, True):
        student = assemble(tiny, PLAN)
        pairs = find_pairs(student, tiny, PLAN, "borders")
        names = [n for n, _ in choose_parameters(student.train(), "all", ())]
        if saves_memory:
            student.enable_gradient_checkpointing()
        ours, theirs = FeatureUNet(student, [p.student for p in pairs]), FeatureUNet(tiny, [p.teacher for p in pairs])
        loss = weighted_sum(loss_terms(ours, theirs, batch, noising, LOSSES), LOSSES)
        loss.backward()
        theirs.release()
        found.append([loss.detach(), *(student.get_parameter(n).grad for n in names)])
    for plain, saved in zip(*found, strict=True):
        torch.testing.assert_close(plain, saved)


@torch.no_grad()
def test_the_trajectory_loss_is_of_one_row_in_so_many(tiny, batch, noising):
    student, theirs = FeatureUNet(assemble(tiny, PLAN)), FeatureUNet(tiny)
    found = trajectory_loss(student, theirs, batch.noise, batch.text, rolled_rows(4, 3), noising, 3)
    ours, wanted = (rollout(u, batch.noise[[0, 3]], batch.text[[0, 3]], noising, 3) for u in (student, theirs))
    torch.testing.assert_close(found, (ours - wanted).square().mean())
    assert trajectory_loss(student, theirs, batch.noise, batch.text, torch.zeros(4), noising, 3) == 0


@torch.no_grad()
def test_a_rollout_is_ddim(tiny, batch, noising):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(noising.config, set_alpha_to_one=True, clip_sample=False)
    latents = batch.noise
    times = [999, 666, 333]
    for number, time in enumerate(times):
        prediction = tiny(latents, time, batch.text).sample
        scheduler.num_inference_steps = 3  # its steps are then 333 apart
        if number < 2:
            latents = scheduler.step(prediction, time, latents).prev_sample
        else:
            latents = scheduler.step(prediction, time, latents).pred_original_sample
    found = rollout(FeatureUNet(tiny), batch.noise, batch.text, noising, 3)
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_what_trains(tiny):
    student = assemble(tiny, PLAN)
    settings = Distillation(steps=100)
    without = assemble(tiny, Plan({"mid_block": "drop"}))
    with pytest.raises(AsdmError, match="no slots"):
        phases_of(settings.model_copy(update={"trains": "experts"}), without, 0.001)
    experts = choose_parameters(student, "experts", ())
    assert {n.split(".slot.")[0] for n, _ in experts} == {"up_blocks.1.attentions.1"}
    assert sum(p.requires_grad for p in student.parameters()) == len(experts)
    around = units_around_cuts(student, tiny, PLAN)
    assert set(around) == {
        "down_blocks.1.attentions.0", "down_blocks.1.downsamplers.0",  # beside the layer
        "down_blocks.3.resnets.1", "up_blocks.0.resnets.0",  # beside the mid block
        "up_blocks.1.resnets.1", "up_blocks.1.attentions.1", "up_blocks.1.resnets.2",  # the slot and its neighbours
    }  # fmt: skip
    assert len(choose_parameters(student, "all", ())) == len(list(student.parameters()))


def test_after_a_cut_of_small_damage_the_experts_train_first(tiny):
    settings = Distillation(steps=100)
    student, without = assemble(tiny, PLAN), assemble(tiny, Plan({"mid_block": "drop"}))

    def order(student, damage, **changes):
        return [(p.trains, p.first, p.last) for p in phases_of(settings.model_copy(update=changes), student, damage)]

    assert order(student, 0.001) == [("experts", 0, 20), ("all", 20, 100)]
    assert order(student, 0.001, experts_share=0.5) == [("experts", 0, 50), ("all", 50, 100)]
    assert order(student, 0.001, experts_share=0.0) == [("all", 0, 100)]
    for damage in (SMALL_CUT, 1.0, None):  # None: nobody has measured it
        assert order(student, damage) == [("all", 0, 100)]
    assert order(without, 0.001) == [("all", 0, 100)]
    assert order(student, 1.0, trains="experts") == [("experts", 0, 100)]


def test_the_damage_is_what_assemble_has_recorded():
    """Of the bundled student, which keeps little more than a third of the parameters and hardly any damage."""
    recipe = load_recipe(find_recipe("mini-sd-latency-0.7x"))
    assert recipe.evidence.measured.params < 0.5 * recipe.evidence.teacher.params
    assert damage_before(recipe) == recipe.evidence.held_out_damage < SMALL_CUT
    student = assemble(load_unet("mini-sd", LoadOptions()), Plan(recipe.as_edits()))
    assert [p.trains for p in phases_of(Distillation(), student, damage_before(recipe))] == ["experts", "all"]
    assert damage_before(recipe.model_copy(update={"evidence": None})) is None


@pytest.mark.parametrize(
    "edit", ["conv1x1*4@timestep", "conv1x1*4@feature", "conv3x3*3@both", "conv1x1*4@feature-sigmoid"]
)
def test_the_use_of_experts_is_what_their_routers_give(tiny, batch, edit):
    student = assemble(tiny, Plan({"up_blocks.1.attentions.1": edit}))
    slots = {path: m for path, m in student.named_modules() if isinstance(m, MultiExpertConv2d)}
    ((path, slot),) = slots.items()
    wanted = []

    def keep(module, args, output):
        wanted.append(module.route(args[0], Moment(batch.timesteps)).detach())

    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    use = ExpertUse(student.train())
    slot.register_forward_hook(keep)
    student(batch.noise, batch.timesteps, batch.text)
    student(batch.clean, batch.timesteps, batch.text)
    first, second = wanted
    found = use.shares()
    assert found == {path: pytest.approx(((first + second) / 2).mean(0).tolist(), abs=1e-4)}
    assert use.shares() == {}
    use.release()
    student(batch.noise, batch.timesteps, batch.text)
    assert use.shares() == {}


def test_experts_that_get_nothing_are_named():
    assert idle_experts({"a": [0.5, 0.49, 0.01], "b": [0.4, 0.6]}) == ["a: 2"]


def test_a_student_of_another_plan_or_teacher_is_refused(tiny):
    student = assemble(tiny, PLAN)
    with pytest.raises(AsdmError, match="not what its recipe makes"):
        check_student(student, tiny, Plan({"mid_block": "drop"}))


def test_every_preset_loads_with_its_published_constants():
    presets = {name: load_preset(name) for name in distillation_presets()}
    assert {"asdm", "mini-sd", "bk-sdm-v1", "bk-sdm-v2", "segmind", "laptop", "koala"} == set(presets)
    weights = {n: (p.losses.task, p.losses.output, p.losses.feature) for n, p in presets.items()}
    assert weights["bk-sdm-v1"] == weights["bk-sdm-v2"] == (1, 1, 1)
    assert weights["segmind"] == (1, 0.5, 0.5)
    assert (presets["bk-sdm-v1"].batch, presets["bk-sdm-v2"].batch) == (256, 128)
    assert presets["bk-sdm-v1"].optimiser.learning_rate == 5e-5
    assert presets["laptop"].losses.normalise
    assert presets["koala"].losses.features == "self-attention"
    for name, path in distillation_presets().items():
        assert path.read_text().startswith("# "), f"{name} does not say where it comes from"


def test_the_learning_rate_goes_by_the_way_that_is_left():
    assert [rate_for(5e-4, damage) for damage in (2.0, 0.5, 0.02, 0.005, 0.0)] == [5e-4, 5e-4, 1e-4, 5e-5, 1e-5]


def test_wrong_presets_and_values_are_named(tmp_path):
    with pytest.raises(AsdmError, match="no distillation preset bk-sdm") as caught:
        load_preset("bk-sdm")
    assert "Did you mean bk-sdm-v" in str(caught.value.hint)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("steps: 5\nlosses:\n  taks: 1\n")
    with pytest.raises(AsdmError, match=r"wrong\.yaml:3: losses\.taks: unknown key"):
        load_preset(str(wrong))
    with pytest.raises(AsdmError, match=r"losses\.features"):
        changed(Distillation(), {"losses.features": "everything"})
    for name in ("losses.taks", "loses.task", "seed.of.it"):
        with pytest.raises(AsdmError, match=r"no (such )?setting"):
            changed(Distillation(), {name: 1})
    found = changed(Distillation(data=Data(size=5)), {"losses.task": 0.25, "data.size": None})
    assert (found.losses.task, found.data.size) == (0.25, None)
