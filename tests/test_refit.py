"""Solving anew what stays after a cut: against an independent solver, and for what it does to students."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly.calibration import record
from asdm_compress.assembly.damage import compare_predictions, measure_plan
from asdm_compress.assembly.option_fit import absorber, measure_options
from asdm_compress.assembly.options import find_options
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.refit import Refit, _reach, projections_of
from asdm_compress.assembly.regression import RIDGES, NormalEquations
from asdm_compress.assembly.surgery import assemble, specify
from asdm_compress.assembly.teacher_runs import TeacherRuns
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions

BK_LIKE = Plan({f"{block}.layers.1": "drop" for block in ("down_blocks.0", "down_blocks.1", "up_blocks.2")})
ONE_ATTENTION = Plan({"up_blocks.2.attentions.0": "drop"})


@pytest.fixture(scope="module")
def calibration(pipeline):
    prompts = [c.text for c in sample_captions(12, 31)]
    return record(pipeline, prompts, SamplingSettings(steps=8, guidance=4.0, seed=3), bands=4)


@pytest.fixture(scope="module")
def unseen(pipeline, calibration):
    prompts = [c.text for c in sample_captions(6, 77)]
    settings_ = SamplingSettings(steps=8, guidance=4.0, seed=90)
    return record(pipeline, prompts, settings_, bands=4, band_weights=calibration.band_weights)


def run_once(refit, module, arguments):
    with refit.watching() as taken, torch.no_grad():
        output = module(*arguments)
    return taken, output


@pytest.mark.parametrize("path", ["up_blocks.2.resnets.0", "down_blocks.1.downsamplers.0", "mid_block.resnets.0"])
def test_a_full_refit_goes_towards_an_independent_solvers_least_squares(unet, calibration, path):
    """Oracle: all taps and a constant as columns, rows weighted by their band, the old weights as further rows.

    Every channel goes a share of the way there.
    """
    torch.manual_seed(0)
    module = unet.get_submodule(path)
    one = calibration.only(torch.arange(len(calibration)) < 4)
    branches, rows = 2, 8
    channels = module.in_channels if hasattr(module, "in_channels") else module.channels
    hidden = torch.randn(rows, channels, 6, 6)
    arguments = (hidden, torch.randn(rows, 128)) if "resnets" in path else (hidden,)
    refit = Refit(module, "full")
    taken, output = run_once(refit, module, arguments)
    wanted = output + torch.randn_like(output)
    refit.add(one, 0, taken, output, wanted)
    found = refit.solve()

    parts = [module.get_submodule(name) for name in projections_of(module)]
    columns = [F.unfold(x, p.kernel_size, 1, p.padding, p.stride) for x, p in zip(taken, parts, strict=True)]
    features = torch.cat([*columns, torch.ones(rows, 1, columns[0].shape[2])], dim=1).double()
    target = sum(p(x) for x, p in zip(taken, parts, strict=True)) + wanted - output
    guided = [
        torch.cat([x, (x[0::branches] + 4.0 * (x[1::branches] - x[0::branches]))])
        for x in (features, target.flatten(2).double())
    ]
    triple = torch.cat([torch.arange(4).repeat_interleave(2), torch.arange(4)])
    weight = torch.tensor(calibration.band_weights, dtype=torch.float64)[one.bands[triple]].sqrt()[:, None, None]
    a, b = ((x * weight).transpose(1, 2).flatten(0, 1) for x in guided)
    old = torch.cat([p.weight.flatten(1).T for p in parts] + [sum(p.bias for p in parts)[None]]).double()
    candidates = []
    scale = (a[:, :-1] ** 2).sum(0).mean()
    for ridge in RIDGES:
        penalty = torch.eye(a.shape[1], dtype=torch.float64)[:-1] * (ridge * scale) ** 0.5
        candidates.append(torch.linalg.lstsq(torch.cat([a, penalty]), torch.cat([b, penalty @ old])).solution)
    if not found:  # held-out prompts were against every ridge
        return
    new = torch.cat([found[f"{name}.weight"].flatten(1).T for name in projections_of(module)]).double()
    off = []
    for candidate in candidates:
        step, taken = candidate[:-1] - old[:-1], new - old[:-1]
        share = (step * taken).sum(0) / step.square().sum(0)
        if bool(((share > -1e-6) & (share < 1 + 1e-6)).all()) and bool((share > 0).any()):
            off.append(float((taken - share * step).abs().max()))
    assert min(off) < 1e-4


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), noise=st.floats(0.01, 3))
def test_a_channel_goes_as_far_as_other_samples_say(seed, noise):
    """No other share of the way has a smaller error on them, and a channel without anything to tell stays."""
    generator = torch.Generator().manual_seed(seed)

    def sums(inputs, targets):
        found = NormalEquations(5, 3, torch.device("cpu"))
        found.add(inputs.T[None, :, :, None], targets.T[None, :, :, None], 1)
        return found

    inputs = [torch.randn(30, 4, generator=generator) for _ in range(2)]
    true = torch.randn(4, 3, generator=generator)
    true[:, 2] = 0
    targets = [x @ true + noise * torch.randn(30, 3, generator=generator) for x in inputs]
    here, there = (sums(x, y) for x, y in zip(inputs, targets, strict=True))
    step = here.solve(1e-3)
    reach = _reach(step, there)
    assert bool(((reach >= 0) & (reach <= 1)).all())
    best = there.error(reach * step)
    for share in torch.linspace(0, 1, 21):
        assert bool((best <= there.error(share * step) + 1e-6).all())


def test_a_transformers_last_feed_forward_is_solved_through_its_projection(unet, calibration):
    """Where another pair of the two maps gives what is wanted, a refit finds a pair that does."""
    torch.manual_seed(0)
    path, few = "up_blocks.2.attentions.0", calibration.only(torch.arange(len(calibration)) < 16)
    module, other = unet.get_submodule(path), copy.deepcopy(unet.get_submodule(path))
    feed_forward = other.transformer_blocks[0].ff.net[2]
    assert projections_of(module) == ("proj_out", "transformer_blocks.0.ff.net.2")
    with torch.no_grad():
        for part in (other.proj_out, feed_forward):
            part.weight *= 1 + 0.2 * torch.randn_like(part.weight)
            part.bias += 0.1 * torch.randn_like(part.bias)
    hidden, text = torch.randn(32, module.in_channels, 8, 8), torch.randn(32, 40, unet.config["cross_attention_dim"])
    refit = Refit(module, "full")
    with torch.no_grad():
        wanted = other(hidden, encoder_hidden_states=text, return_dict=False)[0]
        with refit.watching() as taken:
            output = module(hidden, encoder_hidden_states=text, return_dict=False)[0]
    refit.add(few, 0, taken, output, wanted)
    fitted = copy.deepcopy(module)
    fitted.load_state_dict(refit.solve(), strict=False)
    with torch.no_grad():
        found = fitted(hidden, encoder_hidden_states=text, return_dict=False)[0]
    assert (found - wanted).square().mean() < 1e-3 * (output - wanted).square().mean()


@settings(deadline=None, max_examples=10)
@given(factor=st.floats(0.3, 3), shift=st.floats(-2, 2))
def test_a_scale_and_shift_is_found_again_and_folded(unet, calibration, factor, shift):
    """Where the wanted output is the projection's own times a factor, the folded module gives it."""
    torch.manual_seed(0)
    module = unet.get_submodule("mid_block.resnets.0")
    arguments = (torch.randn(8, 128, 4, 4), torch.randn(8, 128))
    refit = Refit(module, "scale")
    taken, output = run_once(refit, module, arguments)
    with torch.no_grad():
        plain = module.conv2(taken[0]) - module.conv2.bias[:, None, None]
    wanted = output + (factor - 1) * plain + shift
    refit.add(calibration.only(torch.arange(len(calibration)) < 4), 0, taken, output, wanted)
    twin = copy.deepcopy(module)
    twin.load_state_dict(refit.solve(), strict=False)
    with torch.no_grad():
        error = (twin(*arguments) - wanted).square().mean()
    assert error < 1e-4 * (wanted - output).square().mean() + 1e-6


