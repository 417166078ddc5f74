"""Closed-form starts: what the regression solves, and what it does for a student of the trained model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly import regression
from asdm_compress.assembly.calibration import record
from asdm_compress.assembly.damage import measure_plan
from asdm_compress.assembly.option_fit import fit_options, fitting_places, measure_options
from asdm_compress.assembly.options import find_options, slot_specs
from asdm_compress.assembly.other_starts import copied_start, random_start
from asdm_compress.assembly.plan import Plan, place
from asdm_compress.assembly.plan_fit import fit_plan, for_memory
from asdm_compress.assembly.regression import RIDGES, NormalEquations, memory_of, solve_at_best_ridge
from asdm_compress.assembly.surgery import assemble, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.units import Limit
from asdm_compress.profiling.profile import ProfileSettings, profile
from asdm_compress.profiling.slot_costs import as_run, places_of, slot_costs
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions

CPU = torch.device("cpu")
ROUTED = "conv3x3*4@timestep"
SHALLOW = {
    "down_blocks.0.layers.1": "drop",
    "down_blocks.1.attentions.0": "drop",
    "up_blocks.3.layers.1": "drop",
    "up_blocks.2.upsamplers.0": "drop",
}


@pytest.fixture(scope="module")
def calibration(pipeline):
    prompts = [c.text for c in sample_captions(6, 21)]
    return record(pipeline, prompts, SamplingSettings(steps=8, guidance=4.0, seed=3), bands=4)


def equations(kernel, inputs, targets):
    sums = NormalEquations(inputs.shape[1] * kernel**2 + 1, targets.shape[1], CPU)
    sums.add(inputs, targets, kernel)
    return sums


def as_kernel(weights, channels, kernel):
    return weights[:-1].T.reshape(-1, channels, kernel, kernel).float(), weights[-1].float()


@settings(deadline=None, max_examples=20)
@given(kernel=st.sampled_from([1, 3]), channels=st.integers(1, 4), outputs=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_convolution_is_found_again(kernel, channels, outputs, seed):
    torch.manual_seed(seed)
    inputs, weight, bias = (
        torch.randn(4, channels, 9, 7),
        torch.randn(outputs, channels, kernel, kernel),
        torch.randn(3),
    )
    targets = F.conv2d(inputs, weight, bias[:outputs], padding=kernel // 2)
    sums = equations(kernel, inputs, targets)
    found, constant = as_kernel(sums.solve(1e-9), channels, kernel)
    assert torch.allclose(found, weight, atol=1e-4)
    assert torch.allclose(constant, bias[:outputs], atol=1e-4)
    assert sums.error(sums.solve(1e-9)).abs().max() < 1e-4


def test_the_solution_is_that_of_an_independent_solver():
    """Oracle: numpy-style least squares on the unfolded patches with the ridge as further rows."""
    torch.manual_seed(0)
    inputs, targets, ridge = torch.randn(3, 5, 6, 6), torch.randn(3, 2, 6, 6), 0.3
    sums = equations(3, inputs, targets)
    patches = F.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    rows = torch.cat([patches, torch.ones(len(patches), 1)], dim=1)
    wanted = targets.flatten(2).transpose(1, 2).flatten(0, 1).double()
    penalty = torch.eye(46, dtype=torch.float64)[:-1] * (ridge * sums.scale) ** 0.5
    towards = torch.randn(46, 2, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([rows, penalty]), torch.cat([wanted, penalty @ towards])).solution
    assert torch.allclose(sums.solve(ridge, towards), expected, atol=1e-5)
    assert torch.allclose(sums.error(expected), (rows @ expected - wanted).square().sum(0), rtol=1e-6)


def test_the_middle_of_a_3x3_fit_is_the_1x1_fit_and_sums_add():
    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 4, 5, 5), torch.randn(6, 3, 5, 5)
    whole = equations(3, inputs, targets)
    assert torch.allclose(whole.centre(3).solve(0.1), equations(1, inputs, targets).solve(0.1))
    parts = equations(3, inputs[:2], targets[:2]).plus(equations(3, inputs[2:], targets[2:]))
    assert torch.allclose(parts.solve(0.1), whole.solve(0.1))


def test_a_container_has_no_more_memory_than_it_may_take(tmp_path, monkeypatch):
    whole = memory_of(CPU)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(regression, "_CONTAINER_LIMITS", (tmp_path / "nothing", limit))
    for said, found in (("max", whole), (str(2 * whole), whole), (str(whole // 4), whole // 4)):
        limit.write_text(f"{said}\n")
        assert memory_of(CPU) == found


def test_noise_is_answered_with_a_strong_ridge():
    """Targets without any relation to the inputs are best fitted by next to nothing; a real relation is kept."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 6, 4, 4)
    targets = torch.cat([torch.randn(8, 1, 4, 4), inputs[:, :1]], dim=1)
    groups = [slice(0, 1), slice(1, 2)]
    (found,) = solve_at_best_ridge(
        [equations(3, inputs[:4], targets[:4])], [equations(3, inputs[4:], targets[4:])], groups
    )
    plain = equations(3, inputs, targets).solve(1e-4)
    assert found[:-1, 0].norm() < 0.95 * plain[:-1, 0].norm()
    assert (found[:, 1] - plain[:, 1]).norm() < 0.05


