"""Folders as they lie on users' disks: parts that were never fetched, links that lead nowhere, and strangers' files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.families import architecture
from asdm_compress.models.loading import load_pipeline, load_unet
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.models.source import LoadOptions

DROP = """asdm_recipe: 1
base: {{model: mini-sd, architecture: {architecture}}}
edits: [{{site: mid_block, edit: drop}}]
"""


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(MINI_SD_FOLDER, tmp_path / "model")
    return tmp_path / "model"


def with_safety_checker(copy):
    """A folder as it is in the cache of whoever opens the model without its safety checker."""
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


def test_a_safety_checker_that_was_never_fetched_is_done_without(copy, cli, tmp_path):
    folder = with_safety_checker(copy)
    assert load_pipeline(str(folder), LoadOptions()).safety_checker is None
    result = cli("apply", "mini-sd-latency-0.7x", str(folder), "--slot-start", "zero", "--out", "fitted")
    assert result.returncode == 0, result.stderr
    facts = architecture(load_unet(str(folder), LoadOptions()))
    (tmp_path / "drop.yaml").write_text(DROP.format(architecture=json.dumps(facts)))
    result = cli("apply", "drop.yaml", str(folder), "--out", "student")
    assert result.returncode == 0, result.stderr
    index = json.loads((tmp_path / "student/model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "student").safety_checker is None
    shutil.rmtree(folder / "tokenizer")
    for name in ("apply", "generate"):
        given = ["drop.yaml", str(folder)] if name == "apply" else [str(folder), "a ring"]
        refused = cli(name, *given, "--out", "none")
        assert refused.returncode == 2
        assert "has no tokenizer" in " ".join(refused.stderr.split())
    assert not (tmp_path / "none").exists()


def test_what_else_lies_in_a_folder_is_not_looked_at(copy, unet):
    (copy / "checkpoint-10").mkdir()
    (copy / "checkpoint-10/optimizer.bin").write_bytes(b"no weights")
    (copy / "v1-5-pruned.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (copy / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    opened = load_pipeline(str(copy), LoadOptions()).unet
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), unet.parameters(), strict=True))


def test_a_link_that_leads_nowhere_is_named(copy):
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(copy / "blobs/nothing")
    with pytest.raises(AsdmError, match=r"diffusion_pytorch_model.safetensors cannot be read: No such file"):
        load_pipeline(str(copy), LoadOptions())
