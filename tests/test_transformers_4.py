"""What is written of a pipeline's text parts, for versions of transformers before the one that writes it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from asdm_compress.models.saving import FileLayout, save_pipeline
from asdm_compress.models.transformers_4 import with_text_model


@pytest.mark.parametrize("shard_bytes", [2**30, 200_000])
def test_text_parts_are_written_as_transformers_4_reads_them_too(pipeline, tmp_path, shard_bytes):
    save_pipeline(pipeline, tmp_path, FileLayout(shard_bytes=shard_bytes))
    files = list((tmp_path / "text_encoder").glob("*.safetensors"))
    names = {name for file in files for name in load_file(file)}
    assert (len(files) > 1) == (shard_bytes < 2**30)
    assert names == {with_text_model(name) for name in pipeline.text_encoder.state_dict()}
    for index in (tmp_path / "text_encoder").glob("*.index.json"):
        assert set(json.loads(index.read_text())["weight_map"]) == names
    vocabulary = json.loads((tmp_path / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    assert vocabulary.items() <= pipeline.tokenizer.get_vocab().items()
    version, *merges = (tmp_path / "tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    assert version.startswith("#version") and len(merges) == len(set(merges))
    assert all("".join(pair.split(" ")) in vocabulary for pair in merges)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    ids = again.tokenizer(["a small red circle"], return_tensors="pt").input_ids
    assert torch.equal(ids, pipeline.tokenizer(["a small red circle"], return_tensors="pt").input_ids)
    assert torch.equal(again.text_encoder(ids)[0], pipeline.text_encoder(ids)[0])
