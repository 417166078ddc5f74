"""The calibrate command: what it leaves, what it reuses, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import parse_budget
from asdm_compress.evaluation.prompts import read_prompts
from asdm_compress.inheritance.costs import counts_alike, fitted_macs, run_macs
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.schedule_file import load_schedule
from asdm_compress.inheritance.shapes import value_shapes
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.counting import count
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling.goals import Goal, goal_of
from asdm_compress.scheduling.measure import sampler_timeline
from asdm_compress.scheduling.menu import cut_sources
from asdm_compress.scheduling.timing import Loop
from asdm_compress.scheduling.ways import Way
from asdm_compress.workflows.calibrate import (
    CalibrateSettings,
    find_schedule,
    run_calibrate,
)
from asdm_compress.workflows.calibrated import Splits, own_splits
from asdm_compress.workflows.generate import GenerateSettings, run_generate
from asdm_compress.workflows.progress import Silent

GUIDANCE = 3.0
ARGUMENTS = (
    "calibrate", "mini-sd", "--steps", "6", "--guidance", "3", "--scheduler", "ddim", "--calibration-prompts", "2",
    "--validation-prompts", "2", "--test-prompts", "2", "--repeats", "2", "--curve", "1", "--json",
)  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, cli_in):
    """One real run of the command, small in prompts and steps; several tests look at what it left."""
    folder = tmp_path_factory.mktemp("calibrated")
    run = partial(cli_in, folder)
    result = run(*ARGUMENTS, "--budget", "latency=0.7x", "--out", "out")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout), run


def test_calibrate_leaves_a_schedule_and_its_report(calibrated):
    folder, printed, _ = calibrated
    left = {p.name for p in (folder / "out").iterdir()} - {"inheritance.safetensors"}
    assert left == {"inheritance.yaml", "calibration.json", "steps.svg", "time_psnr.svg", "inheritance.png"}
    roles = [c["role"] for c in printed["contestants"]]
    assert roles[:3] == ["schedule", "fewer steps", "fewer steps, best sampler"]
    assert printed["time"]["predicted_share"] <= 0.7 * (1 + 1e-6)
    assert printed["verdict"]
    front = printed["front"]
    shares = [corner["share"] for corner in front["corners"]]
    assert shares == sorted(shares)
    assert all(
        front["actions"][corner["steps"][0]] == "full" and len(corner["steps"]) == 6 for corner in front["corners"]
    )
    assert printed["surrogate"]["lower_bound"] <= printed["surrogate"]["summed_cost"] * (1 + 1e-6)
    assert len(printed["steps"]) == 6
    for step in printed["steps"]:
        assert (step["action"] == "full") == (step["measured_error"] < 1e-4)
        assert step["predicted_error"] is None or (step["action"] == "full") == (step["predicted_error"] == 0)
    assert {point["role"] for point in printed["curve"]} >= {"schedule", "fewer steps", "fewer steps, best sampler"}
    with Image.open(folder / "out" / "inheritance.png") as grid:
        assert grid.size[0] > 2 * 128  # two test prompts beside one another


def test_planned_macs_of_a_calibrated_schedule_are_the_executed_ones(calibrated, pipeline):
    folder, _, _ = calibrated
    schedule = load_schedule(folder / "out" / "inheritance.yaml")
    texts = encode(pipeline, ["a small red circle"], GUIDANCE)
    sampler = Way("", 6, 0.0, schedule, "ddim")
    loop: Loop = sampler.loop(pipeline, texts, SamplingSettings(6, GUIDANCE))
    # torch does not know the operations of the CPU's fused attention; of its products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loop()
    timeline = sampler_timeline(loop.pipeline, 6)
    plan = Evaluator(pipeline.unet).plan(schedule.actions, timeline, True)
    tokens = pipeline.tokenizer.model_max_length
    both, half = (count(pipeline.unet, rows, 16, 16, tokens) for rows in (2, 1))
    shapes = value_shapes(pipeline.unet, cut_sources(pipeline.unet), 16, 16)
    planned = sum(run_macs(plan, counts_alike(both, half))) + sum(fitted_macs(plan, schedule.corrections, shapes, 2))
    assert 2 * planned == counter.get_total_flops()


def test_generate_takes_the_schedule_and_refuses_it_elsewhere(calibrated, tmp_path):
    folder, _, run = calibrated
    said = ("generate", "mini-sd", "a small red circle", "--steps", "6", "--guidance", "3", "--overwrite")
    rule = ("--inherit", "out/inheritance.yaml")
    good = run(*said, "--scheduler", "ddim", *rule)
    assert good.returncode == 0, good.stderr
    sampling = SamplingSettings(6, GUIDANCE)
    path = str(folder / "out" / "inheritance.yaml")
    for scheduler, other, what in (
        ("dpm++", sampling, "scheduler"),
        ("ddim", replace(sampling, guidance=1.0), "guidance scale"),
        ("ddim", replace(sampling, image_size=192), "image size"),
    ):
        asked = GenerateSettings(other, ("a cross",), scheduler=scheduler, inherit=path)
        with pytest.raises(AsdmError, match=f"calibrated for another {what}"):
            run_generate("mini-sd", tmp_path / "images", LoadOptions(), asked, Silent())
    asked = GenerateSettings(sampling, ("a cross",), inherit="calibrated")
    with pytest.raises(AsdmError, match="no calibrated schedule in its folder"):
        run_generate("mini-sd", tmp_path / "images", LoadOptions(), asked, Silent())
    assert not (tmp_path / "images").exists()


def test_a_second_goal_reuses_what_was_measured_and_one_too_small_names_the_cheapest(calibrated, tmp_path, monkeypatch):
    folder, _, _ = calibrated
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(folder / "cache"))
    responses = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("responses-*")}
    assert responses
    goal = goal_of(parse_budget(["latency=0.01x"]), None, None)
    settings = CalibrateSettings(goal, SamplingSettings(6, GUIDANCE), "ddim", None, 2, 2, 2, repeats=2)
    with pytest.raises(AsdmError, match=r"no schedule takes 0\.01x") as refused:
        run_calibrate("mini-sd", tmp_path / "none", LoadOptions(), settings, Silent())
    assert refused.value.exit_code == ExitCode.INFEASIBLE
    assert "latency=0." in str(refused.value.hint)
    assert not (tmp_path / "none").exists()
    assert {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("responses-*")} == responses


def test_captions_that_are_no_text_end_with_two(cli, tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"a circle\n\xff\xfe\n")
    result = cli("calibrate", "mini-sd", "-b", "latency=0.5x", "--prompts", "captions.txt", "--out", "out")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert "is not UTF-8" in result.stderr
    assert not (tmp_path / "out").exists()
    for content in (b"", b"\n \n"):
        (tmp_path / "captions.txt").write_bytes(content)
        with pytest.raises(AsdmError, match="has 0 prompts"):
            read_prompts(tmp_path / "captions.txt")


def test_a_user_s_own_prompts_are_split_without_overlap():
    for size in range(3, 90):
        own = tuple(map(str, range(size)))
        splits = own_splits(own, 16, 16, 32)
        together = splits.calibration + splits.validation + splits.test
        assert len(set(together)) == len(together)
        assert together == own[: len(together)] if size <= 64 else len(together) == 64
        assert splits.calibration and splits.test
        assert len(splits.validation) >= (2 if size > 3 else 1)
    assert own_splits(("a", "b"), 16, 16, 32) == Splits(("a",), ("a",), ("b",))
    assert own_splits(("a", "b", "a", "c", "b", "d"), 1, 2, 1) == own_splits(("a", "b", "c", "d"), 1, 2, 1)
    with pytest.raises(AsdmError, match="all prompts are the same"):
        own_splits(("a", "a"), 16, 16, 32)


def test_one_prompt_to_choose_on_is_refused_before_any_measuring(pipeline):
    settings = CalibrateSettings(Goal(metric="ssim", least=0.9), prompts=("a circle", "a cross"))
    with pytest.raises(AsdmError, match="vouches for no mean quality") as refused:
        find_schedule(pipeline, settings, Silent())
    assert refused.value.exit_code == ExitCode.USER


def test_without_guidance_and_with_prompts_of_ones_own_a_least_quality_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    own = ("a red circle", "a blue ring", "a cross", "a square", "a star")
    sampling = SamplingSettings(4, 1.0)
    settings = CalibrateSettings(goal_of((), 5.0, None), sampling, "dpm++", own, repeats=2, curve=0)
    result = run_calibrate("mini-sd", tmp_path / "out", LoadOptions(), settings, Silent())
    assert result.content["prompts"] == {"calibration": 1, "validation": 2, "test": 2}
    assert "with 95% confidence" in result.content["confidence"]
    ours = result.calibrated.contestants[0]
    assert ours.validation.lower() >= 5
    actions = load_schedule(tmp_path / "out" / "inheritance.yaml").actions
    assert all(action.guidance is None for action in actions)
