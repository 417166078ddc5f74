"""Models by name and by hub id: where they are found, what of a repository is fetched, and what is said otherwise."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.loading import load_pipeline, load_unet
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.models.resolve import resolve, wanted_files
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.workflows.card import Origin

OPTIONS = LoadOptions()


def in_hub_cache(cache: Path, repository: str) -> Path:
    """The folder of a repository's only snapshot in a hub cache, and the reference to it."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    return home / "snapshots" / "abc"


@pytest.mark.parametrize("name", ["sd15", "sd21", "sd21-base"])
def test_named_models_without_weights_say_how_to_get_them(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AsdmError) as caught:
        resolve(name, OPTIONS)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "--random-weights" in str(caught.value.hint)
    assert f"./{name}" not in str(caught.value.hint)
    assert resolve(name, LoadOptions(random_weights=True)).kind == "random weights"
    with pytest.raises(AsdmError, match="random weights are made for sd15"):
        resolve("mini-sd", LoadOptions(random_weights=True))
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # which the name goes before
    with pytest.raises(AsdmError) as caught:
        resolve(name, OPTIONS)
    assert f"write ./{name}" in str(caught.value.hint)


def test_a_named_model_is_taken_from_the_local_hub_cache(monkeypatch, tmp_path):
    cache = tmp_path / "hub"
    snapshot = cache / "models--stable-diffusion-v1-5--stable-diffusion-v1-5" / "snapshots" / "abc"
    shutil.copytree(MINI_SD_FOLDER, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert resolve("sd15", OPTIONS).path == snapshot


def test_a_hub_id_is_taken_from_the_local_hub_cache(monkeypatch, tmp_path, unet):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(MINI_SD_FOLDER, in_hub_cache(tmp_path, "someone/small"))
    found = load_pipeline("someone/small", OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(found.unet.parameters(), unet.parameters(), strict=True))
    # A UNet's own repository, of which another program has fetched the half-precision files alone.
    folder = in_hub_cache(tmp_path, "someone/unet")
    shutil.copytree(MINI_SD_FOLDER / "unet", folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    source = resolve("someone/unet", OPTIONS)
    assert (source.kind, source.path) == ("unet folder", folder)
    found = load_unet("someone/unet", OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), unet.parameters(), strict=True))
    with pytest.raises(AsdmError, match="neither a folder here nor a model that the hub gave") as caught:
        resolve("someone/else", OPTIONS)
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_of_a_repository_only_one_set_of_weights_is_fetched():
    weights = ("diffusion_pytorch_model", "safetensors", "bin")
    everything = [
        f"{part}/{stem}{variant}.{suffix}"
        for part, stem in (("unet", weights[0]), ("vae", weights[0]), ("text_encoder", "model"))
        for variant in ("", ".fp16", ".non_ema")
        for suffix in weights[1:]
    ]
    configs = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
               "unet/config.json"]  # fmt: skip
    others = ["README.md", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "v1-inference.yaml", "old/unet/config.json",
              "old/unet/diffusion_pytorch_model.safetensors", "text_encoder/flax_model.msgpack"]  # fmt: skip
    chosen = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    assert wanted_files([*everything, *configs, *others, "recipe.yaml"]) == sorted(
        [*configs, *chosen, "text_encoder/model.safetensors", "recipe.yaml"]  # which a training asks for
    )
    # Half precision where there is no other, pickles where there is nothing else, shards all of them.
    assert wanted_files(["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"]) == [
        "unet/diffusion_pytorch_model.fp16.safetensors"
    ]
    assert wanted_files(["vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"]) == [
        "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin"
    ]  # fmt: skip
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert wanted_files([*shards, index, "unet/diffusion_pytorch_model.bin"]) == [*shards, index]


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ("sd15", "sd15"),
        ("mini-sd", "mini-sd"),
        ("someone/small", "someone/small"),
        ("./models/mine", "mine"),
        ("./models/sd15", "./sd15"),
    ],
)
def test_a_recipe_calls_its_model_as_commands_open_it(given, called):
    assert Origin(Source(given, "pipeline folder", None)).reference == called


def test_a_teachers_hash_is_that_of_its_stored_weights_in_whatever_precision_it_ran(unet):
    stored = copy.deepcopy(unet).half()
    assert weights_hash(stored, in_fp32=True) == weights_hash(copy.deepcopy(stored).float())
    assert weights_hash(stored, in_fp32=True) != weights_hash(stored)
    stored.conv_in.weight.data[0, 0, 0, 0] += 1
    assert weights_hash(stored, in_fp32=True) != weights_hash(unet)
