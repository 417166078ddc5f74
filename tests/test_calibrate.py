"""Calibration of inheritance schedules: its laws on a small surrogate, and its measurements."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import parse_budget
from asdm_compress.inheritance.actions import FULL, conditional_only, cut, skip
from asdm_compress.inheritance.forecast import HOLD, LINEAR, Forecast
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.scheduling import goals, timing
from asdm_compress.scheduling.check_steps import check_steps
from asdm_compress.scheduling.fits import Fitter, only_fitted
from asdm_compress.scheduling.goals import Choosing, Goal, goal_of, too_small
from asdm_compress.scheduling.measure import measure_surrogate, sampler_timeline
from asdm_compress.scheduling.menu import (
    EVERYTHING,
    WHOLE,
    Choice,
    choice_of,
    default_forecasts,
    kind_of,
    menu_of,
    with_corrections,
)
from asdm_compress.scheduling.responses import REACH, Responses
from asdm_compress.scheduling.rollouts import Judge, Score, gain
from asdm_compress.scheduling.search import DynamicProgram, find_front, improved
from asdm_compress.scheduling.surrogate import Surrogate
from asdm_compress.scheduling.timing import LOOP, KindTimes
from asdm_compress.scheduling.ways import Way, cheapest_cache, fewer_steps, uniform_caches
from asdm_compress.workflows.calibrate import (
    CalibrateSettings,
    calibrate,
    timed_batch,
)
from asdm_compress.workflows.calibrated import Contestant, Splits, verdict_on

GUIDANCE = 3.0
LIGHTS = (skip(), cut(0))


def small(unet, steps=5, guided=True, seed=0, lights=LIGHTS):
    """A surrogate of made-up responses: features drift, so that older ones do more."""
    menu = menu_of(unet, lights, (HOLD, LINEAR), guided)
    chance = np.random.default_rng(seed)
    branches, runs, values = 2 if guided else 1, 3, 8
    drift = chance.normal(size=(2, steps, 1, branches, runs, values)) * np.arange(1, REACH + 1)[:, None, None, None]
    drift += chance.normal(size=(2, steps, REACH, branches, runs, values))
    predictions = chance.normal(size=(steps, branches, runs, values)).cumsum(0)
    responses = Responses(drift.astype(np.float32), predictions.astype(np.float32))
    gains = chance.uniform(0.2, 1.5, steps)
    timeline = Timeline(tuple(float(t) for t in range(steps, 0, -1)))
    times = dict.fromkeys(menu.kinds(), 1.0)
    times |= {(0, False): 0.01, (1, False): 0.31, (WHOLE, True): 0.53, (1, True): 0.17}
    return Surrogate(menu, responses, gains, timeline, GUIDANCE), KindTimes(
        {kind: times[kind] for kind in menu.kinds()}, 0.2, steps, menu.lights
    )


def summed_cost(surrogate, choices):
    """From the definitions: what each step does alone, its anchors being the steps that computed everything of it."""
    own, other, total = [0], [0], 0.0
    for step, choice in enumerate(choices[1:], start=1):

        def features(row, anchors, step=step, choice=choice):
            pair = (anchors[-2] if len(anchors) > 1 else -1, anchors[-1])
            return surrogate.feature_error(step, choice.light, row, *surrogate.taken(step, pair, choice.forecast))

        error = 0.0
        if choice.light != WHOLE and not surrogate.menu.guided:
            error = features(0, own)
        elif choice.light != WHOLE:
            error = features(1, own)
            if not choice.conditional:
                error = GUIDANCE * error - (GUIDANCE - 1) * features(0, other)
        if choice.conditional:
            pair = (other[-2] if len(other) > 1 else -1, other[-1])
            taken = surrogate.taken(step, pair, choice.difference)
            error = error + (GUIDANCE - 1) * surrogate.difference_error(step, *taken)
        total += surrogate.gains[step] ** 2 * float(np.square(error).sum() / 3)
        if choice.light == WHOLE:
            own = [*own, step]
        if choice == EVERYTHING:
            other = [*other, step]
    return total


@pytest.mark.parametrize("guided", [True, False])
def test_the_dynamic_program_finds_what_trying_everything_finds(unet, guided):
    surrogate, times = small(unet, 4, guided)
    everything = [(EVERYTHING, *rest) for rest in itertools.product(surrogate.menu.choices(), repeat=3)]
    points = [(times.share(choices), summed_cost(surrogate, choices)) for choices in everything]
    program = DynamicProgram(surrogate, times)
    for price in (0.5, 5.0, 50.0, 500.0):
        found = program.solve(price)
        assert found.cost == pytest.approx(summed_cost(surrogate, found.choices))
        assert found.share == pytest.approx(times.share(found.choices))
        assert found.cost + price * found.share == pytest.approx(min(cost + price * share for share, cost in points))
    front = find_front(program)
    assert front.cheapest.share == pytest.approx(min(share for share, _ in points))
    assert front.corners[-1].cost == 0
    for share, cost in points:
        assert cost >= front.bound(share) * (1 - 1e-9) - 1e-9
    for share in (0.3, 0.55, 0.8):
        best = front.best(share)
        assert best is not None
        assert best.share <= share
        assert best.cost >= front.bound(share) - 1e-9


def test_the_same_holds_of_runs_in_which_anchors_go_out_of_reach(unet):
    surrogate, times = small(unet, REACH + 2, guided=False, lights=(skip(),))

    @cache
    def cost(step, older, newer, choice):
        lost = step - newer > REACH or (choice.forecast == LINEAR and older >= 0 and step - older > REACH)
        if choice == EVERYTHING or lost:
            return 0.0 if choice == EVERYTHING else float("inf")
        error = surrogate.feature_error(step, 0, 0, *surrogate.taken(step, (older, newer), choice.forecast))
        return surrogate.gains[step] ** 2 * float(np.square(error).sum() / 3)

    points = []
    for rest in itertools.product(surrogate.menu.choices(), repeat=REACH + 1):
        anchors, total = [-1, 0], 0.0
        for step, choice in enumerate(rest, start=1):
            total += cost(step, *anchors[-2:], choice)
            if choice == EVERYTHING:
                anchors.append(step)
        if np.isfinite(total):
            points.append((times.share((EVERYTHING, *rest)), total))
    front = find_front(DynamicProgram(surrogate, times))
    least = min(share for share, _ in points)
    assert front.cheapest.share == pytest.approx(least)
    # More than one schedule takes least: which step computes in between is for the costs to say.
    tied = [total for share, total in points if share == pytest.approx(least)]
    assert max(tied) > min(tied) == pytest.approx(front.cheapest.cost)
    for share, total in points:
        assert total >= front.bound(share) * (1 - 1e-9) - 1e-9
    for corner in front.corners:
        assert corner.cost == pytest.approx(min(total for share, total in points if share <= corner.share * (1 + 1e-9)))


def test_the_bound_holds_where_the_search_ends_before_all_corners_are_found(unet, monkeypatch):
    surrogate, times = small(unet, 9)
    program = DynamicProgram(surrogate, times)
    whole = find_front(program)
    monkeypatch.setattr("asdm_compress.scheduling.search.MOST_CORNERS", 4)
    few = find_front(program)
    assert len(few.corners) < len(whole.corners)
    for corner in whole.corners:
        assert few.bound(corner.share) <= corner.cost * (1 + 1e-9) + 1e-9
        assert whole.bound(corner.share) == pytest.approx(corner.cost, abs=1e-9)
    # What lies on the line between corners that were found would have been too much.
    shares, costs = [c.share for c in few.corners], [c.cost for c in few.corners]
    assert any(np.interp(c.share, shares, costs) > c.cost * (1 + 1e-6) for c in whole.corners)


def test_timesteps_that_repeat_at_the_end_are_forecast_over(unet):
    """Karras's of many steps are rounded to the same ones."""
    surrogate, _ = small(unet, 5)
    timeline = Timeline((9.0, 5.0, 1.0, 1.0, 0.0), (9.0, 5.0, 1.0, 1.0, 0.5))
    surrogate = replace(surrogate, timeline=timeline)
    over_noise = Forecast(1, "log-snr")
    assert surrogate.taken(4, (2, 3), over_noise) == ([3], (1.0,))
    steps, factors = surrogate.taken(3, (0, 1), over_noise)
    assert steps == [1, 0]
    assert sum(factors) == pytest.approx(1)


