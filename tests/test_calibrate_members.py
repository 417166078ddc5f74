"""Calibrated switching: the search against trying everything, what is measured against runs, and the command."""

from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import parse_budget
from asdm_compress.evaluation.record import OwnSampling, load_evaluation
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.carrying import CarriedOver
from asdm_compress.inheritance.schedule_file import load_schedule
from asdm_compress.models.loading import LoadOptions, load_pipeline
from asdm_compress.models.saving import save_pipeline
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.own_steps import made_for, own_steps
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.goals import Goal
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.swaps import Bench, Swaps, is_possible
from asdm_compress.scheduling.switch_search import small_first, solve
from asdm_compress.scheduling.switch_times import SKIP, StepTimes
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.budget_search import LONGER
from asdm_compress.workflows.calibrate import CalibrateSettings, find_schedule
from asdm_compress.workflows.calibrate_members import run_calibrate_members
from asdm_compress.workflows.candidates import tried_steps
from asdm_compress.workflows.members_search import MembersSearch
from asdm_compress.workflows.progress import Silent
from asdm_compress.workflows.report import write_report

TEACHER, SMALL, TINY = (Action(member=name) for name in ("teacher", "small", "tiny"))
TIMES = StepTimes({TEACHER: 1.0, SMALL: 0.6, TINY: 0.35, SKIP: 0.02}, 0.5)
PROMPTS = ("a small red circle", "a large blue square")
EDITS = {"mid_block": "drop", "down_blocks.3.resnets.1": "drop", "up_blocks.2.attentions.1": "drop"}


def made_up(steps=5, seed=0):
    """Exchanges whose errors partly cancel and partly add up, around a schedule that has an error of its own."""
    chance = np.random.default_rng(seed)
    common = chance.normal(size=(2, 8))
    moved = {}
    for step in range(steps):
        for size, option in ((0.5, SMALL), (1.0, TINY), (0.8, SKIP)):
            if step > 1 or option != SKIP:
                values = size * (chance.choice([-1, 1]) * common + 0.7 * chance.normal(size=common.shape))
                moved[step, option] = values.astype(np.float32)
    return Swaps((TEACHER,) * steps, 0.3 * chance.normal(size=common.shape).astype(np.float32), moved)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
def test_the_search_finds_what_trying_everything_finds(seed, share):
    swaps = made_up(seed=seed)
    budget = share * TIMES.full(5)
    every = []
    for actions in itertools.product((TEACHER, SMALL, TINY, SKIP), repeat=5):
        known = all(a == TEACHER or pair in swaps.moved for pair in enumerate(actions) for a in pair[1:])
        if known and is_possible(actions) and TIMES.run(actions) <= budget:
            every.append((swaps.predicted(actions), actions))
    best, actions = min(every, key=lambda entry: entry[0])
    found = solve(swaps, TIMES, budget)
    assert found is not None
    assert found.proven
    assert found.predicted == pytest.approx(best, rel=1e-4)
    assert found.predicted == pytest.approx(swaps.predicted(found.actions), rel=1e-5)
    assert found.bound == pytest.approx(best, rel=1e-3)
    assert TIMES.run(found.actions) <= budget
    few = solve(swaps, TIMES, 0.9 * TIMES.full(5), most_changes=1)
    assert few is not None
    assert sum(a != TEACHER for a in few.actions) == 1


def test_no_time_has_no_schedule_and_t_stitch_takes_as_few_small_steps_as_it_can():
    assert solve(made_up(), TIMES, 1.0) is None
    assert solve(made_up(), TIMES, 0.4) is None
    order = small_first(TINY, TEACHER, 5, TIMES, 0.8 * TIMES.full(5))
    assert order == (TINY, TINY, TEACHER, TEACHER, TEACHER)
    assert small_first(SMALL, TEACHER, 5, TIMES, 0.5 * TIMES.full(5)) is None


@pytest.fixture(scope="module")
def student(unet):
    return assemble(unet, Plan(EDITS))