# On the few prompts of the tests; what there is to make up for behind a single attention is little.
@pytest.mark.parametrize(("plan", "most"), [(BK_LIKE, 0.6), (ONE_ATTENTION, 0.95)])
def test_refitting_helps_on_prompts_that_it_has_not_seen(unet, calibration, unseen, plan, most):
    damage = {
        kind: measure_plan(unet, plan, unseen, fit_plan(unet, plan, calibration, refit=kind)).total
        for kind in ("none", "scale", "full")
    }
    assert damage["full"] < most * damage["none"]
    assert damage["scale"] < damage["none"]


def test_a_refitted_stock_student_opens_in_plain_diffusers(unet, calibration, tmp_path, inputs):
    plan = Plan({"levels.3": "drop"})
    weights = fit_plan(unet, plan, calibration, refit="full")
    assert specify(unet, plan).is_stock
    assert weights
    student = assemble(unet, plan, weights)
    student.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(student(*inputs).sample, again(*inputs).sample)
        assert not torch.equal(student(*inputs).sample, assemble(unet, plan)(*inputs).sample)


def test_the_built_student_is_the_one_that_was_measured(unet, calibration):
    """With convolutions, narrowed and refitted modules, removed levels and renumbered blocks at once."""
    plan = Plan(
        {
            "levels.3": "drop",
            "up_blocks.1.layers.0": "shortcut",
            "down_blocks.0.layers.1": "conv1x1*4@timestep",
            "up_blocks.2.resnets.1": "narrow0.5",
            "up_blocks.3.attentions.1.transformer_blocks.0.ff": "narrow0.5",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn1": "drop",
        }
    )
    weights = fit_plan(unet, plan, calibration, refit="full")
    student = assemble(unet, plan, weights)
    measured = measure_plan(unet, plan, calibration, weights).total
    assert compare_predictions(unet, student, calibration).total == pytest.approx(measured, rel=1e-4)
    assert measured < 0.8 * measure_plan(unet, plan, calibration, fit_plan(unet, plan, calibration)).total
    refitted = [
        path for path, tensors in weights.items() if path not in plan.edits or "conv_shortcut.weight" in tensors
    ]
    assert len(refitted) > 5


