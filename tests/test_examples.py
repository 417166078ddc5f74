"""The examples of the Python API in `tools/examples/`, which the guide shows as they stand, run on mini-sd."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from write_documents import TOP

import asdm_compress
from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.families import architecture
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.goals import Goal
from asdm_compress.workflows.calibrate import CalibrateSettings
from asdm_compress.workflows.evaluation_input import EvaluateSettings
from asdm_compress.workflows.plan import PlanSettings
from asdm_compress.workflows.training_run import DistillSettings

EXAMPLES = sorted((TOP / "tools" / "examples").glob("*.py"))


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", TOP / "tools" / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))


def test_measure(tmp_path, capsys):
    found = example("measure").main(tmp_path)
    assert found.fingerprint.model == "mini-sd"
    assert (tmp_path / "profile.json").is_file()
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_cut(tmp_path, capsys):
    image = example("cut").main(tmp_path, steps=2)
    assert image.size == (128, 128)
    assert "conv_in" in capsys.readouterr().out
    unet = AssembledUNet2DConditionModel.from_pretrained(tmp_path / "light" / "unet")
    assert unet.mid_block is None


@pytest.mark.slow
def test_budget(capsys):
    settings = PlanSettings(
        ProfileSettings(repeats=2), SamplingSettings(steps=2), calibration_prompts=2, held_out_prompts=1, bands=2,
        slot="none", narrow=(), refit="none", finest="unit", neighbours_seconds=0.0,
    )  # fmt: skip
    plan = example("budget").main(settings=settings)
    assert plan.edits
    printed = capsys.readouterr().out
    assert all(f"{site}: {edit}" in printed for site, edit in plan.edits.items())
    # What it cost was measured, and is within the budget but for what timings differ by.
    assert float(printed.split("x of the time")[0]) < 0.75


@pytest.mark.slow
def test_inherit(tmp_path):
    settings = CalibrateSettings(
        Goal(), SamplingSettings(4, 1.0), None, None, 2, 2, 2, repeats=2, corrections=False, curve=0
    )
    full, cached, scheduled = (np.asarray(image) for image in example("inherit").main(tmp_path, settings, 4, 1.0))
    assert full.shape == cached.shape == scheduled.shape == (128, 128, 3)
    assert not np.array_equal(full, cached)
    assert not np.array_equal(full, scheduled)
    assert (tmp_path / "inheritance.yaml").is_file()


@pytest.mark.slow
def test_train(tmp_path, capsys):
    teacher = asdm_compress.load_pipeline("mini-sd")
    example("cut").cut(teacher, {"mid_block": "drop"}).save_pretrained(tmp_path / "student")
    base = Base(model="mini-sd", architecture=architecture(teacher.unet))
    recipe = Recipe(asdm_recipe=1, base=base, edits=[EditEntry(site="mid_block", edit="drop")])
    (tmp_path / "student" / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    training = DistillSettings(changes={"data.size": 24, "steps": 2, "batch": 4, "probe_prompts": 2})
    evaluation = EvaluateSettings(changes={"images": 3, "steps": 2}, repeats=0)
    report = example("train").main(tmp_path / "student", tmp_path / "trained", training, evaluation)
    text = report.read_text(encoding="utf-8")
    assert "Distillation" in text
    assert "dB from the teacher's images" in capsys.readouterr().out
    assert (tmp_path / "trained" / "evaluation" / "eval.json").is_file()


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES} == {"measure", "cut", "budget", "inherit", "train"}
