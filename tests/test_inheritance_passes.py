"""Programs: what is computed under every action, that it is the same numbers, and that nothing dead is."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, cut, elementary_actions, features_of, graph_for, inherit, skip
from asdm_compress.inheritance.graph import PREDICTION, graph_of
from asdm_compress.inheritance.passes import Given, run_program
from asdm_compress.inheritance.places import Feature, find_places, opened_for
from asdm_compress.inheritance.program import program_of
from asdm_compress.models.call import UNetCall


def small_unet(**changes) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes}).eval().requires_grad_(False)


SHAPES = {
    "one layer, three levels": {},
    "no mid block": {"mid_block_type": None},
    "two layers, linear projections": {"layers_per_block": 2, "use_linear_projection": True},
    "four levels, no attention at two": {
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}


@pytest.fixture(scope="module", params=[*SHAPES, "slots, no mid block"])
def any_unet(request) -> UNet2DConditionModel:
    if request.param in SHAPES:
        return small_unet(**SHAPES[request.param])
    edits = {
        "mid_block": "drop",
        "down_blocks.1.attentions.0": "conv1x1*4@timestep",
        "up_blocks.1.resnets.0": "conv3x3",
        "up_blocks.2.attentions.1": "drop",
        "up_blocks.1.upsamplers.0": "conv1x1",
    }
    student = assemble(small_unet(), Plan(edits))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in student.requires_grad_(False).named_parameters():
        if ".slot.weights" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return student


@pytest.fixture(scope="module")
def small_call() -> UNetCall:
    generator = torch.Generator().manual_seed(2)
    return UNetCall(
        torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(300), torch.randn(2, 5, 8, generator=generator)
    )


@torch.no_grad()
def plain(unet, call):
    return unet(**call.arguments(), return_dict=False)[0]


def everything(unet):
    places = find_places(unet)
    features = [f for place in places.values() for t in (place.outputs, place.branches or ()) for f in t]
    return graph_of(unet, opened_for(places.values())), list(dict.fromkeys(features))


@torch.no_grad()
def test_recording_everything_leaves_the_prediction_bit_identical(any_unet, small_call):
    graph, features = everything(any_unet)
    program = program_of(graph, (), features)
    assert set(program.recorded) == set(features)
    prediction, recorded = run_program(any_unet, program, small_call)
    assert torch.equal(prediction, plain(any_unet, small_call))
    assert recorded[features.index(Feature(PREDICTION))] is prediction


@torch.no_grad()
def test_every_action_with_its_true_values_gives_the_same_prediction_for_less(any_unet, small_call):
    """What a place would inherit from the same step is what it would compute: so nothing may change."""
    expected = plain(any_unet, small_call)
    graph, features = everything(any_unet)
    _, recorded = run_program(any_unet, program_of(graph, (), features), small_call)
    truth = dict(zip(features, recorded, strict=True))
    places = find_places(any_unet)
    actions = [a for a in elementary_actions(any_unet) if a.guidance is None]
    assert {places[e.place].level for a in actions for e in a.inherits} == {
        "block", "layer", "unit", "sub-unit", "cut", "step",
    }  # fmt: skip
    whole = macs(lambda: plain(any_unet, small_call))
    for action in actions:
        program = program_of(graph_for(any_unet, places, [action]), tuple(features_of(action, places)))
        given = Given([truth[f] for f in program.taken])
        prediction, _ = run_program(any_unet, program, small_call, given)
        assert torch.allclose(prediction, expected, atol=2e-5, rtol=1e-4), action.name
        if action == FULL or places[action.inherits[0].place].level in ("cut", "block", "step"):
            spent = macs(lambda p=program, g=given: run_program(any_unet, p, small_call, g))
            assert (spent < whole) == (action != FULL), action.name


def macs(function) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops() // 2


@torch.no_grad()
def test_what_is_dead_behind_a_cut_is_not_called(unet, inputs):
    """Cut 0 of a Stable Diffusion UNet leaves the first convolution and the last decoder layer."""
    call = UNetCall(inputs[0], inputs[1], inputs[2])
    places = find_places(unet)
    graph = graph_for(unet, places, [cut(0)])
    program = program_of(graph, tuple(features_of(cut(0), places)))
    assert [path for op in program.ops for path in op.priced] == [
        "conv_in", "up_blocks.3.resnets.2", "up_blocks.3.attentions.2", "conv_out",
    ]  # fmt: skip
    called = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in unet.named_modules()
        if "." in name
    ]
    given = Given([torch.zeros(2, unet.config["block_out_channels"][0], 16, 16)])
    run_program(unet, program, call, given)
    for handle in handles:
        handle.remove()
    assert {name.split(".")[0] for name in called} == {"time_embedding", "up_blocks"}
    assert all(name.startswith(("time", "up_blocks.3.resnets.2", "up_blocks.3.attentions.2")) for name in called)


def test_cuts_are_those_of_the_live_graph(unet, sd15_on_meta):
    for model, cuts in ((unet, 12), (sd15_on_meta, 12), (small_unet(), 6), (small_unet(layers_per_block=2), 9)):
        assert sum(place.level == "cut" for place in find_places(model).values()) == cuts
    # Without a mid block the deepest cut would save nothing, since the encoder's end is a skip connection too.
    names = [action.name for action in elementary_actions(small_unet(mid_block_type=None))]
    assert "cut.4:hold" in names
    assert "cut.5:hold" not in names


def test_a_skipped_step_computes_nothing(unet):
    places = find_places(unet)
    program = program_of(graph_for(unet, places, [skip()]), tuple(features_of(skip(), places)))
    assert not program.computes
    given = torch.ones(2, 4, 16, 16)
    call = UNetCall(given, 3, given)
    assert run_program(unet, program, call, Given([given]))[0] is given


def test_nested_places_take_only_what_matters(unet):
    places = find_places(unet)
    action = inherit(["up_blocks.1", "up_blocks.1.resnets.0"], "output")
    program = program_of(graph_for(unet, places, [action]), tuple(features_of(action, places)))
    assert [f.name for f in program.taken] == ["up_blocks.1.upsamplers.0"]


def test_places_that_are_not_there_are_named(unet):
    places = find_places(unet)
    with pytest.raises(AsdmError, match=r"no place 'cut\.12'"):
        features_of(cut(12), places)
    with pytest.raises(AsdmError, match=r"down_blocks\.0 has no residual branch"):
        features_of(inherit(["down_blocks.0"]), places)


@torch.no_grad()
def test_controlnet_adapter_masks_and_sizes_that_do_not_halve_evenly(small_call):
    unet = small_unet()
    graph, features = everything(unet)
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(2, 4, 20, 12, generator=generator)
    shapes = [
        r.shape
        for r in run_program(unet, graph_program(graph, unet), UNetCall(sample, 3, small_call.encoder_hidden_states))[1]
    ]
    skips = tuple(torch.randn(shape, generator=generator) for shape in shapes[:-1])
    middle = torch.randn(shapes[-1], generator=generator)
    extra = {"encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])}
    residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
    for more in (residuals, extra):
        call = UNetCall(sample, torch.tensor([3, 700]), small_call.encoder_hidden_states, **more)
        prediction, _ = run_program(unet, program_of(graph, (), features), call)
        assert torch.equal(prediction, plain(unet, call))


def graph_program(graph, unet):
    """Records the skip connections and the mid block's output."""
    values = [op.value for op in graph.ops if op.kind == "skip"] + ["middle"]
    return program_of(graph, (), [Feature(value) for value in values])
