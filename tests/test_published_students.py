"""Students that others have published: folders without a recipe, beside which one is named."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.families import architecture
from asdm_compress.models.source import LoadOptions
from asdm_compress.workflows.student import open_student

EDITS = {"down_blocks.1.layers.1": "drop", "mid_block": "drop"}


def write_recipe(path, unet, edits):
    content = {
        "asdm_recipe": 1,
        "base": {"model": "mini-sd", "architecture": architecture(unet)},
        "edits": [{"site": site, "edit": edit} for site, edit in edits.items()],
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cli_in, unet):
    place = tmp_path_factory.mktemp("published")
    write_recipe(place / "theirs.yaml", unet, EDITS)
    made = cli_in(place, "apply", "theirs.yaml", "mini-sd", "--out", "own")
    assert made.returncode == 0, made.stderr
    shutil.copytree(place / "own", place / "published")
    (place / "published/recipe.yaml").unlink()
    return place


def test_a_published_student_is_one_by_the_recipe_that_is_named(folder, unet):
    student, recipe = str(folder / "published"), str(folder / "theirs.yaml")
    found = open_student(student, None, LoadOptions(), recipe)
    own = open_student(str(folder / "own"), None, LoadOptions())
    assert found.plan == own.plan
    assert found.hashes == own.hashes
    assert all(torch.equal(a, b) for a, b in zip(found.student.parameters(), own.student.parameters(), strict=True))
    with pytest.raises(AsdmError, match="is no student") as refused:
        open_student(student, None, LoadOptions())
    assert "--recipe" in str(refused.value.hint)
    with pytest.raises(AsdmError, match="of its own"):
        open_student(str(folder / "own"), None, LoadOptions(), recipe)
    write_recipe(folder / "other.yaml", unet, {"down_blocks.1.layers.0": "shortcut", "mid_block": "drop"})
    with pytest.raises(AsdmError):  # not what this student is
        open_student(student, None, LoadOptions(), str(folder / "other.yaml"))


def test_the_command_forecasts_its_training(folder, cli):
    told = cli(
        "distill", str(folder / "published"), "--recipe", str(folder / "theirs.yaml"), "--dry-run", "--data-size", "8",
        "--batch", "2", "--device", "cpu", "--threads", "1",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "items of data" in told.stdout
    unknown = cli("distill", str(folder / "published"), "--recipe", "bk-sdm-smal-v1", "--dry-run")
    assert (unknown.returncode, "Traceback" in unknown.stderr) == (2, False)
    assert "bk-sdm-small-v1" in " ".join(unknown.stderr.split())
