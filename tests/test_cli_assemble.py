"""`assemble` and what follows it, as users meet them: real processes, their output, their files, their exit codes."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asdm_compress.assembly.frontier import load_frontier
from asdm_compress.assembly.record import load_assembly
from asdm_compress.core.distillation import load_preset, rate_for
from asdm_compress.core.edits import has_weights
from asdm_compress.core.recipe import load_recipe
from asdm_compress.evaluation.record import load_evaluation
from asdm_compress.inheritance.schedule_file import load_schedule
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.counting import count_macs


@pytest.fixture(scope="module")
def assembled(tmp_path_factory, cli_in):
    """One real run of the main job, small in prompts alone; several tests look at what it left."""
    folder = tmp_path_factory.mktemp("assembled")
    arguments = ["assemble", "mini-sd", "--out", "out", "--json"]
    shared = ["--calibration-prompts", "3", "--repeats", "3", "--steps", "4", "--bands", "4", "--scheduler", "ddim"]
    small = [*shared, "--held-out-prompts", "2", "--slot", "1x1", "--narrow", "0.5", "--neighbours", "6"]

    def run(budget: str | None, *more: str, command=None) -> subprocess.CompletedProcess[str]:
        options = small if command is None else shared
        asked = [] if budget is None else ["--budget", budget]
        return cli_in(folder, *(command or arguments), *options, *asked, *more)

    result = run("macs=0.7x,params=0.75x", "--inherit", "latency=0.7x")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout), run


def test_assemble_leaves_a_student_that_meets_its_budget(assembled):
    folder, printed, _ = assembled
    out = folder / "out"
    assert sorted(p.name for p in folder.iterdir()) == ["cache", "out"]
    names = {p.name for p in out.iterdir()}
    assert {"unet", "vae", "model_index.json", "profile.json", "recipe.yaml", "report.html", "grid.png"} <= names
    recipe = load_recipe(out / "recipe.yaml")
    assert printed["recipe"]["edits"] == [e.model_dump() for e in recipe.edits]
    evidence = recipe.evidence
    assert evidence is not None
    assert evidence.measured.macs <= 0.7 * evidence.teacher.macs
    assert evidence.measured.params <= 0.75 * evidence.teacher.params
    # Counts are predicted exactly, damages nearly.
    assert (evidence.measured.macs, evidence.measured.params) == (evidence.predicted.macs, evidence.predicted.params)
    assert 0 < evidence.measured_damage < 1
    assert 0 <= evidence.damage_bound <= evidence.summed_damage * (1 + 1e-6)
    training = recipe.distillation
    assert training is not None
    assert (training.preset, training.data.source) == ("mini-sd", "scenes")
    highest = load_preset("mini-sd").optimiser.learning_rate
    assert training.optimiser.learning_rate == rate_for(highest, evidence.held_out_damage) < highest
    assert {pair.teacher for pair in training.pairs or ()} > {"up_blocks.3.resnets.2"}
    assert training.expected is not None
    assert training.expected.trained_parameters == evidence.measured.params
    # The evidence counts one image with guidance, which is a batch of two; a backward pass counts as two. In training
    # nothing is shared by two rows.
    ours = count_macs(load_pipeline(str(out), LoadOptions()).unet, 1, 16, 16, 40)[""].total
    passes = training.steps * training.batch * (3 * ours + evidence.teacher.macs / 2)
    assert training.expected.macs == pytest.approx(passes, rel=1e-3)
    if evidence.proven_optimal:
        assert evidence.damage_bound == pytest.approx(evidence.summed_damage, rel=1e-3)


def test_a_student_carries_a_calibrated_schedule_that_generate_and_evaluate_take(assembled, cli, tmp_path):
    folder, printed, _ = assembled
    out = folder / "out"
    entry = load_recipe(out / "recipe.yaml").inheritance
    assert entry is not None
    assert (entry.budget, entry.schedule) == ("latency=0.7x", "inheritance.yaml")
    schedule = load_schedule(out / entry.schedule)
    assert len(schedule.actions) == 4
    assert {"calibration.json", "steps.svg", "time_psnr.svg", "inheritance.png"} <= {p.name for p in out.iterdir()}
    assert printed["recipe"]["inheritance"]["psnr"] == entry.psnr
    result = cli("generate", str(out), "a cross", "--steps", "4", "--inherit", "calibrated", "--json")
    assert result.returncode == 0, result.stderr
    assert any("inheriting calibrated" in name for name in json.loads(result.stdout)["seconds_per_image"])
    # It is of the sampler that it was calibrated for, which is not the model's own.
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    few = ("--images", "2", "--steps", "4", "--repeats", "0", "--guidance", "5", "--against", "mini-sd")
    result = cli("evaluate", str(out), "--inherit", "calibrated", *few, "--out", "evaluated", "--json")
    assert result.returncode == 0, result.stderr
    assert load_evaluation(tmp_path / "evaluated/eval.json").model.inherit == str(out / "inheritance.yaml")


def test_the_report_is_one_file_that_needs_no_network(assembled):
    folder, _, _ = assembled
    out = folder / "out"
    text = (out / "report.html").read_text()
    assert text.count("data:image/png;base64,") >= 2 * 2
    for link in ('src="http', 'href="http', "url(http", "@import"):
        assert link not in text
    sections = json.loads((out / "report.json").read_text())["sections"]
    assert {"costs", "plan", "time", "predictions", "damage", "frontier", "provenance"} <= set(sections)
    assert "### Predicted against measured" in (out / "README.md").read_text()  # the card
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 128
        assert grid.height > 2 * 128


def test_what_the_assembly_measured_lies_beside_the_student(assembled):
    folder, _, _ = assembled
    recipe, found = load_recipe(folder / "out" / "recipe.yaml"), load_assembly(folder / "out" / "assembly.json")
    evidence = recipe.evidence
    assert evidence is not None
    # The parts of the student add up to the whole, under the teacher's names.
    blocks = [site for site in found.student_sites if re.fullmatch(r"[a-z_]+|(down|up)_blocks\.\d", site.path)]
    assert sum(site.parameters for site in blocks) == evidence.measured.params
    assert sum(site.macs for site in blocks) == evidence.measured.macs
    assert sum(band.weight * band.held_out_damage for band in found.bands) == pytest.approx(evidence.held_out_damage)
    assert [found.bands[0].first, found.bands[-1].last] == [1000, 0]
    chosen = [found.option(entry.site, entry.edit) for entry in recipe.edits]
    assert all(option is not None and (option.damage > 0 or option.edit == "shared") for option in chosen)
    # The terms of pairs that the search minimised are those in the file.
    between, names = found.interaction(), [option.name for option in found.options]
    stored = np.frombuffer(base64.b64decode(found.pair_terms), "<f4")
    assert [between(a, b) for a, b in combinations(names, 2)] == stored.tolist()
    for pair in found.pairs:
        with Image.open(folder / "out" / pair.student) as image:
            assert image.size == (128, 128)


def test_the_frontier_of_a_student_refuses_what_would_do_nothing(assembled, cli_in):
    folder, _, _ = assembled
    result = cli_in(folder, "frontier", "out", "--slot", "none")
    assert result.returncode == 2
    assert "--slot does nothing here" in result.stderr


def test_every_plan_of_the_frontier_keeps_its_budget(assembled):
    folder, _, _ = assembled
    found = load_frontier(folder / "out" / "frontier.json")
    assert (found.resource, found.also) == ("macs", ["params=0.75x"])
    for point in found.points:
        share = float(point.budget.removeprefix("macs=").removesuffix("x"))
        assert found.share(point) <= share * (1 + 1e-9)
        assert point.costs.params <= 0.75 * found.teacher.params
        assert point.bound <= point.summed_damage * (1 + 1e-6)
    damages = [point.summed_damage for point in found.points if point.proven]
    assert damages == sorted(damages)


def test_a_frontier_with_images_builds_and_measures_its_plans(assembled):
    folder, _, run = assembled
    small = ["--slot", "none", "--narrow", "none", "--finest", "unit", "--profile", "out/profile.json"]
    arguments = ["--resource", "macs", "--budgets", "0.9x", "--images", "1", "--out", "front", *small]
    result = run(None, *arguments, command=("frontier", "mini-sd", "--json"))
    assert result.returncode == 0, result.stderr
    (point,) = json.loads(result.stdout)["points"]
    assert 0 < point["measured_damage"] < 1
    assert point["measured_latency"] > 0
    found = load_frontier(folder / "front" / "frontier.json")
    with Image.open(folder / "front" / found.points[0].images[0].student) as image:
        assert image.size == (128, 128)
    shutil.rmtree(folder / "front")


def test_a_second_budget_reuses_what_was_measured(assembled):
    folder, _, run = assembled
    stores = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*") if p.is_file()}
    result = run("macs=0.9x", "--overwrite", "--profile", "out/profile.json", "--neighbours", "0")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["recipe"]["evidence"]["measured"]["macs"] < 0.9 * 501_571_584 + 1
    assert {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*") if p.is_file()} == stores


def test_an_infeasible_budget_ends_with_three_and_the_smallest(assembled):
    folder, _, run = assembled
    before = (folder / "out" / "recipe.yaml").read_text()
    result = run("latency=0.001x", "--overwrite")
    error = json.loads(result.stdout)["error"]
    assert (result.returncode, error["exit_code"]) == (3, 3)
    assert "latency=0." in error["message"].partition("smallest")[2]
    assert (folder / "out" / "recipe.yaml").read_text() == before


def test_apply_replays_the_recipe_to_the_same_weights(assembled, cli_anew, tmp_path):
    folder, printed, _ = assembled
    same = ["--calibration-prompts", "3", "--steps", "4", "--bands", "4", "--scheduler", "ddim"]
    result = cli_anew("apply", str(folder / "out" / "recipe.yaml"), "mini-sd", "--out", "again", "--json", *same)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["stock"] == printed["stock"]
    edits = load_recipe(folder / "out" / "recipe.yaml").as_edits()
    assert json.loads(result.stdout)["slots"] == sum(map(has_weights, edits.values()))
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / "out" / weights).read_bytes()
    # It recorded what `assemble` did, and would have taken that if it had lain in its cache.
    ours, theirs = ({p.parent.name for p in at.rglob("triples.pt")} for at in (tmp_path / "cache", folder / "cache"))
    assert ours == theirs


def test_a_student_is_no_teacher(assembled, cli):
    folder, printed, _ = assembled
    assert not printed["stock"]
    result = cli("assemble", str(folder / "out"), "--budget", "macs=0.9x")
    assert result.returncode == 2
    assert "itself an assembled student" in " ".join(result.stderr.split())


def test_a_model_is_not_replaced_by_its_own_student(assembled, cli):
    folder, _, _ = assembled
    out = str(folder / "out")
    result = cli("apply", f"{out}/recipe.yaml", out, "--out", out, "--overwrite")
    assert result.returncode == 2
    assert "recipe.yaml, which is read and cannot be replaced" in " ".join(result.stderr.split())
    recipe = folder / "apart.yaml"
    shutil.copy(folder / "out/recipe.yaml", recipe)
    result = cli("apply", str(recipe), out, "--out", out, "--overwrite")
    assert result.returncode == 2
    assert "holds the model itself" in " ".join(result.stderr.split())


def test_the_frontier_of_a_model_does_not_replace_the_student_whose_profile_it_reads(assembled, cli_in):
    folder, _, _ = assembled
    refused = cli_in(folder, "frontier", "mini-sd", "--profile", "out/profile.json", "--out", "out", "--overwrite")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr
    assert "profile.json, which is read" in " ".join(refused.stderr.split())
    assert (folder / "out" / "recipe.yaml").is_file()


def test_apply_refuses_another_architecture_and_says_what_differs(assembled, cli, tmp_path):
    folder, _, _ = assembled
    changed = (
        (folder / "out" / "recipe.yaml").read_text().replace("cross_attention_dim: 96", "cross_attention_dim: 768")
    )
    (tmp_path / "other.yaml").write_text(changed)
    result = cli("apply", "other.yaml", "mini-sd")
    assert result.returncode == 2
    assert "cross_attention_dim is 96, the recipe's is 768" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_generate_compares_student_and_teacher(assembled, cli, tmp_path):
    folder, _, _ = assembled
    result = cli(
        "generate", str(folder / "out"), "a small red circle", "a large blue ring", "--compare", "mini-sd",
        "--steps", "4", "--out", "images", "--images", "2", "--seed", "5", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert sorted(printed["files"]) == sorted(p.name for p in (tmp_path / "images").iterdir())
    assert len(printed["files"]) == 2 * 4 + 1
    assert set(printed["seconds_per_image"]) == {"mini-sd", str(folder / "out")}
    assert 0 < printed["fidelity"]["psnr"] < 100
    with Image.open(tmp_path / "images" / "teacher-0005-a-small-red-circle.png") as image:
        assert image.size == (128, 128)


def test_the_python_of_readme_and_guides_runs(assembled, tmp_path):
    folder, _, _ = assembled
    top = Path(__file__).parents[1]
    texts = [path.read_text(encoding="utf-8") for path in (top / "README.md", *(top / "tools/guides").glob("*.md"))]
    # The examples shown as they stand have tests of their own, with settings that take less time.
    examples = {path.read_text(encoding="utf-8").strip() for path in (top / "tools/examples").glob("*.py")}
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    first, *others = [block for block in blocks if block.strip() not in examples]
    assert 0 < len(others) <= len(blocks) - 1 - len(examples)
    (tmp_path / "mini-light").symlink_to(folder / "out")
    environment = {**os.environ, "ASDM_COMPRESS_CACHE": str(tmp_path / "cache")}
    for block in (first, *others):
        result = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        if block is first:
            assert float(result.stdout) > 0  # the latency that it prints


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_ctrl_c_half_way_leaves_no_half_written_folder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "asdm_compress", "assemble", "--budget", "macs=0.7x", "--out", "out",
         "--calibration-prompts", "8", "--steps", "4", "--bands", "4", "--repeats", "2", "--slot", "none",
         "--narrow", "none"],
        cwd=tmp_path, env={**os.environ, "ASDM_COMPRESS_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # The store of damages appears when the work is in full swing.
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("cache/measurements/*/damages*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "The same command goes on" in " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
