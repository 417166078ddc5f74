"""Student folders where this package is not installed: the loader that they carry, and what diffusers makes of it."""

from __future__ import annotations

import ast
import json
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.loader_source import loader_source
from asdm_compress.models.loading import LoadOptions, load_pipeline
from asdm_compress.models.saving import save_pipeline
from asdm_compress.workflows.export import run_export
from asdm_compress.workflows.progress import Silent

# One edit of every kind that brings a class of its own along.
PLAN = Plan(
    {
        "down_blocks.0.resnets.0": "shared",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": "shared",
        "down_blocks.0.layers.1": "conv3x3*8@timestep",
        "down_blocks.1.attentions.0": "conv1x1*4@both",
        "down_blocks.1.resnets.1": "narrow0.5",
        "down_blocks.2.resnets.1": "separable3x3",
        "mid_block": "conv1x1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1": "drop",
        "up_blocks.2.upsamplers.0": "subpixel",
        "up_blocks.3.resnets.0": "shortcut",
    }
)
OUTSIDE = """
import sys, torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file
plain, portable, again, case = sys.argv[1:]
case = load_file(case)

def difference(unet):
    with torch.no_grad():
        found = unet(case["sample"], case["timestep"], case["text"], return_dict=False)[0]
    return (found - case["expected"]).abs().max().item()

unet = AutoModel.from_pretrained(plain + "/unet", trust_remote_code=True)
pipeline = DiffusionPipeline.from_pretrained(portable, trust_remote_code=True)
pipeline.save_pretrained(again)
twice = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 128, 128, 3)
try:
    DiffusionPipeline.from_pretrained(portable)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code of the folder ran without a word")
print("DIFFERENCES", difference(unet), difference(pipeline.unet), difference(twice.unet))
"""


@pytest.fixture(scope="module")
def student(unet):
    student = assemble(unet, PLAN)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in student.state_dict().items():
        if ".slot." in name and "router" not in name:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    return student


def test_a_student_opens_without_this_package(pipeline, student, inputs, cli, elsewhere, tmp_path):
    whole = StableDiffusionPipeline(**{**pipeline.components, "unet": student}, requires_safety_checker=False)
    save_pipeline(whole, tmp_path / "plain")
    result = cli("export", "plain", "--format", "portable", "--out", "portable", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tensors"] == len(student.state_dict())
    with torch.no_grad():
        expected = student(*inputs, return_dict=False)[0]
    case = tmp_path / "case.safetensors"
    save_file({"sample": inputs[0], "timestep": inputs[1], "text": inputs[2], "expected": expected}, case)
    folders = [str(tmp_path / name) for name in ("plain", "portable", "again")]
    result = elsewhere(OUTSIDE, *folders, str(case), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr
    assert "DIFFERENCES 0.0 0.0 0.0" in result.stdout
    ours = load_pipeline(str(tmp_path / "portable"), LoadOptions())
    assert isinstance(ours.unet, AssembledUNet2DConditionModel)
    with torch.no_grad():
        assert torch.equal(ours.unet(*inputs).sample, expected)
    with pytest.raises(AsdmError, match="a UNet alone"):
        run_export(folders[0] + "/unet", tmp_path / "other", "portable", LoadOptions(), 25, None, Silent())
    assert not (tmp_path / "other").exists()


def test_the_loader_needs_torch_and_diffusers_alone():
    tree = ast.parse(loader_source())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert outside == {"torch", "diffusers"}
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names))


def test_the_config_is_read_without_a_remark(student, tmp_path, capfd):
    student.save_pretrained(tmp_path)
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    again = AssembledUNet2DConditionModel.from_pretrained(tmp_path)
    assert "auto_map" not in again.config
    assert "auto_map" not in capfd.readouterr().err
