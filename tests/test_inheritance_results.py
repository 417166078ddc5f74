"""What the bench of inheritance keeps and sums up."""

from __future__ import annotations

import argparse

import pytest
from inheritance_macs import macs_share
from inheritance_results import LINES, Kept, actions_called, picture, shown_row, summary

from asdm_compress.inheritance.actions import FULL, conditional_only, cut, elementary_actions, inherit
from asdm_compress.inheritance.forecast import LINEAR, Forecast
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.ways import Way


def row(role, share, psnr, budget=0.4, **more):
    known = {"sampler": "ddim", "steps": 20, "way": f"{role}'s", "predicted_share": share / 1.02}
    return known | {"role": role, "share": share, "psnr": psnr, "budget": budget, **more}


def ours(share, psnr, budget, executed=7):
    gains = {role: [psnr - 30.0, 1.5] for role in (LINES if budget == 0.4 else ("DeepCache",))}
    names = "full cut.0:linear"
    return row(
        "calibrated", share, psnr, budget, planned_macs=7, executed_macs=executed, gains=gains, steps_of_it=names
    )


ROWS = [
    ours(0.4, 44.0, 0.4), row("DeepCache", 0.38, 36.0), row("T-GATE", 0.4, 20.0), row("fewer steps", 0.41, 30.0),
    row("fewer steps, best sampler", 0.41, 31.0), row("DeepCache in fewer steps", 0.4, 38.0),
    row("search alone", 0.4, 60.0),
    ours(0.33, 34.0, 0.3, executed=8), row("DeepCache", 0.3, 30.0, 0.3),
]  # fmt: skip


def test_a_cell_is_summed_up_against_the_strongest_of_each_kind():
    first, second = summary(ROWS)
    assert (first["best_cache"], first["its_share"], first["fewer_steps"]) == (
        "DeepCache",
        0.38,
        "fewer steps, best sampler's",
    )
    assert (first["over_best_cache"], first["over_best_cache_interval"]) == (14.0, 1.5)
    assert first["over_cache_in_fewer_steps"] == 14.0
    # Between 34 dB at 0.33x and 44 dB at 0.4x, 36 dB takes a fifth of the way: 0.344x.
    assert first["time_for_the_same_psnr"] == pytest.approx(0.344 / 0.38)
    assert first["within_budget"] and first["macs_as_planned"]
    assert first["time_off"] == pytest.approx(1 / 1.02 - 1)
    assert not second["within_budget"] and not second["macs_as_planned"]
    assert second["time_for_the_same_psnr_below"] == pytest.approx(0.33 / 0.3)
    assert not {"fewer_steps", "over_cache_in_fewer_steps"} & set(second)
    assert picture(ROWS).count("calibrated (ours)") == 1


def test_runs_for_different_samplers_add_to_one_file_and_other_settings_begin_anew(tmp_path):
    settings = argparse.Namespace(
        quick=False, fresh=False, renew=False, prompts=8, validation_prompts=8, test_prompts=4, guidance=5.0, repeats=2
    )

    def kept(**changes):
        return Kept.of(argparse.Namespace(**{**vars(settings), **changes}), "About.", tmp_path)

    one, two = kept(), kept()
    one.add_cell(("ddim", 20, 0.4), ROWS[:7], 1.0, 0.0)
    two.add_cell(("ddim", 20, 0.3), ROWS[7:], 2.0, 0.5)
    again = kept()
    assert again.has(("ddim", 20, 0.4)) and again.has(("ddim", 20, 0.3))
    assert again.rows == ROWS
    assert len(again.facts["summary"]) == 2
    assert not kept(quick=True, fresh=True).has(("ddim", 20, 0.4))
    assert again.path.exists()
    assert not kept(repeats=3).has(("ddim", 20, 0.4))
    assert not again.path.exists()
    one.write()
    assert not kept(fresh=True).has(("ddim", 20, 0.4))


def test_cells_of_other_code_are_measured_anew_where_that_is_asked_for(tmp_path):
    settings = argparse.Namespace(
        quick=False, fresh=False, renew=True, prompts=8, validation_prompts=8, test_prompts=4, guidance=5.0, repeats=2
    )
    kept = Kept.of(settings, "About.", tmp_path)
    kept.add_cell(("ddim", 20, 0.4), ROWS[:6], 1.0, 0.0)
    kept.add_cell(("ddim", 20, "ablations"), ROWS[6:7], 1.0, 0.0)
    kept.add_cell(("ddim", 20, 0.3), ROWS[7:], 1.0, 0.0)
    kept.facts["code_by_cell"]["ddim 20 0.4"] = "older"
    kept.write()
    again = Kept.of(settings, "About.", tmp_path)
    assert again.has(("ddim", 20, 0.3)) and not again.has(("ddim", 20, 0.4))
    again.add_cell(("ddim", 20, 0.4), [ours(0.39, 50.0, 0.4)], 1.0, 0.0)
    assert again.has(("ddim", 20, 0.4))
    assert again.rows == [*ROWS[6:], ours(0.39, 50.0, 0.4)]
    assert again.facts["cells"].count(["ddim", 20, 0.4]) == 1


def test_macs_of_a_run_beside_the_full_one(pipeline):
    settings = SamplingSettings(20, 4.0)

    def share(rule):
        return macs_share(pipeline, Way(rule, 20, 0.0, parse_mode(rule)), settings)

    light = (20 * share("uniform:20,branch=0,forecast=hold") - 1) / 19  # one full step, 19 light ones
    assert 0.05 < light < 0.1
    assert share("uniform:3,branch=0,forecast=hold") == pytest.approx((7 + 13 * light) / 20)
    assert share("uniform:1,guidance=2") == pytest.approx(0.75, abs=0.01)
    assert macs_share(pipeline, Way("10 steps of dpm++", 10, 0.0, None, "dpm++"), settings) == 0.5


def test_actions_are_told_by_their_names(unet):
    tried = [
        *elementary_actions(unet, LINEAR), conditional_only(Forecast(1, "index", 0.5), cut(2, LINEAR, True)),
        inherit(["mid_block", "up_blocks.0.resnets.0"], "branch"), FULL,
    ]  # fmt: skip
    assert actions_called(" ".join(action.name for action in tried)) == tuple(tried)


def test_the_schedule_that_is_shown_is_the_first_sampler_s_for_the_middle_time():
    others = [ours(0.2, 30.0, 0.2) | {"sampler": "dpm++"}]
    assert shown_row([]) is None
    assert shown_row(ROWS[7:])["budget"] == 0.3
    assert shown_row([*ROWS, ours(0.5, 50.0, 0.55), *others])["budget"] == 0.4
