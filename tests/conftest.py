"""The real, bundled pipeline and the real command line, for all tests; nothing here reaches a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.models.families import FAMILIES
from asdm_compress.models.loading import LoadOptions, load_pipeline
from asdm_compress.profiling.profile import Profile, ProfileSettings, profile

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline("mini-sd", LoadOptions())


@pytest.fixture(scope="session")
def unet(pipeline: StableDiffusionPipeline) -> UNet2DConditionModel:
    return pipeline.unet


@pytest.fixture(scope="session")
def mini_profile(unet: UNet2DConditionModel) -> Profile:
    return profile(unet, ProfileSettings(text_tokens=40, repeats=3), "mini-sd")


@pytest.fixture(scope="session")
def sd15_on_meta() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**FAMILIES["sd15"].unet_config)


@pytest.fixture(scope="session")
def inputs(unet: UNet2DConditionModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    return sample, torch.tensor([400, 20]), torch.randn(2, 40, unet.config["cross_attention_dim"], generator=generator)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `python -m asdm_compress` in `tmp_path`, with caches of its own."""

    def run(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "asdm_compress", *arguments],
            cwd=tmp_path,
            env={**os.environ, "ASDM_COMPRESS_CACHE": str(tmp_path / "cache"), "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