def test_computing_everything_has_no_error(unet):
    surrogate, times = small(unet)
    choices = (EVERYTHING,) * surrogate.steps
    assert surrogate.damage(choices) == 0
    assert times.share(choices) == pytest.approx(1)


def test_exchanges_lower_the_joint_damage_and_keep_the_time(unet):
    surrogate, times = small(unet, 8)
    start = find_front(DynamicProgram(surrogate, times)).best(0.5)
    assert start is not None
    found = improved(surrogate, times, start.choices, 0.5, exchanges=50)
    assert found[0] == EVERYTHING
    assert times.share(found) <= 0.5 * (1 + 1e-6)
    assert surrogate.damage(found) < surrogate.damage(start.choices)


def test_candidates_are_different_schedules_within_the_time_from_several_starts(unet, monkeypatch):
    """The front's own and one for every coherence and start; where a quality is the goal, of one start only."""
    monkeypatch.setattr(goals, "SEARCHES", ((5, 0.1), (5, 0.1), (5, 0.0)))
    surrogate, times = small(unet, 8)
    front = find_front(DynamicProgram(surrogate, times))
    choosing = Choosing(surrogate, times, front, None, surrogate.menu, times, front, None)
    plans = [plan for plan in choosing.candidates(0.5) if plan.choices is not None]
    tried = [plan.choices for plan in plans]
    corner = front.best(0.5)
    ends = {
        improved(surrogate, times, corner.choices, 0.5, coherent, exchanges, hot, seed)
        for coherent in goals.COHERENCES
        for seed, (exchanges, hot) in enumerate(goals.SEARCHES)
    }
    assert len(tried) == len(set(tried))
    assert set(tried) == ends | {corner.choices}
    assert len(ends) > len(goals.COHERENCES)
    assert all(times.share(choices) <= 0.5 * (1 + 1e-6) for choices in tried)
    few = [plan.choices for plan in choosing.candidates(0.5, wide=False)]
    assert few == [improved(surrogate, times, corner.choices, 0.5, exchanges=5), corner.choices]