def test_fitted_slots_beat_holes_on_prompts_that_they_have_not_seen(pipeline, unet, calibration):
    unseen = record(
        pipeline, [c.text for c in sample_captions(4, 77)], SamplingSettings(steps=8, guidance=4.0, seed=90), bands=4
    )
    hole = measure_plan(unet, Plan(SHALLOW), unseen).total
    damages = {}
    for edit in ("conv1x1", "conv1x1*4@timestep", "conv3x3-rank16"):
        plan = Plan({site: "conv1x1" if "samplers" in site else edit for site in SHALLOW})
        damages[edit] = measure_plan(unet, plan, unseen, fit_plan(unet, plan, calibration)).total
    assert max(damages.values()) < hole / 2


def test_one_slot_of_full_rank_is_the_dense_slot(unet, calibration):
    dense, full = (Plan({"down_blocks.0.layers.1": e}) for e in ("conv3x3", "conv3x3-rank32"))
    predictions = []
    for plan in (dense, full):
        student = assemble(unet, plan, fit_plan(unet, plan, calibration))
        rows = calibration.part(0, 4).rows()
        with torch.no_grad():
            predictions.append(student(*rows, return_dict=False)[0])
    assert torch.allclose(predictions[0], predictions[1], atol=1e-4)


def test_a_single_slot_is_fitted_alike_alone_and_in_a_plan(unet, mini_profile, calibration):
    specs = slot_specs("3x3", 4, "timestep", [])
    places = places_of(unet, specs)
    costs = slot_costs(unet, places, ProfileSettings(text_tokens=40, repeats=2), mini_profile)
    wanted = (
        "down_blocks.1.resnets.0", "down_blocks.1.layers.0", "mid_block", "mid_block.layers.1", "mid_block.resnets.1",
        "up_blocks.1.attentions.2",
    )  # fmt: skip
    options = [o for o in find_options(unet, mini_profile, places, costs) if o.site in wanted and o.edit == ROUTED]
    assert len(options) == len(wanted)
    for group, weights in fit_options(unet, options, calibration):
        for option in group:
            (unit, state), (other, expected) = (
                next(iter(w.items())) for w in (weights[option.name], fit_plan(unet, option.plan, calibration))
            )
            assert unit == other == place(unet, option.plan).bearers[0]
            for key, value in state.items():
                assert torch.allclose(value, expected[key], atol=1e-5), (option.name, key)


