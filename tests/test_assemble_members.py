"""`assemble --members`: the students that switch best together, against trying every line-up, and as a command."""

from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.calibration import Effort
from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.ladder import Rung, line_up
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.search import Solution
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.recipe import load_recipe
from asdm_compress.core.units import parse_budget
from asdm_compress.models.loading import LoadOptions, load_pipeline
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.workflows import students as making
from asdm_compress.workflows.assemble import Target
from asdm_compress.workflows.assemble_members import run_assemble_members
from asdm_compress.workflows.plan import PlanSettings
from asdm_compress.workflows.progress import Silent
from asdm_compress.workflows.students import FILE_NAME

WEIGHTS = (0.5, 0.3, 0.2)
BUDGET = 0.65


def rung(latency, *bands):
    total = float(np.dot(WEIGHTS, bands))
    return Rung(Solution(Plan({}), (), total, total, True, {}, 0.0), latency, Damage(bands, total))


# Each of the fast ones is good in a band of its own, and no one of them everywhere.
RUNGS = [
    rung(0.9, 1e-4, 1e-4, 1e-4), rung(0.7, 4e-4, 9e-4, 8e-4), rung(0.5, 2e-3, 9e-2, 4e-2), rung(0.45, 8e-2, 7e-2, 3e-3),
    rung(0.3, 1e-1, 4e-2, 2e-1),
]  # fmt: skip


def by_trying(rungs, steps, share, most):
    """The least damage of all line-ups, step by step."""
    lengths = [sum(step * 3 // steps == band for step in range(steps)) for band in range(3)]
    best = float("inf")
    for size in range(most + 1):
        for students in itertools.combinations(rungs, size):
            for who in itertools.product((None, *students), repeat=steps):
                time = sum(1.0 if r is None else r.latency for r in who)
                if time <= share * steps + 1e-9:
                    bands = [step * 3 // steps for step in range(steps)]
                    damage = sum(
                        WEIGHTS[b] * r.damage.bands[b] / lengths[b] for b, r in zip(bands, who, strict=True) if r
                    )
                    best = min(best, damage)
    return best


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("share", [0.8, 0.65, 0.5])
def test_the_line_up_is_the_best_of_all(most, share):
    found = line_up(RUNGS, WEIGHTS, 6, share, most)
    assert found.proven
    assert found.predicted == pytest.approx(by_trying(RUNGS, 6, share, most), rel=1e-6)
    assert found.bound == pytest.approx(found.predicted, rel=1e-6)
    assert len(found.students) <= most
    assert [sum(row) for row in found.counts] == [2, 2, 2]
    times = [1.0, *(RUNGS[i].latency for i in found.students)]
    assert sum(t * n for row in found.counts for t, n in zip(times, row, strict=True)) <= share * 6 + 1e-9
    assert all(any(row[i + 1] for row in found.counts) for i in range(len(found.students)))


def test_more_students_are_never_worse_and_two_beat_the_best_one():
    damages = [line_up(RUNGS, WEIGHTS, 24, BUDGET, most).predicted for most in (1, 2, 3, 5)]
    assert damages == sorted(damages, reverse=True)
    assert damages[1] < damages[0]


def test_what_a_step_takes_beside_the_unet_is_no_students_to_save():
    found = line_up(RUNGS, WEIGHTS, 6, 0.65, 2, overhead=0.2)
    slower = [rung(0.2 + 0.8 * r.latency, *r.damage.bands) for r in RUNGS]
    assert found.predicted == pytest.approx(by_trying(slower, 6, 0.65, 2), rel=1e-6)
    with pytest.raises(AsdmError, match="no students") as refused:
        line_up(RUNGS, WEIGHTS, 6, 0.4, 2, overhead=0.2)
    assert "0.4400x" in str(refused.value.hint)


def test_a_time_that_no_student_keeps_is_refused():
    with pytest.raises(AsdmError, match="no students") as refused:
        line_up(RUNGS, WEIGHTS, 6, 0.29, 2)
    assert refused.value.exit_code == ExitCode.INFEASIBLE
    assert "0.3000x" in str(refused.value.hint)


@pytest.mark.slow
def test_assemble_writes_students_that_take_turns(unet, tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(making, "SHARES", (0.8, 0.4))  # each is searched for some seconds
    settings = PlanSettings(
        ProfileSettings(repeats=3), SamplingSettings(6, 4.0), "ddim", calibration_prompts=4, held_out_prompts=2,
        bands=3, effort=Effort(12, 1), slot="none", narrow=(), finest="unit", refit="scale",
    )  # fmt: skip
    budget = parse_budget([f"latency={BUDGET}x"])
    target = Target(tmp_path / "out", command="asdm-compress assemble")
    made = run_assemble_members("mini-sd", budget, target, LoadOptions(), settings, Silent(), 2)
    assert made is not None
    out = tmp_path / "out"
    content = json.loads((out / FILE_NAME).read_text(encoding="utf-8"))
    assert content["lineup"] == made.students.lineup.as_json()
    # Chosen for what was measured of them, no more than were allowed, of a ladder from the slowest on.
    assert 1 <= len(made.students.lineup.students) <= 2
    latencies = [entry["latency"] for entry in content["ladder"]]
    assert latencies == sorted(latencies, reverse=True)
    assert min(latencies) < BUDGET < max(latencies)
    assert all(entry["damage"] > 0 and len(entry["bands"]) == 3 for entry in content["ladder"])
    report = json.loads((out / "calibration.json").read_text(encoding="utf-8"))
    assert report["time"]["measured_share"] <= BUDGET * 1.01
    assert {"calibrated", "one student"} <= {entrant["role"] for entrant in report["entrants"]}
    # The folder is one model, whose members are those that take steps and are what their recipes make of the teacher.
    opened = load_pipeline(str(out), LoadOptions())
    taking = {action.member for action in opened.unet.schedule.actions if action.member}
    assert set(opened.unet.member_names) == set(report["models"]) == taking
    recipes = {path.stem: load_recipe(path) for path in (out / "members").iterdir()}
    assert set(recipes) == taking - {"teacher"}
    edits = {entry["name"]: entry["edits"] for entry in content["ladder"] if entry["name"]}
    assert all(recipe.as_edits() == edits[name] for name, recipe in recipes.items())
    for name, recipe in recipes.items():
        member = opened.unet if name == opened.unet.member_names[0] else opened.unet.member(name)
        expected = assemble(unet, Plan(recipe.as_edits()))
        own = {n: p.shape for n, p in member.named_parameters() if not n.startswith("others.")}
        assert own == {n: p.shape for n, p in expected.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = StableDiffusionPipeline.from_pretrained(out)
        plain.set_progress_bar_config(disable=True)
        image = plain("a small red circle", num_inference_steps=6, output_type="latent").images
    assert torch.isfinite(image).all()


@pytest.mark.parametrize(
    "asked",
    [
        ("--members", "2", "-b", "macs=0.5x"),
        ("--members", "2", "-b", "latency=0.5x,params=0.5x"),
        ("--members", "2", "-b", "latency=0.5x", "--inherit", "latency=0.5x"),
        ("--members", "0", "-b", "latency=0.5x"),
    ],
)
def test_what_makes_no_members_ends_with_two(cli, tmp_path, asked):
    result = cli("assemble", "mini-sd", *asked, "--out", "out")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert not (tmp_path / "out").exists()
