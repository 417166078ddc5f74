"""Forecasts, sampling modes and schedule files: what they say, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, conditional_only, cut, inherit
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.forecast import HOLD, LINEAR, Forecast, parse_forecast, weights
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule, save_schedule
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions

MODES = ("uniform:3", "power:3", "power-late:3,p=2", "centred:3,centre=0.4", "gaussian:3,mu=0.3", "explicit:2/5/9")


@settings(deadline=None)
@given(
    order=st.integers(0, 4),
    coefficients=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    gaps=st.lists(st.floats(0.5, 2), min_size=6, max_size=6),
)
def test_a_forecast_of_an_order_is_exact_for_polynomials_of_it(order, coefficients, gaps):
    at, *anchors = np.cumsum(gaps)[::-1][: order + 2].tolist()
    values = [np.polyval(coefficients[: order + 1], x) for x in anchors]
    forecast = sum(f * v for f, v in zip(weights(anchors, at), values, strict=True))
    assert forecast == pytest.approx(np.polyval(coefficients[: order + 1], at), rel=1e-6, abs=1e-6 * 10**order)


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 3), min_size=2, max_size=5), st.floats(0.1, 1))
def test_the_factors_of_a_forecast_add_up_to_one_whatever_the_damping(gaps, damping):
    at, *anchors = np.cumsum(gaps)[::-1].tolist()
    assert sum(weights(anchors, at, damping)) == pytest.approx(1)


@pytest.mark.parametrize("name", ["hold", "linear", "linear@log-snr", "order2@sigma*0.8", "linear*0.5"])
def test_a_forecast_is_read_as_it_is_written(name):
    assert parse_forecast(name).name == name


@pytest.mark.parametrize("name", ["", "cubic", "linear@time", "order9", "linear*0", "linear*2"])
def test_what_is_no_forecast_is_refused(name):
    with pytest.raises(AsdmError):
        parse_forecast(name)


@pytest.mark.parametrize("text", MODES)
@pytest.mark.parametrize("evaluations", [1, 2, 10, 25, 50])
def test_every_mode_computes_the_first_step_and_is_deterministic(text, evaluations):
    mode = parse_mode(text)
    computed = mode.computed_steps(evaluations)
    assert computed == parse_mode(text).computed_steps(evaluations)
    assert computed[0] == 0
    assert list(computed) == sorted(set(computed))
    assert computed[-1] < evaluations
    actions = mode.actions(evaluations)
    assert len(actions) == evaluations
    assert [i for i, action in enumerate(actions) if action == FULL] == list(computed)


def test_modes_are_dense_where_they_say():
    def middle(text: str) -> float:
        return float(np.mean(parse_mode(text).computed_steps(50)))

    assert middle("power:4,p=2") < middle("uniform:4") < middle("power-late:4,p=2")
    assert middle("gaussian:4,mu=0.2,sigma=0.2") < middle("gaussian:4,mu=0.8,sigma=0.2")
    near = [sum(15 <= i < 25 for i in parse_mode(f"{m}:4,centre=0.4").computed_steps(50)) for m in ("centred",)]
    assert near[0] > 10 / 4
    assert parse_mode("uniform:5").computed_steps(12) == (0, 5, 10)
    assert parse_mode("explicit:3/7/40").computed_steps(12) == (0, 3, 7)


def test_a_mode_can_leave_out_the_unconditional_branch():
    actions = parse_mode("uniform:2,guidance=3,forecast=hold,branch=1").actions(6)
    assert [action.guidance is None for action in actions] == [True, False, False, True, False, False]
    assert actions[1] == conditional_only(LINEAR, cut(1, HOLD))
    assert actions[3] == cut(1, HOLD)


@pytest.mark.parametrize(
    "text",
    ["every:3", "uniform", "uniform:0", "uniform:x", "uniform:3,p=2", "power:3,p=0", "gaussian:3,mu=9", "uniform:3,a",
     "explicit:1/-2", "uniform:3,forecast=cubic", "uniform:3,branch=nan", "uniform:3,branch=1.7",
     "uniform:3,guidance=inf", "power:3,p=nan", "explicit:0/3.9", "uniform:inf"],
)  # fmt: skip
def test_what_is_no_mode_is_refused(text):
    with pytest.raises(AsdmError):
        parse_mode(text).actions(20)


def test_a_schedule_is_read_as_it_was_written(tmp_path):
    branch = inherit(["mid_block", "up_blocks.1.layers.0"], "branch", Forecast(2, "log-snr", 0.5))
    written = Schedule((FULL, cut(0, LINEAR), branch, conditional_only(HOLD, cut(2)), conditional_only(LINEAR)))
    save_schedule(written, tmp_path / "inheritance.yaml")
    assert load_schedule(tmp_path / "inheritance.yaml") == written


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace("inherit:", "inherits:", 1), "inherits"),
        (lambda t: t.replace("forecast: linear", "forecast: cubic", 1), "cubic"),
        (lambda t: t.replace("- full", "- fully", 1), "fully"),
        (lambda t: t.replace("- full\n", "", 1), "first step"),
        (lambda t: t.replace("asdm_inheritance: 1", "asdm_inheritance: 2"), "asdm_inheritance"),
        (lambda t: t[: len(t) // 2] + "\n: [", "inheritance.yaml"),
    ],
)
def test_a_schedule_with_an_error_in_it_is_refused_with_its_place(tmp_path, change, says):
    path = tmp_path / "inheritance.yaml"
    save_schedule(Schedule((FULL, cut(0, LINEAR), FULL, cut(1, LINEAR))), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(AsdmError, match=says) as refused:
        load_schedule(path)
    assert "inheritance.yaml" in str(refused.value)


def test_a_schedule_for_another_number_of_steps_is_refused(pipeline):
    with inheriting(pipeline, Schedule((FULL, cut(0), FULL))), pytest.raises(AsdmError, match="3 evaluations"):
        pipeline("a small red circle", num_inference_steps=5, output_type="latent")


def test_an_unknown_place_is_refused_before_anything_runs(pipeline):
    with pytest.raises(AsdmError, match=r"cut\.40"), inheriting(pipeline, Schedule((FULL, cut(40)))):
        raise AssertionError("it must not get here")


def test_inheritance_is_near_the_full_run_and_nearer_the_more_is_computed(pipeline):
    how, prompts = SamplingSettings(25, 3.0, 5), [caption.text for caption in sample_captions(8, 11)]
    full = sample(pipeline, prompts, how).latents

    def error(rule: str) -> float:
        with inheriting(pipeline, rule):
            return float((sample(pipeline, prompts, how).latents - full).square().mean() / full.square().mean())

    assert error("uniform:1") == 0
    assert 0 < error("uniform:2,forecast=hold") < error("uniform:5,forecast=hold") < 0.5


def test_generate_inherits_beside_the_same_model_in_full(cli, tmp_path):
    said = ["a small red circle", "--steps", "6", "--compare", "mini-sd", "--out", "images", "--json"]
    result = cli("generate", "mini-sd", *said, "--inherit", "uniform:2")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert list(printed["seconds_per_image"]) == ["mini-sd", "mini-sd inheriting uniform:2"]
    assert 15 < printed["fidelity"]["psnr"] < 100
    with Image.open(tmp_path / "images" / "grid.png") as grid:
        assert grid.height > 2 * 128


@pytest.mark.parametrize("rule", ["uniform", "nowhere.yaml", "every:2"])
def test_generate_refuses_what_is_no_rule_with_exit_code_two(cli, tmp_path, rule):
    result = cli("generate", "mini-sd", "a circle", "--steps", "2", "--out", "images", "--inherit", rule)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert not (tmp_path / "images").exists()