def test_one_exchange_is_predicted_as_it_turns_out(pipeline, unet, student, tmp_path):
    timeline = sampler_timeline(pipeline, 4)
    schedule = SwitchingSchedule((TEACHER,) * 4, timeline.timesteps, noise_of(pipeline.scheduler))
    switched = SwitchedUNet2DConditionModel.of({"teacher": unet, "small": student}, schedule)
    pipe = StableDiffusionPipeline(**{**pipeline.components, "unet": switched}, requires_safety_checker=False)
    bench = Bench(pipe, timeline, PROMPTS, SamplingSettings(4, 4.0), tmp_path)
    truth = bench.final_latents((TEACHER,) * 4)
    around = (TEACHER, TEACHER, SKIP, SMALL)
    swaps = bench.measure(around, (TEACHER, SMALL, SKIP), truth)
    assert set(swaps.moved) == {
        (0, SMALL), (1, SMALL), (1, SKIP), (2, TEACHER), (2, SMALL), (3, TEACHER),
    }  # fmt: skip
    for (step, option), moved in swaps.moved.items():
        actions = tuple(option if i == step else action for i, action in enumerate(around))
        error = bench.final_latents(actions) - truth
        assert np.allclose(error, swaps.error + moved, atol=1e-4)
        assert swaps.predicted(actions) == pytest.approx(float(np.square(error).mean()), rel=1e-3)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert kept
    again = bench.measure(around, (TEACHER, SMALL, SKIP), truth)
    assert all(np.array_equal(again.moved[pair], swaps.moved[pair]) for pair in swaps.moved)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    # The bench and the pipeline follow a schedule alike.
    pipe.unet = SwitchedUNet2DConditionModel.of(
        {"teacher": unet, "small": student}, SwitchingSchedule(around, timeline.timesteps, schedule.noise)
    )
    latents = sample(pipe, PROMPTS, SamplingSettings(4, 4.0)).latents
    assert torch.allclose(latents.flatten(1), torch.from_numpy(bench.final_latents(around)), atol=1e-3)


def test_what_takes_more_when_it_is_timed_is_solved_again_for_less(pipeline, unet, student):
    timeline, times = sampler_timeline(pipeline, 4), StepTimes({TEACHER: 1.0, SMALL: 0.6}, 0.5)
    schedule = SwitchingSchedule((TEACHER,) * 4, timeline.timesteps, noise_of(pipeline.scheduler))
    switched = SwitchedUNet2DConditionModel.of({"teacher": unet, "small": student}, schedule)
    pipe = StableDiffusionPipeline(**{**pipeline.components, "unet": switched}, requires_safety_checker=False)
    bench = Bench(pipe, timeline, PROMPTS[:1], SamplingSettings(4, 4.0))
    truth, full = bench.final_latents(schedule.actions), times.full(4)
    search = MembersSearch(bench, truth, bench, truth, (TEACHER, SMALL), times, Silent())
    search.run(schedule.actions, 0.92 * full)
    timed = []

    def slower(actions):
        timed.append(1.08 * times.run(actions) / full)
        return timed[-1]

    best, measured = search.within(0.92, full, slower)
    assert measured == timed[-1] == 1.08 * times.run(best) / full <= 0.92
    assert len(timed) > 1
    assert all(share > 0.92 for share in timed[:-1])
    assert measured > 0.7, "less was aimed at than had to be"
    with pytest.raises(AsdmError, match="when it is timed") as refused:
        search.within(0.92, full, lambda actions: 1.25)
    assert refused.value.exit_code == ExitCode.INFEASIBLE
    assert "latency=1.25" in str(refused.value.hint)
    # Where nothing that was found is within a time, the fastest of it is taken.
    assert times.run(search.best(0.0)) == min(times.run(r.found.actions) for r in search.rounds)
    with pytest.raises(AsdmError, match="switched between members"):
        find_schedule(pipe, settings_for("latency=0.8x"), Silent())


def test_without_exchanges_a_schedule_is_left_as_it_is():
    swaps = Swaps((TEACHER,) * 3, np.zeros((2, 8), np.float32), {})
    found = solve(swaps, TIMES, 1.01 * TIMES.full(3), most_changes=1)
    assert found is not None
    assert found.actions == (TEACHER,) * 3
    assert solve(swaps, TIMES, 0.9 * TIMES.full(3)) is None


def settings_for(budget, steps=5):
    return CalibrateSettings(
        Goal(limit=parse_budget([budget])[0]), SamplingSettings(steps, 4.0), "ddim", None, 2, 2, 2, repeats=2
    )


