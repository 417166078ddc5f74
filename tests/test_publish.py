"""`--push-to-hub` against a hub on this machine, over HTTP, and what comes back from there."""

from __future__ import annotations

import json

import hub_server
import pytest
import torch
from hub_server import Hub
from safetensors.torch import save_file

from asdm_compress.models.loading import load_unet
from asdm_compress.models.source import LoadOptions

RECIPE = """\
asdm_recipe: 1
base: {model: any, architecture: {}}
edits:
  - {site: mid_block, edit: drop}
  - {site: up_blocks.2.upsamplers.0, edit: subpixel}
"""
APPLY = ("apply", "recipe.yaml", "mini-sd", "--out", "student", "--push-to-hub", "me/student")
# As somebody does who has not got this package.
ELSEWHERE = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipeline = DiffusionPipeline.from_pretrained("me/student", trust_remote_code=True)
case = load_file(sys.argv[1])
with torch.no_grad():
    found = pipeline.unet(case["sample"], case["timestep"], case["text"], return_dict=False)[0]
print(type(pipeline.unet).__name__, (found - case["expected"]).abs().max().item())
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and an environment in which programs take it for the only one."""
    with hub_server.running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        yield hub


def test_what_the_hub_does_not_have_is_told_as_the_hub_tells_it(hub: Hub, cli):
    asked = cli("profile", "me/typo", "--repeats", "1")
    assert asked.returncode == 4
    assert "404" in asked.stderr
    assert "outgoing traffic" not in asked.stderr


def test_a_student_goes_to_the_hub_and_comes_back(hub: Hub, cli, elsewhere, tmp_path, inputs):
    sent = cli(*APPLY)
    assert sent.returncode == 0, sent.stderr
    assert f"Sent to {hub.address}/me/student/commit/" in sent.stdout
    repository, folder = hub.repositories["me/student"], tmp_path / "student"
    assert repository.private
    assert len(repository.commits) == 1
    here = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    # The index names the loader that the UNet's folder carries, everything else is as it is here.
    assert {path for path in here if here[path] != repository.files[path]} == {"model_index.json"}
    assert here.keys() == repository.files.keys()
    assert "unet/diffusion_pytorch_model.safetensors" in repository.large
    # A second time it is there already, and shards of another student, which would be opened before this one.
    shard = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    stale = {shard, "unet/diffusion_pytorch_model.safetensors.index.json"}
    others = {"images/kept.png", "loras/style.safetensors", "whole.safetensors", "unet/training_args.bin"}
    repository.files |= dict.fromkeys([*stale, *others], b"old")
    again = cli(*APPLY, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert hub.asked.count("POST /api/repos/create") == 1
    assert len(repository.commits) == 2
    assert repository.files.keys() == {*here, *others}

    unet = load_unet(str(folder), LoadOptions())
    with torch.no_grad():
        expected = unet(*inputs, return_dict=False)[0]
    case = {"sample": inputs[0], "timestep": inputs[1], "text": inputs[2], "expected": expected}
    save_file(case, tmp_path / "case.safetensors")
    opened = elsewhere(ELSEWHERE, str(tmp_path / "case.safetensors"))
    assert opened.returncode == 0, opened.stderr
    assert opened.stdout.split()[-2:] == ["AssembledUNet2DConditionModel", "0.0"]


def test_a_model_is_taken_from_the_hub_by_its_id(hub: Hub, cli, monkeypatch):
    """Only what a pipeline needs; a second time from the local cache, where there is no way to the hub."""
    assert cli(*APPLY).returncode == 0
    hub.repositories["me/student"].files["of-another-program.safetensors"] = b"not asked for"
    hub.asked.clear()
    profile = ("profile", "me/student", "--repeats", "1", "--json")
    taken = cli(*profile)
    assert taken.returncode == 0, taken.stderr
    fetched = {line.split("/resolve/")[1].partition("/")[2] for line in hub.asked if line.startswith("GET /me/")}
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert "of-another-program.safetensors" not in fetched
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = cli(*profile)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["parameters"] == json.loads(taken.stdout)["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("POST /api/repos/create", "403 Forbidden"),
        ("PUT /objects/", "Error while uploading"),
        ("POST .*/commit/main", "403 Forbidden"),
    ],
)
def test_a_hub_that_refuses_is_said_and_leaves_the_student_here(hub: Hub, cli, tmp_path, refused, words):
    hub.refused = refused
    result = cli(*APPLY)
    assert result.returncode == 4
    said = " ".join(result.stderr.split())
    assert "the hub did not take me/student: " in said
    assert words in said
    assert "what was written here is complete" in said
    assert "Traceback" not in said
    assert (tmp_path / "student" / "model_index.json").exists()
    assert not any(repository.files for repository in hub.repositories.values())


def test_a_token_that_is_none_is_said_before_anything_is_done(hub: Hub, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    result = cli(*APPLY)
    assert result.returncode == 4
    assert "the hub did not take me/student" in " ".join(result.stderr.split())
    assert hub.asked == ["GET /api/whoami-v2"]
    assert not (tmp_path / "student").exists()
