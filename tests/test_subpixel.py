"""The upsampler that convolves first."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.models.edits import edited_copy, legal_edits
from asdm_compress.models.subpixel import SubpixelUpsampler

UPSAMPLERS = ("up_blocks.0.upsamplers.0", "up_blocks.1.upsamplers.0", "up_blocks.2.upsamplers.0")


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 5),
    outputs=st.integers(1, 4),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    extra=st.tuples(st.integers(0, 1), st.integers(0, 1)) | st.none(),
    bias=st.booleans(),
)
def test_it_is_the_same_function(channels, outputs, height, width, extra, bias):
    torch.manual_seed(channels + 10 * outputs)
    stock = Upsample2D(channels, use_conv=True, out_channels=outputs, bias=bias).double()
    size = None if extra is None else (2 * height + extra[0], 2 * width + extra[1])
    images = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    expected, found = stock(images, size), SubpixelUpsampler(stock)(images, size)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = stock.conv.weight
    gradients = [torch.autograd.grad(out.square().sum(), (images, weight)) for out in (expected, found)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_a_unet_with_it_predicts_the_same(unet, inputs):
    assert all("subpixel" in legal_edits(unet)[path] for path in UPSAMPLERS)
    twin = edited_copy(unet, dict.fromkeys(UPSAMPLERS, "subpixel"))
    assert set(twin.state_dict()) == set(unet.state_dict())
    assert torch.allclose(twin(*inputs)[0], unet(*inputs)[0], atol=1e-5)


@torch.no_grad()
def test_kept_kernels_follow_the_weights():
    stock = Upsample2D(3, use_conv=True)
    ours, images = SubpixelUpsampler(stock), torch.randn(1, 3, 4, 4)
    ours(images)
    stock.conv.weight.mul_(2)
    stock.conv.bias.add_(1)
    assert torch.allclose(ours(images), stock(images), atol=1e-6)
    ours.bfloat16()
    assert ours(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_into_one_graph_and_runs_channels_last(dtype):
    stock = Upsample2D(4, use_conv=True).to(dtype).requires_grad_(False)
    images = torch.randn(1, 4, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    compiled = torch.compile(SubpixelUpsampler(stock), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images), stock(images), atol=1e-5 if dtype == torch.float32 else 0.05)