def test_a_linear_drift_is_forecast_without_error(unet):
    surrogate, _ = small(unet, 6)
    straight = np.arange(1, REACH + 1, dtype=np.float32)[:, None, None, None]
    errors = np.broadcast_to(straight, surrogate.responses.errors.shape).copy()
    line = np.arange(6, dtype=np.float32)[:, None, None, None] * np.array([1, 3], np.float32)[:, None, None]
    predictions = np.broadcast_to(line, surrogate.responses.predictions.shape).copy()
    surrogate = replace(surrogate, responses=Responses(errors, predictions))
    linear = (EVERYTHING, EVERYTHING, Choice(1, True, LINEAR, LINEAR), Choice(1, False, LINEAR), EVERYTHING, EVERYTHING)
    held = tuple(replace(c, forecast=HOLD, difference=HOLD) for c in linear)
    assert surrogate.damage(linear) == pytest.approx(0, abs=1e-9)
    assert surrogate.damage(held) > 1


def test_anchors_out_of_reach_are_priced_as_impossible(unet):
    surrogate, times = small(unet, REACH + 3)
    late = (EVERYTHING, *[Choice(1, False, HOLD)] * (REACH + 2))
    assert surrogate.damage(late) == float("inf")
    cheapest = find_front(DynamicProgram(surrogate, times)).cheapest
    assert np.isfinite(surrogate.damage(cheapest.choices))