def test_a_narrowed_feed_forward_that_is_refitted_with_its_transformer_is_built_so(unet, calibration):
    part = "transformer_blocks.0.ff"
    plan = Plan({"down_blocks.0.attentions.0": "drop", f"up_blocks.3.attentions.1.{part}": "narrow0.5"})
    weights = fit_plan(unet, plan, calibration, refit="full")
    refitted = weights["up_blocks.3.attentions.1"][f"{part}.net.2.weight"]
    assert not torch.equal(refitted, weights[f"up_blocks.3.attentions.1.{part}"]["net.2.weight"])
    student = assemble(unet, plan, weights)
    built = student.up_blocks[3].attentions[1].transformer_blocks[0].ff.net[2].weight
    assert torch.equal(built, refitted)
    measured = measure_plan(unet, plan, calibration, weights).total
    assert compare_predictions(unet, student, calibration).total == pytest.approx(measured, rel=1e-4)


def test_an_empty_plan_has_nothing_to_refit(unet, calibration):
    assert fit_plan(unet, Plan({}), calibration, refit="full") == {}


@pytest.mark.parametrize(
    ("site", "edit", "expected"),
    [
        ("up_blocks.2.attentions.0", "drop", ("up_blocks.2.resnets.0", "up_blocks.2.attentions.0")),
        ("up_blocks.1.resnets.0", "shortcut", ("up_blocks.1.resnets.0", "up_blocks.1.resnets.0")),
        ("down_blocks.1.attentions.1", "drop", ("down_blocks.1.resnets.1", "down_blocks.1.attentions.1")),
        # The module before has given its output to a skip connection.
        ("down_blocks.1.layers.1", "drop", None),
        ("mid_block", "drop", None),
    ],
)
def test_who_can_take_over_what_is_taken_out(unet, mini_profile, site, edit, expected):
    option = next(o for o in find_options(unet, mini_profile, {}, {}) if (o.site, o.edit) == (site, edit))
    assert absorber(unet, option) == expected


def test_options_are_measured_with_their_absorbers(unet, mini_profile, calibration):
    sites = ("up_blocks.2.attentions.0", "down_blocks.0.attentions.1", "down_blocks.1.layers.1")
    options = [o for o in find_options(unet, mini_profile, {}, {}) if o.site in sites and o.edit == "drop"]
    alone, absorbed = (measure_options(unet, options, calibration, refit=refit) for refit in (False, True))
    for option in options:
        one, other = alone[option.name].total, absorbed[option.name].total
        assert other == one if option.site == sites[2] else other < 0.8 * one


def test_the_teachers_states_serve_one_plan_after_another(unet, calibration):
    runs = TeacherRuns(unet, calibration, kept=True)
    plans = [
        Plan({"up_blocks.2.layers.1": "drop", "up_blocks.3.resnets.0": "narrow0.5"}),
        Plan({"down_blocks.1.attentions.0": "conv1x1", "up_blocks.2.attentions.0": "drop"}),
    ]
    for plan in plans:
        alone = fit_plan(unet, plan, calibration, refit="full")
        along = fit_plan(unet, plan, calibration, refit="full", runs=runs)
        assert alone
        assert alone.keys() == along.keys()
        for path, state in alone.items():
            assert all(torch.equal(tensor, along[path][name]) for name, tensor in state.items())
    assert TeacherRuns.kept_within(unet, calibration, 1e-9) is None
