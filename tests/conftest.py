"""The real, bundled pipeline and the real command line, for all tests; nothing here reaches a network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers of many threads each slow one another down

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from switched import STEPS, make_students, schedule_of
from warm_start import WarmStart

from asdm_compress.assembly.store import weights_hash
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.profile import Profile, ProfileSettings, profile
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline("mini-sd", LoadOptions())


@pytest.fixture(scope="session")
def unet(pipeline: StableDiffusionPipeline) -> Iterator[UNet2DConditionModel]:
    before = weights_hash(pipeline.unet)
    yield pipeline.unet
    assert weights_hash(pipeline.unet) == before, "a test, or what it tested, has changed the teacher"


@pytest.fixture(scope="session")
def mini_profile(unet: UNet2DConditionModel) -> Profile:
    return profile(unet, ProfileSettings(text_tokens=40, repeats=3), "mini-sd")


@pytest.fixture(scope="session")
def students(unet: UNet2DConditionModel) -> dict[str, UNet2DConditionModel]:
    return make_students(unet)


@pytest.fixture(scope="session")
def members(unet: UNet2DConditionModel, students: dict[str, UNet2DConditionModel]) -> dict[str, UNet2DConditionModel]:
    return {"teacher": unet, **students}


@pytest.fixture(scope="session")
def switch(
    pipeline: StableDiffusionPipeline, members: dict[str, UNet2DConditionModel]
) -> Callable[..., SwitchedUNet2DConditionModel]:
    def make(order: str, steps: int = STEPS) -> SwitchedUNet2DConditionModel:
        return SwitchedUNet2DConditionModel.of(members, schedule_of(pipeline, order, steps=steps))

    return make


@pytest.fixture(scope="session")
def sd15_on_meta() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**FAMILIES["sd15"].unet_config)


@pytest.fixture(scope="session")
def inputs(unet: UNet2DConditionModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    return sample, torch.tensor([400, 20]), torch.randn(2, 40, unet.config["cross_attention_dim"], generator=generator)


@pytest.fixture(scope="session")
def warm_start() -> Iterator[WarmStart | None]:
    """None where processes cannot be forked as on Linux."""
    started = WarmStart() if sys.platform == "linux" else None
    yield started
    if started is not None:
        started.close()


@pytest.fixture(scope="session")
def cli_in(warm_start: WarmStart | None) -> Cli:
    """Run `asdm_compress` in a folder, in a process of its own (see `warm_start.py`) with caches of its own."""

    def run(folder: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        if warm_start is not None and warm_start.suits():
            return warm_start.run(arguments, folder, _own(folder), timeout)
        return _run_anew(folder, *arguments, timeout=timeout)

    return run


def _own(folder: Path) -> dict[str, str]:
    """The environment of a command that runs in a folder."""
    return {**os.environ, "ASDM_COMPRESS_CACHE": str(folder / "cache"), "NO_COLOR": "1"}


def _run_anew(folder: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asdm_compress", *arguments], cwd=folder, env=_own(folder), capture_output=True,
        text=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture
def cli(tmp_path: Path, cli_in: Cli) -> Cli:
    """The same in `tmp_path`."""
    return partial(cli_in, tmp_path)


@pytest.fixture
def cli_anew(tmp_path: Path) -> Cli:
    """The same by `python -m asdm_compress`, started anew."""
    return partial(_run_anew, tmp_path)


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in an environment of its own that has every installed package but this one."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    (folder / "packages").mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "asdm_compress" not in installed.name and installed.suffix != ".pth":
            (folder / "packages" / installed.name).symlink_to(installed)
    lacks = "import importlib.util\nassert importlib.util.find_spec('asdm_compress') is None\n"

    def run(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **more, "PYTHONPATH": str(folder / "packages")}
        return subprocess.run(
            [str(python), "-c", lacks + script, *arguments], cwd=folder, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def reloaded_difference(pipeline, inputs, tmp_path) -> Callable[..., str]:
    """Save a pipeline with the given UNet, open and run it in a fresh process, and print how far its output is off."""
    script = """
import sys, torch
if sys.argv[3] == "with the package":
    import asdm_compress
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
case = load_file(sys.argv[2])
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
with torch.no_grad():
    found = pipeline.unet(case["sample"], case["timestep"], case["text"], return_dict=False)[0]
assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 128, 128, 3)
print("DIFFERENCE", (found - case["expected"]).abs().max().item())
"""

    def save_and_compare(student: UNet2DConditionModel, folder: Path, with_package: bool = True) -> str:
        whole = StableDiffusionPipeline(**{**pipeline.components, "unet": student}, requires_safety_checker=False)
        save_pipeline(whole, folder)
        with torch.no_grad():
            expected = student(*inputs, return_dict=False)[0]
        case = tmp_path / "case.safetensors"
        save_file({"sample": inputs[0], "timestep": inputs[1], "text": inputs[2], "expected": expected}, case)
        how = "with the package" if with_package else "without"
        result = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(case), how], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return save_and_compare


@pytest.fixture(scope="module")
def tiny():
    """A teacher of Stable Diffusion's shape with few channels, random but the same every time."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 32, 32),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    return unet.eval().requires_grad_(False)