def test_rivals_fit_into_the_time(unet):
    surrogate, times = small(unet, 20)
    (few,) = fewer_steps(times, 0.5, (None,))
    assert few.steps == 9  # 0.2 s and 9 steps of 1 s within half of 20.2 s
    (cache,) = uniform_caches(surrogate.menu, times, 0.5)
    assert cache.name == "uniform:4,branch=0,forecast=hold"
    assert cache.seconds <= 0.5 * times.full_run


def test_scores_say_how_sure_they_are():
    score = Score((30.0, 34.0, 32.0, 36.0), (0.9, 0.92, 0.94, 0.96))
    assert score.lower() < score.mean() == 33
    assert Score((30.0,), (0.9,)).lower() == float("-inf")
    better = Score(tuple(value + 2 for value in score.psnr), score.ssim)
    assert gain(better, score) == pytest.approx((2.0, 0.0))
    goal = Goal(metric="psnr", least=30)
    assert "95%" in str(goal.confidence(score, better))


@pytest.mark.parametrize(
    "arguments",
    [
        ((), None, None),
        (parse_budget(["latency=0.5x"]), 30.0, None),
        (parse_budget(["macs=0.5x"]), None, None),
        (parse_budget(["latency=0.5x,params=0.5x"]), None, None),
    ],
)
def test_goals_that_are_none_are_refused(arguments):
    with pytest.raises(AsdmError) as refused:
        goal_of(*arguments)
    assert refused.value.exit_code == ExitCode.USER


def test_a_time_that_nothing_keeps_names_the_cheapest_schedule(unet):
    surrogate, times = small(unet)
    cheapest = find_front(DynamicProgram(surrogate, times)).cheapest
    error = too_small(0.001, cheapest, times)
    assert error.exit_code == ExitCode.INFEASIBLE
    assert f"latency={cheapest.share:.4f}x" in str(error.hint)
    # A regular schedule is not bound to what was measured, and may take less.
    surrogate, times = small(unet, 2 * REACH + 2, lights=(cut(0),))
    times = replace(times, seconds={**times.seconds, (0, False): 0.31})
    cheapest, regular = find_front(DynamicProgram(surrogate, times)).cheapest, cheapest_cache(surrogate.menu, times)
    assert regular is not None
    assert times.run(cheapest.choices) > regular.seconds
    hint = str(too_small(0.001, cheapest, times, regular).hint)
    assert f"is {regular.name} and takes latency={regular.seconds / times.full_run:.4f}x" in hint


def test_samplers_without_noise_levels_are_forecast_over_the_index_alone():
    assert {f.abscissa for f in default_forecasts(Timeline((3.0, 2.0, 1.0)))} == {"index"}
    assert "log-snr" in {f.abscissa for f in default_forecasts(Timeline((2.0, 1.0), (5.0, 1.0)))}


def test_a_schedule_is_for_the_pipelines_own_sampler_and_from_text_alone(pipeline):
    settings = CalibrateSettings(goal_of(parse_budget(["latency=0.5x"]), None, None), scheduler="ddim")
    with pytest.raises(AsdmError, match="the pipeline's own sampler"):
        calibrate(pipeline, "latency=0.5x", settings)
    with pytest.raises(AsdmError, match="Img2ImgPipeline asks for an image"):
        calibrate(StableDiffusionImg2ImgPipeline(**pipeline.components), "latency=0.5x")


