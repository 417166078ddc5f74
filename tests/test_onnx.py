"""ONNX files: what ONNX Runtime makes of a student, with torch as the oracle."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.onnx_file import ATOL, FILE_NAME, check_onnx, compare_with_torch
from asdm_compress.models.source import LoadOptions
from asdm_compress.workflows.export import run_export
from asdm_compress.workflows.progress import Silent

# Experts of every routing and form, and what else has code of its own.
PLAN = Plan(
    {
        "down_blocks.0.resnets.0": "shared",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": "shared",
        "down_blocks.1.resnets.0": "conv3x3*4@timestep",
        "mid_block": "conv1x1*2@both",
        "up_blocks.0.upsamplers.0": "subpixel",
        "up_blocks.1.resnets.0": "separable3x3*2@feature",
        "up_blocks.1.resnets.1": "narrow0.5",
        "up_blocks.1.attentions.0": "conv3x3*2@feature",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1": "drop",
    }
)


@pytest.fixture(scope="module")
def student() -> UNet2DConditionModel:
    torch.manual_seed(0)
    teacher = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=8, sample_size=16,
    ).eval()  # fmt: skip
    student = assemble(teacher, PLAN)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in student.state_dict().items():
        if ".slot." in name and "time_router" not in name:
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    return student


def test_a_student_becomes_a_file_that_onnx_runtime_computes_alike(cli, student, tmp_path):
    student.save_pretrained(tmp_path / "student")
    result = cli("export", "student", "--format", "onnx", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert 0 < json.loads(result.stdout)["difference"] <= ATOL
    folder = tmp_path / "model-onnx"
    assert {path.name for path in folder.iterdir()} == {FILE_NAME, "config.json"}
    session = onnxruntime.InferenceSession(folder / FILE_NAME)
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "sample": ["batch", 4, "height", "width"],
        "timestep": [1],
        "encoder_hidden_states": ["batch", "tokens", 32],
        "out_sample": ["batch", 4, "height", "width"],
    }
    generator = torch.Generator().manual_seed(7)
    for batch, height, width, tokens, timestep in ((1, 2, 2, 1, 999.0), (5, 10, 6, 12, 260.0)):
        case = {
            "sample": torch.randn(batch, 4, height, width, generator=generator),
            "timestep": torch.tensor([timestep]),
            "encoder_hidden_states": torch.randn(batch, tokens, 32, generator=generator),
        }
        [found] = session.run(None, {name: value.numpy() for name, value in case.items()})
        with torch.no_grad():
            wanted = student(**case).sample.numpy()
        assert np.abs(found - wanted).max() < ATOL
    # The comparison that the export itself made sees other weights, and a file that is none.
    other = UNet2DConditionModel.from_config(student.config).eval()
    with pytest.raises(AsdmError, match=r"differs from torch's by .* more than 0\.0001"):
        compare_with_torch(other, folder / FILE_NAME)
    (folder / FILE_NAME).write_bytes(b"garbage")
    with pytest.raises(AsdmError, match="does not run the exported UNet"):
        compare_with_torch(student, folder / FILE_NAME)


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    check_onnx()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(AsdmError, match="not installed: onnxruntime") as caught:
        check_onnx()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert "pip install 'asdm-compress[onnx]'" in str(caught.value.hint)


def test_half_precision_is_refused(tmp_path):
    options = LoadOptions(dtype=torch.float16)
    with pytest.raises(AsdmError, match="in fp32"):
        run_export("mini-sd", tmp_path / "out", "onnx", options, 25, None, Silent())
    assert not (tmp_path / "out").exists()
