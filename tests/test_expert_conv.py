"""Multi-expert convolutions: alone, in a student, and as their names say."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.edits import ConvSpec, conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.expert_conv import Moment, MultiExpertConv2d

SHAPES = [ConvSpec(1), ConvSpec(3), ConvSpec(3, separable=True), ConvSpec(3, rank=2)]
CPU = torch.device("cpu")


def random_layer(spec, inputs=6, outputs=4, seed=0):
    torch.manual_seed(seed)
    layer = MultiExpertConv2d(inputs, outputs, spec)
    for parameter in [*layer.weights, layer.bias]:
        torch.nn.init.normal_(parameter)
    return layer


def routed(shape, routing, experts=3, mixing="softmax"):
    return ConvSpec(shape.kernel, shape.separable, shape.rank, experts, routing, mixing)


def alone(layer, image, moment):
    """Oracle: one image, its experts mixed and convolved by hand."""
    share = layer.route(image, moment)[0].to(layer.bias)
    for i, (weight, groups) in enumerate(zip(layer.weights, layer.groups, strict=True)):
        kernel = sum(s * w for s, w in zip(share, weight, strict=True))
        image = F.conv2d(image, kernel, padding=kernel.shape[-1] // 2, groups=groups)
        if i == len(layer.groups) - 1:
            image = image + (share @ layer.bias)[None, :, None, None]
    return image


specs = st.builds(
    lambda kernel, factor, experts, routing, mixing, temperature: ConvSpec(
        kernel,
        separable=factor == "separable" and kernel == 3,
        rank=5 if factor == "rank" else None,
        experts=experts,
        routing="none" if experts == 1 else routing,
        mixing="softmax" if experts == 1 else mixing,
        temperature=1.0 if experts == 1 else temperature,
    ),
    st.sampled_from([1, 3]),
    st.sampled_from(["dense", "separable", "rank"]),
    st.integers(1, 9),
    st.sampled_from(["timestep", "feature", "both"]),
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from([1.0, 0.5, 30.0]),
)


@given(spec=specs)
def test_names_say_everything(spec):
    assert conv_spec(spec.name) == spec


@pytest.mark.parametrize(
    "name",
    [
        "conv",
        "conv2x2",
        "separable1x1",
        "conv3x3*8",
        "conv3x3*1@timestep",
        "conv3x3*8@none",
        "conv3x3-rank0",
        "Drop",
        3,
    ],
)
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(AsdmError):
        conv_spec(name)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("routing", ["timestep", "feature", "both"])
@pytest.mark.parametrize("mixing", ["softmax", "sigmoid"])
def test_every_image_gets_its_own_kernel(shape, routing, mixing):
    layer = random_layer(routed(shape, routing, mixing=mixing))
    images = torch.randn(5, 6, 7, 9)
    timesteps = torch.tensor([900.0, 660.0, 300.0, 667.0, 300.0])
    expected = torch.cat([alone(layer, images[i : i + 1], Moment(timesteps[i : i + 1])) for i in range(5)])
    assert torch.allclose(layer(images, Moment(timesteps)), expected, atol=1e-5)
    with torch.no_grad():
        moment = Moment.of(timesteps, 5, CPU)
        assert not moment.uniform
        assert torch.allclose(layer(images, moment), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@torch.no_grad()
def test_one_timestep_runs_as_one_plain_convolution(shape):
    """Far from the borders a single expert answers, near one a mixture; asked again, the kept kernels answer."""
    layer = random_layer(routed(shape, "timestep"))
    images = torch.randn(3, 6, 8, 8)
    for timestep in (950, 666.5, 500, 10):
        moment = Moment.of(torch.tensor(timestep), 3, CPU)
        assert moment.uniform
        expected = torch.cat([alone(layer, images[i : i + 1], moment) for i in range(3)])
        for _ in range(2):
            assert torch.allclose(layer(images, moment), expected, atol=1e-5)
    share = layer.route(None, Moment.of(10, 1, CPU))
    assert share.argmax() == 2
    assert share.max() > 1 - 1e-6


@torch.no_grad()
def test_kept_kernels_are_forgotten_when_weights_change():
    layer = random_layer(routed(ConvSpec(3), "timestep"))
    images, moment = torch.randn(1, 6, 8, 8), Moment.of(666.6, 1, CPU)
    before = layer(images, moment)
    layer.weights[0].mul_(2)
    layer.bias.mul_(2)
    assert torch.allclose(layer(images, moment), 2 * before, atol=1e-5)
    twin = copy.deepcopy(layer)
    twin.load_state_dict({k: v / 2 if k in ("weights.0", "bias") else v for k, v in layer.state_dict().items()})
    assert torch.allclose(twin(images, moment), before, atol=1e-5)


@torch.no_grad()
def test_kept_kernels_survive_no_conversion_and_no_other_mode():
    layer = random_layer(routed(ConvSpec(3), "timestep"))
    images, moment = torch.randn(1, 6, 8, 8), Moment.of(666.6, 1, CPU)
    before = layer(images, moment)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(images, moment).dtype == torch.bfloat16
    assert torch.equal(layer(images, moment), before)
    layer.eval()
    for parameter in layer.weights:
        parameter.data.mul_(2)  # as averages of weights are copied in, uncounted by torch
    layer.train().eval()
    assert not torch.allclose(layer(images, moment), before)
    with torch.inference_mode():
        born_there = random_layer(routed(ConvSpec(3), "timestep"))
        assert torch.equal(born_there(images, moment), before)


def test_a_new_layer_adds_nothing_and_a_missing_timestep_is_an_error():
    layer = MultiExpertConv2d(4, 4, routed(ConvSpec(3), "timestep"))
    assert layer(torch.randn(2, 4, 5, 5), Moment.of(5, 2, CPU)).abs().max() == 0
    with pytest.raises(AsdmError, match="timestep"):
        layer(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("routing", ["timestep", "feature", "both"])
def test_half_precision_channels_last_and_autocast(routing):
    layer = random_layer(routed(ConvSpec(3), routing))
    images, timesteps = torch.randn(2, 6, 8, 8), torch.tensor([900.0, 100.0])
    expected = layer(images, Moment(timesteps))
    with torch.autocast("cpu", torch.bfloat16):
        close = layer(images, Moment(timesteps))
    assert close.dtype == torch.bfloat16
    half = copy.deepcopy(layer).to(torch.bfloat16)
    found = half(images.bfloat16().to(memory_format=torch.channels_last), Moment(timesteps))
    for other in (close, found):
        assert (other.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("routing", ["timestep", "feature", "both"])
def test_every_parameter_learns(routing):
    layer = random_layer(routed(ConvSpec(3), routing))
    layer(torch.randn(2, 6, 8, 8), Moment(torch.tensor([667.0, 334.0]))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


SLOTS = {
    "down_blocks.0.resnets.1": "conv3x3*4@timestep",
    "down_blocks.1.resnets.0": "separable3x3*4@timestep",
    "down_blocks.1.attentions.1": "conv1x1*4@timestep",
    "down_blocks.0.downsamplers.0": "conv1x1*4@timestep",
    "mid_block": "conv3x3*4@timestep",
    "up_blocks.1.layers.0": "conv3x3*4@timestep",
    "up_blocks.1.upsamplers.0": "conv1x1*4@timestep",
    "up_blocks.3.resnets.2": "conv3x3-rank8*4@timestep",
}


def plain(edit):
    return edit.partition("*")[0]


@pytest.fixture(scope="module")
def twins(unet):
    """A routed student whose experts are all equal, and the same with single experts: one function, two ways to run."""
    routed_student, single = assemble(unet, Plan(SLOTS)), assemble(unet, Plan({k: plain(e) for k, e in SLOTS.items()}))
    generator = torch.Generator().manual_seed(1)
    state = single.state_dict()
    for key in state:
        if ".slot." in key:
            state[key].normal_(generator=generator).mul_(0.02)
    for key, value in routed_student.state_dict().items():
        if ".slot." in key and "router" not in key:
            value.copy_(state[key].expand_as(value))
    return routed_student, single


def both(twins, *args, **kwargs):
    with torch.no_grad():
        return [unet(*copy.deepcopy(args), **copy.deepcopy(kwargs), return_dict=False)[0] for unet in twins]


@pytest.mark.parametrize("step_by_step", [False, True])
def test_the_routed_pass_is_the_stock_one(twins, inputs, step_by_step):
    """Oracle: diffusers' own forward pass, also with everything that other networks and settings may add to it."""

    def both(twins, *args, **kwargs):
        # With gradient checkpointing the routed student takes its steps one by one.
        with torch.set_grad_enabled(step_by_step):
            return [
                unet(*copy.deepcopy(args), **copy.deepcopy(kwargs), return_dict=False)[0].detach() for unet in twins
            ]

    if step_by_step:
        twins[0].enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    first, second = both(twins, *inputs)
    assert torch.allclose(first, second, atol=1e-5)
    sizes = [(32, 16)] * 3 + [(32, 8)] + [(64, 8)] * 2 + [(64, 4)] + [(128, 4)] * 2 + [(128, 2)] * 3
    extras = {
        "controlnet": {
            "down_block_additional_residuals": tuple(noise(2, c, s, s) for c, s in sizes),
            "mid_block_additional_residual": noise(2, 128, 2, 2),
        },
        "adapter": {
            "down_intrablock_additional_residuals": [
                noise(2, c, s, s) for c, s in ((32, 16), (64, 8), (128, 4), (128, 2))
            ]
        },
        "masks": {"encoder_attention_mask": (noise(2, 40) > 0).float()},
        "odd size": {},
    }
    for name, extra in extras.items():
        args = (noise(2, 4, 18, 20), *inputs[1:]) if name == "odd size" else inputs
        one, other = both(twins, *args, **extra)
        assert torch.allclose(one, other, atol=1e-5), name
        assert name == "odd size" or not torch.allclose(one, first, atol=1e-3), name
    residuals = extras["controlnet"]
    too_few = {"down_block_additional_residuals": tuple(noise(2, 1, 1, 1) for _ in range(11))}
    with pytest.raises(AsdmError, match="11 residuals were given for 12"):
        twins[0](*inputs, **{**residuals, **too_few})
    with pytest.raises(AsdmError, match="both"):
        twins[0](*inputs, **{**residuals, "mid_block_additional_residual": None})
    for unet in twins:
        unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    one, other = both(twins, *inputs)
    for unet in twins:
        unet.disable_freeu()
    twins[0].disable_gradient_checkpointing()
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, first, atol=1e-3)