def test_calibrate_leaves_a_pipeline_and_its_report(pipeline, student, tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    whole = StableDiffusionPipeline(**{**pipeline.components, "unet": student}, requires_safety_checker=False)
    save_pipeline(whole, tmp_path / "small")
    models = ["mini-sd", str(tmp_path / "small")]
    found = run_calibrate_members(models, tmp_path / "out", LoadOptions(), settings_for("latency=0.8x"), Silent())
    content = json.loads((tmp_path / "out/calibration.json").read_text(encoding="utf-8"))
    assert content["time"]["predicted_share"] <= 0.8 * (1 + 1e-6)
    assert {entrant["role"] for entrant in content["entrants"]} >= {"calibrated", "fewer steps"}
    assert content["rounds"][0]["bound"] <= content["rounds"][0]["predicted"] * (1 + 1e-6)
    assert all(r["measured"] > 0 for r in content["rounds"])
    assert set(content["damages"]) == {"full@small", "skip:linear"}
    assert found.rows()[0][0] == "calibrated"
    schedule = load_schedule(tmp_path / "out/switching.yaml")
    opened = load_pipeline(str(tmp_path / "out"), LoadOptions()).unet
    assert opened.schedule.actions == schedule.actions == found.switched.schedule.actions
    assert (tmp_path / "out/damages.svg").read_text(encoding="utf-8").lstrip().startswith("<")
    assert own_steps(tmp_path / "out", make_scheduler("ddim", pipeline)) == 5
    assert own_steps(tmp_path / "out", pipeline.scheduler) is None  # of another one they say nothing
    report = write_report(tmp_path / "out").report
    assert [section.key for section in report.sections] == ["switching", "provenance"]
    assert content["verdict"] in report.section("switching").lead
    ways = report.section("switching").as_json()["tables"][0]["rows"]
    assert [(row["way"], row["time"]) for row in ways] == [(e["way"], e["share"]) for e in content["entrants"]]
    assert f"{content['time']['measured_share']:.3f}x" in report.verdict[0]
    with pytest.raises(AsdmError, match="no order of these members") as refused:
        run_calibrate_members(models, tmp_path / "none", LoadOptions(), settings_for("latency=0.01x"), Silent())
    assert refused.value.exit_code == ExitCode.INFEASIBLE
    assert "can be reached" in str(refused.value.hint)
    assert not (tmp_path / "none").exists()


def test_bad_members_end_with_two(cli, tmp_path):
    result = cli("calibrate", "mini-sd", "--members", "gone", "-b", "latency=0.5x", "--out", "out")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert not (tmp_path / "out").exists()


OPTIMIZE = (
    "optimize", "mini-sd", "--members", "small", "--steps", "5", "--repeats", "2", "--json",
    "--calibration-prompts", "1", "--validation-prompts", "2", "--test-prompts", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def optimized(pipeline, student, cli_in, tmp_path_factory):
    """A folder with what `optimize` left in `fast`, and what it printed."""
    folder = tmp_path_factory.mktemp("optimized")
    whole = StableDiffusionPipeline(**{**pipeline.components, "unet": student}, requires_safety_checker=False)
    save_pipeline(whole, folder / "small")
    result = cli_in(folder, *OPTIMIZE, "-b", "latency=0.7x", "--out", "fast")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_optimize_leaves_a_pipeline_that_keeps_the_time(optimized):
    folder, content = optimized
    assert content["best"]["share"] <= 0.7
    assert 0 < content["reference"]["decoding"] < content["reference"]["outside_the_unet_loop"]
    roles = [entry["role"] for entry in content["tried"]]
    assert set(roles) == {"fewer steps", "a student alone", "joint", "calibrated"}
    # The calibrated ones are one member's steps, in part or skipped, and as many as they say.
    calibrated_of = set()
    for entry in (entry for entry in content["tried"] if entry["role"] == "calibrated"):
        assert len(entry["actions"]) == entry["steps"]
        (member,) = {name.rpartition("@")[2] for name in entry["actions"] if not name.startswith("skip")}
        calibrated_of.add(member)
    # A student that takes all of the reference's steps in the time has nothing to leave out.
    alone = {entry["steps"] for entry in content["tried"] if entry["role"] == "a student alone"}
    assert calibrated_of == ({"mini-sd"} if alone == {5} else {"mini-sd", "small"})
    # The frontier is chosen on validation prompts, as the best is.
    by_share = sorted(content["tried"], key=lambda entry: entry["share"])
    psnr = [entry["validation"]["psnr"] for entry in by_share]
    risen = [entry["way"] for i, entry in enumerate(by_share) if all(psnr[i] > before for before in psnr[:i])]
    assert [entry["way"] for entry in content["frontier"]] == risen
    assert content["best"]["validation"]["psnr"] == max(
        p for p, e in zip(psnr, by_share, strict=True) if e["share"] <= 0.7
    )
    assert (folder / "fast/frontier.svg").is_file()
    assert json.loads((folder / "fast/optimize.json").read_text(encoding="utf-8"))["best"] == content["best"]


def test_what_optimize_found_runs_with_nothing_around_it(optimized, cli_in):
    folder, content = optimized
    folders = {entry["folder"] for entry in content["frontier"]} - {"."}
    assert {f"frontier/{path.name}" for path in (folder / "fast").glob("frontier/*")} == folders
    weights = folder / "fast/unet/diffusion_pytorch_model.safetensors"  # which lie there once
    assert weights.stat().st_nlink == 1 + len(folders)
    for entry in content["frontier"]:
        place = folder / "fast" / entry["folder"]
        plain = StableDiffusionPipeline.from_pretrained(place)
        assert own_steps(place, plain.scheduler) == entry["steps"]
        assert made_for(place).guidance == 5.0
        with warnings.catch_warnings():
            warnings.simplefilter("error", CarriedOver)
            found = sample(plain, PROMPTS[:1], SamplingSettings(entry["steps"], 5.0)).latents
        assert found.isfinite().all()
        if (place / "inheritance.yaml").exists():
            assert load_schedule(place / "inheritance.yaml").validity is not None
            with inheriting(plain, place / "inheritance.yaml"):
                assert torch.equal(sample(plain, PROMPTS[:1], SamplingSettings(entry["steps"], 5.0)).latents, found)
    done = cli_in(folder, "export", "fast", "--format", "portable", "--out", "portable")
    is_switched = "SwitchedUNet" in (folder / "fast" / "unet" / "config.json").read_text()
    assert (done.returncode == 0) == is_switched, done.stderr


def test_an_optimized_model_is_evaluated_in_steps_of_its_own(optimized, cli_in):
    """Beside the teacher in all of its steps, by its own sampler where that is another."""
    folder, content = optimized
    beside = ("--against", "mini-sd", "--images", "2", "--guidance", "5", "--repeats", "2", "--json")
    done = cli_in(folder, "evaluate", "fast", *beside, "--out", "evaluated")
    assert done.returncode == 0, done.stderr
    found = load_evaluation(folder / "evaluated" / "eval.json")
    own, steps = found.model.sampling, found.protocol.steps
    assert own.steps == content["best"]["steps"] < steps == 25
    assert found.find("macs", "one image").change.value < own.steps / steps + 1e-6
    assert f"{own.sampler}, {own.steps} steps" in (folder / "evaluated" / "protocol.md").read_text()
    done = cli_in(
        folder, "evaluate", "mini-sd", *beside, "--model-steps", "9", "--model-scheduler", "unipc", "--out", "fewer"
    )
    assert done.returncode == 0, done.stderr
    found = load_evaluation(folder / "fewer" / "eval.json")
    assert found.model.sampling == OwnSampling(sampler="UniPCMultistepScheduler", steps=9, unet_calls=9)
    assert found.find("macs", "one image").change.value == pytest.approx(9 / 25)


def test_the_report_shows_what_optimize_tried(optimized):
    folder, content = optimized
    shown = write_report(folder / "fast").report.section("optimize").as_json()["tables"][0]["rows"]
    assert [row["time"] for row in shown] == sorted(entry["share"] for entry in content["tried"])
    assert [row["way"] for row in shown if row[""] == "best"] == [content["best"]["way"]]
    page = (folder / "fast/report.html").read_text(encoding="utf-8")
    assert "asdm-compress optimize mini-sd --members small" in page


def test_a_time_that_nothing_keeps_ends_with_three(optimized, cli_in):
    folder, _ = optimized
    refused = cli_in(folder, *OPTIMIZE, "-b", "latency=0.01x", "--out", "none")
    assert (refused.returncode, "Traceback" in refused.stderr) == (3, False), refused.stderr


@pytest.mark.parametrize(
    ("teacher", "fastest", "expected"),
    [(12, 60, [12, 17, 24]), (20, 90, [20, 25]), (2, 9, [8, 11, 16]), (1, 3, [3, 4, 6]), (1, 1, [2])],
)
def test_steps_are_counted_from_the_teachers_own_where_it_has_time_for_some(teacher, fastest, expected):
    assert tried_steps(teacher, fastest, 25, LONGER) == expected
