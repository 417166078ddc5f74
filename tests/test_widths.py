"""Narrowed modules: the structure, checked against torch-pruning's dependency graph, and the closed-form start."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from diffusers.models.attention import FeedForward
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly.calibration import record
from asdm_compress.assembly.damage import measure_plan
from asdm_compress.assembly.narrowing import InnerSums, collecting, narrowed_state
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.surgery import assemble, specify
from asdm_compress.core.edits import kept_share, narrow, parse_shares
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.edits import edited_copy
from asdm_compress.models.walk import finish, start, steps_of
from asdm_compress.models.widths import inner_of, inner_widths, narrowed
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions

RESNET = "down_blocks.1.resnets.0"
BLOCK = "up_blocks.2.attentions.1.transformer_blocks.0"
KINDS = (RESNET, f"{BLOCK}.ff", f"{BLOCK}.attn1", f"{BLOCK}.attn2")


@pytest.fixture(scope="module")
def calibration(pipeline):
    prompts = [caption.text for caption in sample_captions(24, 77)]
    return record(pipeline, prompts, SamplingSettings(8, 3.0), bands=4)


def run_module(module, path):
    """The output of a module of a kind on fixed random inputs of its own width."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        if ".resnets." in path:
            return module(noise(2, module.in_channels, 8, 8), noise(2, module.time_emb_proj.in_features))
        if path.endswith("ff"):
            return module(noise(2, 9, module.net[0].proj.in_features))
        text = noise(2, 5, module.to_k.in_features) if path.endswith("attn2") else None
        return module(noise(2, 9, module.to_q.in_features), encoder_hidden_states=text)


@pytest.mark.parametrize("path", KINDS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_what_stays_computes_what_it_did(unet, path, data):
    module = unet.get_submodule(path)
    inner = inner_of(module)
    numbers = data.draw(st.sets(st.integers(0, inner.count - 1), min_size=1, max_size=inner.count))
    keep = torch.tensor(sorted(numbers))
    silenced = copy.deepcopy(module)
    gone = torch.ones(inner.count * inner.size, dtype=torch.bool)
    gone[inner.channels(keep)] = False
    with torch.no_grad():
        silenced.get_submodule(inner.projection).weight[:, gone] = 0
    before = copy.deepcopy(module.state_dict())
    found = narrowed(module, inner, keep)
    assert torch.allclose(run_module(found, path), run_module(silenced, path), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert inner_of(found).count == len(keep)
    assert inner_of(found).size == inner.size


def test_a_resnet_is_cut_where_torch_pruning_cuts_it(unet):
    module = unet.get_submodule(RESNET)
    inner = inner_of(module)
    keep = torch.tensor([0, 2, 3, 5])
    gone = sorted(set(range(inner.count * inner.size)) - set(inner.channels(keep).tolist()))
    theirs = copy.deepcopy(module).requires_grad_(True)
    example = (torch.randn(1, module.in_channels, 8, 8), torch.randn(1, module.time_emb_proj.in_features))
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=example)
    graph.get_pruning_group(theirs.conv1, tp.prune_conv_out_channels, idxs=gone).prune()
    theirs.norm2.num_groups = len(keep)  # the attribute that pruning leaves stale
    ours = narrowed(module, inner, keep)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert torch.allclose(run_module(ours, RESNET), run_module(theirs, RESNET), atol=1e-5)


def test_a_feed_forward_is_cut_where_torch_pruning_cuts_it(unet):
    path = f"{BLOCK}.ff"
    module = unet.get_submodule(path)
    inner = inner_of(module)
    keep = torch.arange(0, inner.count, 2)
    gone = sorted(set(range(inner.count)) - set(keep.tolist()))
    theirs = copy.deepcopy(module).requires_grad_(True)
    example = (torch.randn(1, 9, module.net[0].proj.in_features),)
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=example)
    graph.get_pruning_group(theirs.net[2], tp.prune_linear_in_channels, idxs=gone).prune()
    ours = narrowed(module, inner, keep)
    assert ours.net[0].proj.weight.shape == theirs.net[0].proj.weight.shape
    assert torch.allclose(run_module(ours, path), run_module(theirs, path), atol=1e-5)