def test_a_routed_student_trains_with_gradient_checkpointing(twins, inputs):
    gradients = []
    for checkpointing in (False, True):
        student = copy.deepcopy(twins[0]).train().requires_grad_(True)
        if checkpointing:
            student.enable_gradient_checkpointing()
        student(*inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("timestep", [torch.tensor(300), torch.tensor([300, 700])], ids=["one", "two"])
def test_a_routed_student_compiles_whole(twins, inputs, timestep):
    """Tracing is what can fail; the code that a backend makes of the graph is the backend's."""
    torch._dynamo.reset()
    student = torch.compile(twins[0], fullgraph=True, backend="eager")
    with torch.no_grad():
        found = student(inputs[0], timestep, inputs[2], return_dict=False)[0]
        expected = twins[0](inputs[0], timestep, inputs[2], return_dict=False)[0]
    assert torch.allclose(found, expected, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(timestep=st.floats(0, 999))
def test_a_number_a_scalar_and_a_batch_are_the_same_moment(unet, timestep):
    student = assemble(unet, Plan({"mid_block.resnets.0": "conv1x1*4@timestep"}))
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 40, 96)
    with torch.no_grad():
        given_as = [timestep, torch.tensor(timestep), torch.full((2,), timestep)]
        outputs = [student(sample, t, text, return_dict=False)[0] for t in given_as]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-6)