def test_damages_of_slots_are_kept_and_not_fitted_again(unet, mini_profile, calibration, tmp_path, monkeypatch):
    specs = slot_specs("1x1", 4, "timestep", [])
    places = places_of(unet, specs)
    costs = slot_costs(unet, places, ProfileSettings(text_tokens=40, repeats=2), mini_profile)
    wanted = ("up_blocks.2.layers.2", "up_blocks.3.layers.2")
    options = [o for o in find_options(unet, mini_profile, places, costs) if o.site in wanted]
    store = tmp_path / "damages.jsonl"
    found = measure_options(unet, options, calibration, store)
    assert set(found) == {o.name for o in options}
    by_name = {name: damage.total for name, damage in found.items()}
    for site in wanted:
        assert by_name[f"{site}:conv1x1*4@timestep"] < by_name[f"{site}:drop"]
    lines = store.read_text()

    def never(*_):
        raise AssertionError("fitted again")
        yield

    monkeypatch.setattr("asdm_compress.assembly.option_fit.fit_options", never)
    assert measure_options(unet, options, calibration, store) == found
    assert store.read_text() == lines


def test_slot_options_have_exact_costs(unet, mini_profile):
    specs = slot_specs("all", 4, "timestep", [Limit("params", 0.5, True)])
    assert len(specs) == 6
    places = places_of(unet, specs)
    costs = slot_costs(unet, places, ProfileSettings(text_tokens=40, repeats=2), mini_profile)
    options = find_options(unet, mini_profile, places, costs)
    for option in options[:: max(1, len(options) // 40)]:
        student = assemble(unet, option.plan)
        assert sum(p.numel() for p in student.parameters()) == mini_profile.parameters - option.savings["params"], (
            option
        )
        if "@" in option.edit:
            plain = next((o for o in options if o.name == option.name.partition("*")[0]), None)
            assert plain is not None
            assert plain.savings["macs"] == option.savings["macs"]
    assert as_run(specs[1].name) == specs[0].name


@pytest.mark.parametrize(
    ("edit", "words"),
    [("conv1x1*8@timestep", "8 experts"), ("conv1x1*4@timestep-sigmoid", "add up"), ("conv3x3*4@both-t2", "add up")],
)
def test_what_has_no_closed_form_is_refused(unet, calibration, edit, words):
    with pytest.raises(AsdmError, match=words):
        fit_plan(unet, Plan({"mid_block": edit}), calibration)


@pytest.mark.parametrize("routing", ["feature", "both"])
def test_feature_routing_can_be_costed_and_starts_as_the_plain_fit(unet, calibration, mini_profile, routing):
    specs = slot_specs("1x1", 4, routing, [])
    assert [spec.experts for spec in specs] == [1, 4]
    places = places_of(unet, specs)
    costs = slot_costs(unet, places, ProfileSettings(text_tokens=40, repeats=2), mini_profile)
    assert all(costs[as_run(spec.name)]["mid_block.resnets.0"].macs > 0 for spec in specs)
    predictions = []
    rows = calibration.part(0, 4).rows()
    for edit in ("conv1x1", f"conv1x1*4@{'feature'}"):
        plan = Plan({"up_blocks.2.attentions.1": edit})
        student = assemble(unet, plan, fit_plan(unet, plan, calibration))
        with torch.no_grad():
            predictions.append(student(*rows, return_dict=False)[0])
    assert torch.allclose(predictions[0], predictions[1], atol=1e-4)


def test_activations_that_overflow_are_named_as_such(unet, calibration):
    broken = copy.deepcopy(unet)
    broken.down_blocks[0].resnets[0].conv1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(AsdmError, match="not finite"):
        fit_plan(broken, Plan({"down_blocks.0.attentions.0": "conv1x1"}), calibration)


def test_a_routed_student_is_profiled_block_by_block(unet, mini_profile):
    student = assemble(unet, Plan({"mid_block.attentions.0": "conv1x1*4@timestep"}))
    found = profile(student, ProfileSettings(text_tokens=40, repeats=2))
    blocks = [s for s in found.sites if s.level == "block"]
    assert sum(s.macs for s in blocks) == found.macs
    assert sum(s.parameters for s in blocks) == found.parameters
    assert found.site("up_blocks.3").macs == mini_profile.site("up_blocks.3").macs
    assert found.site("mid_block").macs < mini_profile.site("mid_block").macs
    assert all(s.latency > 0 for s in blocks)


def test_a_plans_fit_takes_in_as_many_moments_as_its_share_of_the_memory_holds(unet, calibration):
    assert for_memory(unet, calibration) is calibration  # of a small model, on any machine
    # A moment is two rows; at the widest, all skip connections of the encoder and the hidden state behind it are held.
    side, skips = unet.config.sample_size, []
    hooks = [unet.conv_in, *(m for block in unet.down_blocks for m in (*block.resnets, *(block.downsamplers or ())))]
    handles = [m.register_forward_hook(lambda _, __, output: skips.append(output.nbytes)) for m in hooks]
    with torch.no_grad():
        unet(torch.zeros(2, 4, side, side), 1, calibration.inputs.texts[0])
    for handle in handles:
        handle.remove()
    per_moment = 2 * (sum(skips) + skips[-1])
    held = for_memory(unet, calibration, 3.5 * per_moment / memory_of(CPU))
    assert len(held) in (3, 4)  # the widest place may lie a little elsewhere
    assert len(for_memory(unet, calibration, 1e-12)) == 1


def test_three_bands_without_samples_to_judge_by_take_the_strongest_ridge():
    torch.manual_seed(0)
    inputs, targets = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    sums, nothing = equations(1, inputs, targets), NormalEquations(4, 1, CPU)
    (found,) = solve_at_best_ridge([sums], [nothing], [slice(0, 1)])
    assert torch.equal(found, sums.plus(nothing).solve(max(RIDGES)))


def test_a_fitted_student_opens_in_a_fresh_process_without_a_difference(
    reloaded_difference, unet, calibration, tmp_path
):
    plan = Plan({"levels.3": "drop", "up_blocks.1.layers.1": ROUTED, "down_blocks.1.downsamplers.0": "conv1x1"})
    weights = fit_plan(unet, plan, calibration)
    student = assemble(unet, plan, weights)
    assert {unit for unit, _ in specify(unet, plan).slot_map.values()} == set(weights)
    assert measure_plan(unet, plan, calibration, weights).total < measure_plan(unet, plan, calibration).total
    assert "DIFFERENCE 0.0" in reloaded_difference(student, tmp_path / "student")
    assert ROUTED in json.loads((tmp_path / "student/unet/config.json").read_text())["edits"].values()


def test_a_calibration_of_two_parts_keeps_prompts_apart(calibration):
    fitted, measured = calibration.parts()
    assert len(fitted) + len(measured) == len(calibration)
    assert len(measured) == len(calibration) // 3
    texts = {tuple(t.flatten().tolist()) for t in fitted.inputs.texts[:, 1]}
    assert texts.isdisjoint({tuple(t.flatten().tolist()) for t in measured.inputs.texts[:, 1]})
    alone = replace(calibration, prompts=torch.zeros_like(calibration.prompts))
    assert alone.parts() == (alone, alone)
    unfitted = replace(calibration, held_out=False)
    assert all(len(part) == len(calibration) for part in unfitted.parts())
    many = replace(calibration, prompts=torch.arange(len(calibration)) % 12)
    for parts, share in ((many.parts(), 1 / 6), (many.for_plans(), 1 / 2)):
        assert [len(part) for part in parts] == [round((1 - share) * len(many)), round(share * len(many))]
    assert [len(part) for part in calibration.for_plans()] == [len(part) for part in calibration.parts()]


@pytest.mark.parametrize("edit", ["separable3x3*4@timestep", "conv3x3-rank8*4@timestep", "conv3x3*4@timestep"])
def test_an_expert_of_a_band_without_moments_is_the_fit_of_all_bands(unet, calibration, edit):
    without = calibration.only(calibration.bands != 3)
    assert without.bands_without_moments() == [3]
    site = "down_blocks.1.attentions.0"
    weights = fit_plan(unet, Plan({site: edit}), without)
    assert weights
    assert all(tensor.isfinite().all() for state in weights.values() for tensor in state.values())


@torch.no_grad()
@pytest.mark.parametrize("edit", ["conv3x3", "conv1x1*4@timestep"])
def test_a_slot_that_nothing_is_fitted_for_is_as_if_it_were_empty(unet, calibration, edit):
    rows = calibration.part(0, 2).rows()
    for site in ("up_blocks.1.layers.0", "down_blocks.1.resnets.0", "mid_block.resnets.0"):
        widens = unet.get_submodule(site.replace("layers", "resnets")).conv_shortcut is not None
        empty = assemble(unet, Plan({site: "shortcut" if widens else "drop"}))(*rows, return_dict=False)[0]
        found = assemble(unet, Plan({site: edit}))(*rows, return_dict=False)[0]
        torch.testing.assert_close(found, empty, atol=1e-4, rtol=1e-4)


def test_other_starts_are_of_kept_kernels_or_of_the_right_size(unet):
    edits = {"mid_block.resnets.0": "conv3x3*4@timestep", "up_blocks.3.layers.1": "conv1x1"}
    plan = Plan({**edits, "mid_block.attentions.0": "drop"})
    copies, random = copied_start(unet, plan), random_start(unet, plan)
    assert set(copies) == set(random) == {"mid_block.resnets.0", "up_blocks.3.resnets.1"}
    kernels = copies["mid_block.resnets.0"]["weights.0"]
    kept = [m.weight for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.shape == kernels.shape[1:]]
    for kernel in kernels:
        assert any(torch.equal(kernel, weight) for weight in kept)
    gone = [unet.mid_block.resnets[0].conv1.weight, unet.mid_block.resnets[0].conv2.weight]
    assert not any(torch.equal(kernel, weight) for kernel in kernels for weight in gone)
    deep = Plan({"levels.3": "drop", "up_blocks.1.resnets.0": "conv3x3"})
    copy = copied_start(unet, deep)["up_blocks.1.resnets.0"]["weights.0"][0]
    removed = [*unet.mid_block.modules(), *unet.up_blocks[0].modules(), *unet.down_blocks[3].modules()]
    gone = [m.weight for m in removed if isinstance(m, torch.nn.Conv2d)]
    assert not any(torch.equal(copy, weight) for weight in gone if weight.shape == copy.shape)
    spread = random["mid_block.resnets.0"]["weights.0"].std()
    assert spread == pytest.approx((2 / (9 * kernels.shape[2])) ** 0.5, rel=0.05)
    again = random_start(unet, plan)["mid_block.resnets.0"]["weights.0"]
    assert torch.equal(random["mid_block.resnets.0"]["weights.0"], again)


def test_places_whose_sums_exceed_memory_are_left_out(sd15_on_meta, monkeypatch):
    specs = slot_specs("auto", 8, "timestep", [])
    everywhere = places_of(sd15_on_meta, specs)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**18}[name])
    left = fitting_places(sd15_on_meta, everywhere)
    deep = "mid_block.resnets.0"
    assert deep in everywhere["conv3x3*8@timestep"]
    assert deep not in left["conv3x3*8@timestep"]
    assert deep in left["conv3x3"]
    assert "down_blocks.0.resnets.0" not in left["conv3x3"]
    assert deep in left["conv1x1*8@timestep"]
    assert "down_blocks.0.resnets.0" in left["conv3x3*8@timestep"]