def test_twin_channels_are_merged_without_a_loss(calibration):
    torch.manual_seed(0)
    module = FeedForward(12, mult=4).eval().requires_grad_(False)
    half = inner_of(module).count // 2
    weight, bias = module.net[0].proj.weight, module.net[0].proj.bias
    for part in (0, 2 * half):  # values and gates
        weight[part + half : part + 2 * half] = weight[part : part + half]
        bias[part + half : part + 2 * half] = bias[part : part + half]
    inputs = torch.randn(2 * len(calibration), 7, 12)
    sums = InnerSums.empty(inner_of(module), torch.device("cpu"))
    with collecting(torch.nn.ModuleDict({"ff": module}), {"ff": sums}, calibration, 0):
        expected = module(inputs)
    state = narrowed_state(module, 0.5, sums)
    twin = narrowed(module, inner_of(module), torch.arange(half))
    twin.load_state_dict(state, strict=False)
    assert (twin(inputs) - expected).square().mean() < 1e-5 * expected.square().mean()


@pytest.mark.parametrize("path", [RESNET, f"{BLOCK}.ff", f"{BLOCK}.attn1"])
def test_a_fitted_narrowing_beats_the_largest_weights_on_other_prompts(unet, calibration, path):
    plan = Plan({path: "narrow0.5"})
    fitting, measuring = calibration.parts()
    largest = measure_plan(unet, plan, measuring).total
    assert measure_plan(unet, plan, measuring, fit_plan(unet, plan, fitting)).total < 0.9 * largest


def test_a_plan_mixes_narrowing_with_everything_else(unet, inputs, calibration, tmp_path, reloaded_difference):
    plan = Plan({
        f"{BLOCK}.ff": "narrow0.5",
        f"{BLOCK}.attn1": "narrow0.5",
        f"{BLOCK}.attn2": "drop",
        "up_blocks.2.resnets.2": "narrow0.25",
        "up_blocks.1.upsamplers.0": "subpixel",
        "mid_block.attentions.0": "conv1x1*4@timestep",
        "down_blocks.1.layers.1": "drop",
    })  # fmt: skip
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    weights = fit_plan(unet, plan, calibration)
    measure_plan(unet, plan, calibration, weights)
    student = assemble(unet, plan, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    with torch.no_grad():
        twin = edited(unet, plan, weights)
        expected = finish(steps_of(twin), start(twin, *inputs))
        assert torch.equal(student(*inputs, return_dict=False)[0], expected)
    assert {path for path, _ in specify(unet, plan).slot_map.values()} == set(weights)
    attention = student.get_submodule(f"{BLOCK}.attn1")
    assert (attention.heads, attention.inner_dim) == (1, attention.to_q.out_features)
    resnet = student.get_submodule("up_blocks.2.resnets.2")
    assert (resnet.norm2.num_groups, resnet.norm2.num_channels) == (2, resnet.conv2.in_channels)
    assert "DIFFERENCE 0.0" in reloaded_difference(student, tmp_path / "student")


def test_widths_of_real_families_are_ones_that_hardware_likes(sd15_on_meta):
    widths = inner_widths(sd15_on_meta)
    assert len(widths) == 22 + 3 * 16
    twin = edited_copy(sd15_on_meta, dict.fromkeys(widths, "narrow0.5"))
    for path, inner in widths.items():
        narrower = inner_of(twin.get_submodule(path))
        assert narrower.count * narrower.size * 2 == inner.count * inner.size
        assert narrower.count * narrower.size % 16 == 0


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"down_blocks.0.layers.0": "narrow0.5"}, "cannot be narrowed"),
        ({"mid_block": "narrow0.5"}, "not possible"),
        ({"down_blocks.0.downsamplers.0": "narrow0.5"}, "not possible"),
        ({f"{BLOCK}.attn1": "narrow0.9"}, "not possible"),
        ({RESNET: "subpixel"}, "not possible"),
        ({RESNET: "narrow1.0"}, "unknown edit"),
        ({RESNET: "narrow0.0"}, "unknown edit"),
    ],
)
def test_impossible_narrowings_are_named(unet, plan, words):
    with pytest.raises(AsdmError, match=words):
        edited(unet, Plan(plan))


def test_shares_are_read_and_refused():
    assert parse_shares("0.75, 0.5,0.5") == (0.75, 0.5)
    assert parse_shares("none") == ()
    assert [kept_share(narrow(share)) for share in (0.75, 0.125)] == [0.75, 0.125]
    for text in ("", "1", "0", "half", "0.5;0.25", "-0.5"):
        with pytest.raises(AsdmError, match="share"):
            parse_shares(text)