def test_the_verdict_is_that_of_test_prompts():
    def contestant(role, validation, test):
        one, other = (Score((value, value + 1), (0.9, 0.9)) for value in (validation, test))
        return Contestant(role, Way(role, 5, 1.0), 0.5, one, other)

    ours, theirs = contestant("schedule", 40.0, 30.0), contestant("fewer steps", 35.0, 31.0)
    assert "beats none of its rivals: -1.00 dB" in verdict_on((ours, theirs))
    assert "beats everything" in verdict_on((theirs, ours))
    unsure = replace(theirs, test=Score((29.0, 34.0), (0.9, 0.9)))
    assert "but not surely of all: +1.00 dB (± " in verdict_on((unsure, ours))
    single = [replace(c, test=Score(c.test.psnr[:1], c.test.ssim[:1])) for c in (theirs, ours)]
    assert "but not surely of all: +1.00 dB (of one picture)" in verdict_on(single)


def test_a_batch_is_timed_in_full_where_prompts_are_few(pipeline):
    settings = CalibrateSettings(Goal(metric="ssim", least=0.9), SamplingSettings(4, GUIDANCE), images=3)
    texts = timed_batch(pipeline, Splits((), (), ("a circle", "a cross")), settings)
    assert texts.shape[:2] == (3, 2)
    assert torch.equal(texts[0], texts[2])


def test_slow_moments_of_the_machine_do_not_change_what_kinds_take(pipeline, monkeypatch):
    """Every loop is met by moments of another speed; a full step that keeps something takes a tenth more."""
    menu = menu_of(pipeline.unet, (skip(), cut(0)), (HOLD, LINEAR), True)
    true = {(WHOLE, False): 1.0, (0, False): 0.02, (1, False): 0.1, (WHOLE, True): 0.6, (1, True): 0.06}
    slower = [1.0, 3.0, 1.5, 2.0, 1.2]
    light = [kind for kind in menu.kinds() if kind != EVERYTHING.kind]
    fitted = [0.13]  # the cut with a correction

    def steps(plain, loops, repeats):
        assert len(loops) == len(light) + len(fitted)
        runs = [[3 * s, *[s] * (LOOP - 1), 0.5 * s] for s in slower]
        shares = [*(true[kind] for kind in light), *fitted]
        return runs, [
            [[4 * s, 1.1 * s, 1.1 * s, *[share * s] * (LOOP - 3), 0.5 * s] for s in slower[i:] + slower[:i]]
            for i, share in enumerate(shares)
        ]

    monkeypatch.setattr(timing, "_time_steps", steps)
    texts = encode(pipeline, ["a cross"], GUIDANCE)
    times = timing.time_kinds(pipeline, menu, menu.kinds(), texts, SamplingSettings(20, GUIDANCE))
    kept = 0.1 * 3 / (LOOP - 3)  # what the three full steps of a loop keep is put on its light ones
    full = times.full_step
    assert full == 1.5 and times.outside == pytest.approx(2.5 * 1.5)
    for kind in light:
        assert times.seconds[kind] / full == pytest.approx(true[kind] + kept)
    assert times.fitted == {
        (1, False): pytest.approx(full * (0.13 + kept)),
        (1, True): pytest.approx(full * (0.06 + 0.03 + kept)),
    }


def test_one_step_is_refused(pipeline):
    with pytest.raises(AsdmError, match="one sampling step"):
        sampler_timeline(pipeline, 1)


def test_a_sampler_that_evaluates_twice_a_step_is_refused(pipeline):
    parts = {**pipeline.components, "scheduler": make_scheduler("heun", pipeline)}
    with pytest.raises(AsdmError, match="HeunDiscreteScheduler calls the UNet 11 times in 6 steps"):
        sampler_timeline(StableDiffusionPipeline(**parts, requires_safety_checker=False), 6)


