"""The rivals of `bench_rivals.py`: every package that is installed does something, and nothing to the teacher."""

from __future__ import annotations

import json
import re

import pytest
import rival_packages
import torch

from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling.timing import Loop

STEPS = 4


@pytest.fixture(scope="module")
def sampling(pipeline):
    settings = SamplingSettings(STEPS, 3.0)
    texts = encode(pipeline, ["a small red circle"], settings.guidance)
    return texts, settings, Loop(pipeline, texts, settings)()


def one_of_each():
    return {s.rival: s for s in rival_packages.every_setting(STEPS, [0.6], quick=True)}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("setting", one_of_each().values(), ids=lambda setting: setting.rival)
def test_a_rival_changes_its_own_copy_alone_and_forgets_between_images(pipeline, sampling, setting):
    texts, settings, full = sampling
    loop = setting.loop(pipeline, texts, settings)
    first = loop()
    assert first.shape == full.shape
    assert not torch.equal(first, full)
    assert torch.equal(loop(), first)
    assert torch.equal(Loop(pipeline, texts, settings)(), full)


def test_taylor_seer_is_given_modules_that_there_are(pipeline):
    names = [name for name, _ in pipeline.unet.named_modules()]
    found = {part: {n for n in names if re.fullmatch(p, n)} for part, p in rival_packages.TAYLOR_PARTS.items()}
    assert found["transformers"] < found["ResNets and transformers"]
    inner = found["all but the outer blocks"]
    assert inner < found["ResNets and transformers"]
    assert not any(name.startswith(("down_blocks.0.", "up_blocks.3.")) for name in inner)
    assert any(name.startswith("mid_block.resnets") for name in inner)


def test_what_the_caches_of_diffusers_do_here_is_tried(pipeline, sampling):
    texts, settings, _ = sampling
    found = {row["cache"]: row for row in rival_packages.refusals(pipeline, texts, settings)}
    assert found["PyramidAttentionBroadcast"]["changes"]
    assert found["FirstBlockCache"]["error"]
    assert found["MagCache"]["hooks"] == 0
    json.dumps(list(found.values()))
