"""What an accelerator would meet, as far as it can be seen without one."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from asdm_compress.cli.options import load_options
from asdm_compress.core.edits import conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.models import edits
from asdm_compress.models.expert_conv import MultiExpertConv2d
from asdm_compress.sampling.images import decode


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_default_device_of_a_machine_with_an_accelerator_is_one_that_torch_takes(monkeypatch, device):
    # torch itself refuses to set a device without a number, on every build.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = load_options(device, "auto", None)
    assert options.device == torch.device("cuda")
    assert options.dtype == torch.float16
    with pytest.raises(AsdmError, match="cuda:1 is not available"):
        load_options("cuda:1", "auto", None)


def test_a_slot_takes_in_the_shortcut_of_a_unet_on_an_accelerator():
    """With tensors that have a device and no values; a slot is made on the host."""
    spec = conv_spec("conv3x3*2@timestep")
    with FakeTensorMode():
        slot, shortcut = MultiExpertConv2d(8, 16, spec), nn.Conv2d(8, 16, 1)
        for name, parameter in list(shortcut.named_parameters()):
            setattr(shortcut, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
        edits._take_in(slot, shortcut, 1.0)
        assert slot.bias.device.type == "cpu"


def test_a_vae_that_overflows_is_an_error_and_no_black_picture(pipeline):
    half = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    vae = type(pipeline.vae).from_config(pipeline.vae.config).eval()
    vae.load_state_dict(pipeline.vae.state_dict())
    half.vae = vae.to(torch.bfloat16)
    latents = torch.randn(2, 4, 16, 16, dtype=torch.bfloat16)
    assert len(decode(half, latents)) == 2
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(3e38)
    with pytest.raises(AsdmError, match="VAE overflows in bfloat16") as caught:
        decode(half, latents)
    assert "--dtype" in str(caught.value.hint)