def test_measuring_goes_on_where_it_was_cut_off(pipeline, tmp_path):
    settings = SamplingSettings(3, GUIDANCE, 4)
    prompts = ["a small red circle", "a large blue square"]
    timeline = sampler_timeline(pipeline, 3)
    menu = menu_of(pipeline.unet, (skip(), cut(0)), (HOLD, LINEAR), True)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_surrogate(pipeline, menu, timeline, prompts, settings, tmp_path, 1, stop)
    (kept,) = tmp_path.rglob("responses-*.safetensors")
    before = kept.stat().st_mtime_ns
    found = measure_surrogate(pipeline, menu, timeline, prompts, settings, tmp_path, 1)
    assert kept.stat().st_mtime_ns == before
    fresh = measure_surrogate(pipeline, menu, timeline, prompts, settings, tmp_path / "fresh", 1)
    np.testing.assert_array_equal(found.responses.errors, fresh.responses.errors)
    # A skipped step takes an older prediction, so that its response is the difference of the two.
    predictions = found.responses.predictions
    np.testing.assert_allclose(found.responses.errors[0, 2, 0], predictions[1] - predictions[2], rtol=0, atol=2e-4)
    # Until the first step that inherits the trajectory is the full run's: on the prompts that were measured only the
    # sketch and the curvature are between what was predicted and what is.
    texts = encode(pipeline, prompts, GUIDANCE)
    for choice in (Choice(1), Choice(0), Choice(WHOLE, True)):
        schedule = Schedule(tuple(menu.action(c) for c in (EVERYTHING, choice, EVERYTHING)))
        first, second, third = check_steps(pipeline, found, schedule, (1.0, 1.0, 1.0), texts, settings, texts[:1])
        assert second.measured_error == pytest.approx(second.predicted_error, rel=0.4)
        assert first.measured_error == pytest.approx(0, abs=1e-5)
        assert third.measured_error == pytest.approx(0, abs=1e-5)


def test_an_action_tells_the_choice_that_made_it(unet):
    surrogate, times = small(unet)
    menu = surrogate.menu
    for choice in menu.choices():
        action = menu.action(choice)
        assert kind_of(menu, action) == choice.kind
        assert choice_of(menu, action) == choice
        (corrected,) = with_corrections([action])
        assert choice_of(menu, corrected) == choice
        assert any(e.corrected for e in corrected.inherits) == (choice.light == 1)
    assert choice_of(menu, cut(3)) is None
    slower = replace(times, fitted={(1, False): 0.5, (1, True): 0.1}).corrected()
    assert slower.seconds[1, False] == 0.5
    assert slower.seconds[1, True] == times.seconds[1, True]  # a correction saves no time


def test_fitted_corrections_bring_runs_nearer_that_they_were_not_fitted_to(pipeline, tmp_path):
    """Along the schedule's own trajectory; what was fitted is kept, and fitted again where a file was damaged."""
    settings, timeline = SamplingSettings(6, GUIDANCE, 7), sampler_timeline(pipeline, 6)
    prompts = [caption.text for caption in sample_captions(15, 33)]
    (light,) = with_corrections([cut(1, LINEAR)])
    actions = (FULL, FULL, light, conditional_only(LINEAR, light), FULL, light)
    fitter = Fitter(pipeline, timeline, encode(pipeline, prompts[:9], GUIDANCE), settings, tmp_path, 4)
    fit = fitter.fit(actions)
    assert {step for step, _ in fit.corrections} == set(fit.left) <= {2, 3, 5}
    assert fit.left and max(fit.left.values()) < 1
    judge = Judge(pipeline, prompts[9:], replace(settings, seed=400))
    plain = Schedule(
        tuple(replace(a, inherits=tuple(replace(e, corrected=False) for e in a.inherits)) for a in actions)
    )
    ours = Way("ours", 6, 0.0, Schedule(only_fitted(actions, fit), fit.corrections))
    assert judge.score(ours).mean() > judge.score(Way("plain", 6, 0.0, plain)).mean() + 0.3
    assert ours.key != Way("ours", 6, 0.0, Schedule(only_fitted(actions, fit))).key
    kept = next(tmp_path.glob("fit-*.safetensors"))
    before = kept.stat().st_mtime_ns
    assert fitter.fit(actions).left == fit.left
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:100])
    again = fitter.fit(actions)
    for key, correction in fit.corrections.items():
        assert torch.equal(again.corrections[key].weight, correction.weight)
