"""`assemble` and what follows it, as users meet them: real processes, their output, their files, their exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from asdm_compress.core.edits import has_weights
from asdm_compress.core.recipe import load_recipe


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """One real run of the main job, small in prompts alone; several tests look at what it left."""
    folder = tmp_path_factory.mktemp("assembled")
    environment = {**os.environ, "ASDM_COMPRESS_CACHE": str(folder / "cache"), "NO_COLOR": "1"}
    arguments = ["assemble", "mini-sd", "--out", "out", "--json"]
    small = ["--calibration-prompts", "3", "--held-out-prompts", "2", "--repeats", "3", "--steps", "8", "--slot", "1x1"]

    def run(budget: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "asdm_compress", *arguments, *small, "--budget", budget, *more],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    result = run("macs=0.7x,params=0.75x")
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
    if evidence.proven_optimal:
        assert evidence.damage_bound == pytest.approx(evidence.summed_damage, rel=1e-3)


def test_the_report_is_one_file_that_needs_no_network(assembled):
    folder, _, _ = assembled
    text = (folder / "out" / "report.html").read_text()
    assert "data:image/png;base64," in text
    assert text.count("<svg") == 2
    for link in ('src="http', 'href="http', "url(http", "@import"):
        assert link not in text
    with Image.open(folder / "out" / "grid.png") as grid:
        assert grid.width > 2 * 128
        assert grid.height > 2 * 128


def test_a_second_budget_reuses_what_was_measured(assembled):
    folder, _, run = assembled
    stores = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*") if p.is_file()}
    result = run("macs=0.9x", "--overwrite", "--profile", "out/profile.json")
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


def test_apply_replays_the_recipe_to_the_same_weights(assembled, cli, tmp_path):
    folder, printed, _ = assembled
    same = ["--calibration-prompts", "3", "--steps", "8"]
    result = cli("apply", str(folder / "out" / "recipe.yaml"), "mini-sd", "--out", "again", "--json", *same)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["stock"] == printed["stock"]
    edits = load_recipe(folder / "out" / "recipe.yaml").as_edits()
    assert json.loads(result.stdout)["slots"] == sum(map(has_weights, edits.values()))
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / "out" / weights).read_bytes()


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
    assert "holds the model itself" in " ".join(result.stderr.split())


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


def test_the_readmes_python_runs(assembled, tmp_path):
    folder, _, _ = assembled
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "mini-light").symlink_to(folder / "out")
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_ctrl_c_half_way_leaves_no_half_written_folder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "asdm_compress", "assemble", "--budget", "macs=0.7x", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "ASDM_COMPRESS_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The store of damages appears when the work is in full swing.
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("cache/measurements/*/damages*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
