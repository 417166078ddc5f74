"""Inpainting, depth and instruction checkpoints of both families, at small widths: opened, cut and drawn with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers import __dict__ as diffusers_names
from make_fixtures import FIXTURES, make, pack
from PIL import Image
from safetensors.torch import load_file, save_file

from asdm_compress.core.recipe import Base, dump_recipe, find_recipe, load_recipe
from asdm_compress.models.loading import load_pipeline, open_unet
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions

OWN = LoadOptions(dtype=None)
FP32 = LoadOptions()
PIPELINES = {
    "sd15-inpainting": "StableDiffusionInpaintPipeline",
    "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "sd2-inpainting": "StableDiffusionInpaintPipeline",
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
}
WIDTHS = {"sd15": 32, "sd21-base": 64}
PIXELS = 64

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is a (checkpoint|UNet) of", "ignore:it (is taken to predict|predicts)", "ignore:its depth estimator"
)


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def variant(request, tmp_path_factory) -> tuple[str, Path]:
    """A checkpoint as a folder, and beside it as a file such as the original code leaves."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    make(request.param, folder, torch.float16, WIDTHS[FIXTURES[request.param].family])
    file = folder.with_suffix(".safetensors")
    pack(folder, file)
    if request.param == "sd2-depth":  # which carries the network that makes its depth maps
        save_file({**load_file(file), "depth_model.model.pretrained.cls_token": torch.zeros(1, 1, 8)}, file)
    return request.param, folder


def test_a_file_opens_as_what_it_is_with_the_folders_numbers(variant):
    """What 2.x predicts is not asked for here: with these channels all published models predict the noise."""
    name, folder = variant
    file = folder.with_suffix(".safetensors")
    found, wanted = load_pipeline(str(file), OWN), load_pipeline(str(folder), OWN)
    assert type(found).__name__ == type(wanted).__name__ == PIPELINES[name]
    assert found.unet.config["in_channels"] == FIXTURES[name].channels
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(found, part).state_dict(), getattr(wanted, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    assert found.scheduler.config["prediction_type"] == "epsilon"
    said = resolve(str(file), OWN).notes
    assert any("depth estimator is left out" in note for note in said) == (name == "sd2-depth")


def test_a_student_is_of_the_same_kind_and_draws(variant, cli, tmp_path):
    name, folder = variant
    recipe = load_recipe(find_recipe("bk-sdm-base-v1"))
    any_width = recipe.model_copy(update={"base": Base(model="any", architecture={})})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(any_width))
    result = cli("apply", "recipe.yaml", str(folder.with_suffix(".safetensors")), "--out", "student")
    assert result.returncode == 0, result.stderr
    missing = {"depth_estimator": None, "feature_extractor": None} if name == "sd2-depth" else {}
    kind = diffusers_names[PIPELINES[name]]
    student = kind.from_pretrained(tmp_path / "student", dtype=torch.float32, **missing)
    assert isinstance(student.unet, UNet2DConditionModel)
    teacher = open_unet(resolve(str(folder), FP32), FP32)
    assert torch.equal(student.unet.conv_in.weight, teacher.conv_in.weight)
    assert torch.equal(student.unet.up_blocks[1].resnets[1].conv1.weight, teacher.up_blocks[1].resnets[2].conv1.weight)
    student.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (PIXELS, PIXELS), (200, 30, 30))
    asked = {"image": picture, "num_inference_steps": 2, "output_type": "np"}
    if "inpainting" in name:
        asked |= {"mask_image": Image.new("L", (PIXELS, PIXELS), 255), "height": PIXELS, "width": PIXELS}
    if name == "sd2-depth":
        asked |= {"depth_map": torch.linspace(0, 1, PIXELS**2 // 64).reshape(1, PIXELS // 8, -1)}
    images = student("a cat", **asked).images
    assert images.shape == (1, PIXELS, PIXELS, 3)
    assert torch.isfinite(torch.from_numpy(images)).all()
