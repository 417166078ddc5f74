"""`optimize --students`: students that are made first, take part, and leave their recipes."""

from __future__ import annotations

import json

import pytest

from asdm_compress.assembly.calibration import Effort
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import load_recipe
from asdm_compress.core.units import parse_budget
from asdm_compress.models.loading import LoadOptions, load_pipeline
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.goals import Goal
from asdm_compress.workflows import students as making
from asdm_compress.workflows.calibrate import CalibrateSettings
from asdm_compress.workflows.optimize import Make, run_optimize
from asdm_compress.workflows.plan import PlanSettings
from asdm_compress.workflows.progress import Silent

MAKE = Make(
    1,
    PlanSettings(
        ProfileSettings(repeats=2), bands=2, effort=Effort(6, 1), slot="none", narrow=(), finest="unit", refit="none",
    ),
)  # fmt: skip


def settings_for(prompts):
    return CalibrateSettings(
        Goal(limit=parse_budget(["latency=0.7x"])[0]), SamplingSettings(4, 4.0), "ddim", prompts, 1, 2, 2, repeats=2,
        command="asdm-compress optimize mini-sd --students 1",
    )  # fmt: skip


def test_students_are_made_take_part_and_leave_their_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(making, "SHARES", (0.7,))
    settings = settings_for(
        tuple(f"a small {colour} circle" for colour in ("red", "blue", "green", "yellow", "purple"))
    )
    found = run_optimize(["mini-sd"], tmp_path / "fast", LoadOptions(), settings, Silent(), make=MAKE)
    content = json.loads((tmp_path / "fast/optimize.json").read_text(encoding="utf-8"))
    made = [entry["name"] for entry in content["students"]["ladder"] if entry["name"]]
    assert found.students is not None
    assert sorted(made) == sorted(found.students.names.values())
    assert content["students"] == found.students.as_json()
    ladder = json.loads((tmp_path / "fast/members.json").read_text(encoding="utf-8"))
    assert (ladder["command"], ladder["ladder"]) == (settings.command, content["students"]["ladder"])
    alone = {entry["way"].rsplit(", ", 1)[-1] for entry in content["tried"] if entry["role"] == "a student alone"}
    assert alone <= {f"{name} alone" for name in made}  # those that the time leaves two steps, as timed here
    taking_part = {action for entry in content["tried"] for action in entry["actions"] or ()}
    assert all(any(name in action for action in taking_part) for name in made)
    recipes = {path.stem: load_recipe(path) for path in (tmp_path / "fast/members").iterdir()}
    edits = {entry["name"]: entry["edits"] for entry in content["students"]["ladder"]}
    assert {name: recipe.as_edits() for name, recipe in recipes.items()} == {name: edits[name] for name in made}
    fast = load_pipeline(str(tmp_path / "fast"), LoadOptions())
    # Of those that no step of what is written runs there are no weights.
    run = {action.member for c in (found.best, *found.frontier) for action in c.way.rule.actions if action.member}
    assert set(getattr(fast.unet, "member_names", ["mini-sd"])) == run
    assert fast("a small red circle", num_inference_steps=content["best"]["steps"]).images


def test_students_are_given_or_made(cli, tmp_path):
    result = cli("optimize", "mini-sd", "--members", "small", "--students", "1", "-b", "latency=0.5x", "--out", "out")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert "--students" in result.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(AsdmError, match="cannot be made"):
        run_optimize(["mini-sd"], tmp_path / "out", LoadOptions(), settings_for(None), Silent(), make=Make(0))
    assert not (tmp_path / "out").exists()
