"""Pipelines of Stable Diffusion's own sizes, with random weights: minutes each, only with `pytest -m slow`."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from bench_apply import largest_block, measured
from diffusers import UNet2DConditionModel
from make_fixtures import FIXTURES, make, pack, random_tensor

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import build, specify
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.models.streaming import reading

CASES = {
    "sd15": "bk-sdm-base-v1",
    "sd21-base": "bk-sdm-base-v2",
    "sd15-inpainting": "bk-sdm-tiny-v1",
    "sd2-inpainting": "bk-sdm-small-v2",
    "sd21": "shallow-1-1-1-2-v2",
    "sd2-depth": "bk-sdm-tiny-v2",
    "instruct-pix2pix": "bk-sdm-small-v1",
}


@pytest.fixture(scope="module", params=sorted(CASES))
def model(request, tmp_path_factory):
    """A pipeline folder in fp16, gone again after its tests."""
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param, folder / "model", torch.float16)
    yield request.param, folder
    shutil.rmtree(folder)


def applied(recipe, model, out, *more):
    """The peak of resident bytes while `apply` ran in a process of its own."""
    command = [sys.executable, "-m", "asdm_compress", "apply", recipe, str(model), "--out", str(out), *more]
    return measured(command)[1]


def check_weights(recipe, teacher, student):
    """Every tensor is the teacher's, by the recipe's map. Oracle: the fixture's numbers depend on names alone."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(teacher))
    spec = specify(unet, Plan(load_recipe(find_recipe(recipe)).as_edits()))
    shapes = build(spec.config, spec.edits).state_dict()
    with reading(student) as reader:
        assert set(reader.names()) == set(shapes)
        for key, tensor in shapes.items():
            expected = random_tensor(spec.weight_map[key], tuple(tensor.shape), torch.float16)
            assert torch.equal(reader.get(key), expected), key


@pytest.mark.slow
def test_apply_streams_within_its_memory_and_a_single_file_gives_the_same_student(model):
    name, folder = model
    recipe = CASES[name]
    peak = applied(recipe, folder / "model", folder / "student")
    student = sum(path.stat().st_size for path in (folder / "student").rglob("*") if path.is_file())
    most = 1.25 * student + largest_block(folder / "model" / "unet")
    assert peak <= most
    check_weights(recipe, folder / "model" / "unet", folder / "student" / "unet")
    pack(folder / "model", folder / "model.safetensors")
    (folder / "teacher").mkdir()
    shutil.copyfile(folder / "model" / "unet" / "config.json", folder / "teacher" / "config.json")
    shutil.rmtree(folder / "model")
    shards = ("--prediction-type", FIXTURES[name].prediction, "--max-shard-size", "500MB")
    assert applied(recipe, folder / "model.safetensors", folder / "again", *shards) <= most
    assert len(list((folder / "again" / "unet").glob("*.safetensors"))) > 1
    check_weights(recipe, folder / "teacher", folder / "again" / "unet")
    pipeline_parts = {path.name for path in (folder / "student").iterdir()}
    assert {"vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"} <= pipeline_parts
