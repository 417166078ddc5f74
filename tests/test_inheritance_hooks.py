"""What else people hang on a UNet: hooks that move weights, patches, copies of it, and compiled forms."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.models.attention import BasicTransformerBlock

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, conditional_only, cut, inherit
from asdm_compress.inheritance.attach import disable, enable, inheriting
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.timeline import timeline_of
from asdm_compress.inheritance.validity import mark_of, validity_of
from asdm_compress.models.tree import meta_copy, sharing_copy
from asdm_compress.sampling.schedulers import make_scheduler

RULE = "uniform:2,branch=1"
SUB_UNIT = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
OPENED = Schedule((FULL, inherit([SUB_UNIT], "branch"), FULL, cut(1, LINEAR)))


def latents(pipe, seed=3, steps=4, **more):
    generator = torch.Generator().manual_seed(seed)
    how = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent", **more}
    return pipe("a small red circle", generator=generator, **how).images


@pytest.fixture
def make(pipeline):
    """Pipelines, each on a UNet of its own unless one is given."""

    def new(unet=None):
        parts = {**pipeline.components, "unet": unet if unet is not None else copy.deepcopy(pipeline.unet)}
        parts["scheduler"] = make_scheduler("ddim", pipeline)
        found = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        found.set_progress_bar_config(disable=True)
        return found

    return new


@pytest.fixture(scope="module")
def expected(pipeline):
    """Of the rules on a UNet that carries nothing, and of none."""
    parts = {**pipeline.components, "scheduler": make_scheduler("ddim", pipeline)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    found = {"plain": latents(pipe)}
    for name, rule in (("rule", RULE), ("opened", OPENED)):
        with inheriting(pipe, rule):
            found[name] = latents(pipe)
    assert len({tuple(tensor.flatten()[:4].tolist()) for tensor in found.values()}) == 3
    return found


OFFLOADS = {
    "layer by layer": lambda unet: cpu_offload(unet, torch.device("cpu")),
    "as a whole": lambda unet: cpu_offload_with_hook(unet, torch.device("cpu")),
    "dispatched": lambda unet: dispatch_model(unet, {"": "cpu"}, force_hooks=True),
    "diffusers' leaves": lambda unet: apply_group_offloading(unet, torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("name", list(OFFLOADS))
@pytest.mark.parametrize("before", [True, False], ids=["hooks first", "hooks later"])
def test_hooks_that_move_weights_do_so_in_runs(make, expected, name, before):
    pipe = make()
    if before:
        OFFLOADS[name](pipe.unet)
    enable(pipe, RULE)
    if not before:
        OFFLOADS[name](pipe.unet)
    if name == "layer by layer":
        assert pipe.unet.conv_in.weight.device.type == "meta"
    assert torch.equal(latents(pipe), expected["rule"])
    enable(pipe, OPENED)
    assert torch.equal(latents(pipe), expected["opened"])
    disable(pipe)
    assert torch.equal(latents(pipe), expected["plain"])
    mark = mark_of(pipe.unet)
    assert mark.fits(mark_of(make().unet))
    assert mark.fits(replace(mark, weights=tuple(torch.tensor(mark.weights).bfloat16().tolist())))
    tuned = sorted(range(len(mark.weights)), key=lambda i: abs(mark.weights[i]))[len(mark.weights) // 2]
    moved = [w * (1.02 if i == tuned else 1) for i, w in enumerate(mark.weights)]
    assert not mark.fits(replace(mark, weights=tuple(moved)))
    if not name.startswith("diffusers"):
        remove_hook_from_module(pipe.unet, recurse=True)
        assert torch.equal(latents(pipe), expected["plain"])


def test_hooks_around_the_unet_run_once_per_call_and_may_go_before_or_after(make, expected):
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    pipe = make()
    add_hook_to_module(pipe.unet, Counting())
    enable(pipe, RULE)
    remove_hook_from_module(pipe.unet)
    add_hook_to_module(pipe.unet, Counting())
    assert torch.equal(latents(pipe), expected["rule"])
    assert len(calls) == 4
    disable(pipe)
    remove_hook_from_module(pipe.unet)
    assert pipe.unet.forward.__func__ is UNet2DConditionModel.forward
    assert torch.equal(latents(pipe), expected["plain"])


def doubled(module, inputs, output):
    return output


GUARDED = {
    "a torch hook on a block": (lambda unet: unet.up_blocks[1].register_forward_hook(doubled), "up_blocks.1 carries a"),
    "a torch hook on the mid block": (
        lambda unet: unet.mid_block.register_forward_pre_hook(lambda *_: None),
        "mid_block carries a hook",
    ),
    "accelerate's on a block": (
        lambda unet: add_hook_to_module(unet.down_blocks[1], ModelHook()),
        "down_blocks.1 carries ModelHook",
    ),
    "diffusers' blocks": (
        lambda unet: apply_group_offloading(unet, torch.device("cpu"), num_blocks_per_group=1),
        "group_offloading",
    ),
    "a transformer that is taken apart": (
        lambda unet: (
            unet.get_submodule(SUB_UNIT).register_forward_hook(doubled)
            and unet.get_submodule(SUB_UNIT.rpartition(".")[0]).register_forward_hook(doubled)
        ),
        "transformer_blocks.0 carries a hook",
    ),
    "a patched class": (
        lambda unet: setattr(unet.get_submodule(SUB_UNIT.rpartition(".")[0]), "__class__", patched()),
        "own forward",
    ),
}


def patched():
    class Merging(BasicTransformerBlock):
        pass

    return Merging


@pytest.mark.parametrize("name", list(GUARDED))
def test_what_a_run_would_leave_out_is_refused_and_plain_runs_are_not(make, name):
    pipe = make()
    change, says = GUARDED[name]
    with inheriting(pipe, OPENED):
        change(pipe.unet)
        with pytest.raises(AsdmError, match=says) as refused:
            latents(pipe)
        assert refused.value.hint
    with inheriting(pipe, "uniform:1"):
        assert torch.isfinite(latents(pipe)).all()


def test_a_hook_on_what_is_not_taken_apart_is_no_matter_and_one_that_is_gone_neither(make, expected):
    pipe = make()
    counted = []
    pipe.unet.get_submodule(SUB_UNIT).register_forward_hook(lambda *_: counted.append(1))
    with inheriting(pipe, RULE):
        assert torch.equal(latents(pipe), expected["rule"])
        assert len(counted) == 2  # the computed steps
        handle = pipe.unet.up_blocks[0].register_forward_hook(doubled)
        with pytest.raises(AsdmError):
            latents(pipe)
        handle.remove()
        assert torch.equal(latents(pipe), expected["rule"])


def test_a_unet_whose_forward_somebody_else_has_replaced_is_refused(make):
    pipe = make()
    stock = pipe.unet.forward

    def caching(*args, **kwargs):
        return stock(*args, **kwargs)

    pipe.unet.forward = caching
    with pytest.raises(AsdmError, match="caching"):
        enable(pipe, RULE)
    assert pipe.unet.forward is caching
    assert type(pipe) is StableDiffusionPipeline
    del pipe.unet.forward
    enable(pipe, RULE)
    disable(pipe)


def test_a_rule_is_there_again_behind_another_one_and_behind_one_that_fails(make):
    pipe = make()
    enable(pipe, RULE)
    wanted = latents(pipe)
    with inheriting(pipe, "uniform:1"):
        assert not torch.equal(latents(pipe), wanted)
    assert torch.equal(latents(pipe), wanted)
    with pytest.raises(AsdmError):
        enable(pipe, Schedule((FULL, cut(40))))
    with pytest.raises(AsdmError):
        enable(pipe, "nonsense:3")
    assert torch.equal(latents(pipe), wanted)
    # One that somebody makes of this one's class and parts is a pipeline like any other.
    twin = type(pipe)(**pipe.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    disable(pipe)
    assert torch.equal(latents(twin), latents(pipe))


def test_a_failed_enabling_leaves_nothing(make):
    pipe = make()
    with pytest.raises(AsdmError):
        enable(pipe, Schedule((FULL, cut(40))))
    assert "forward" not in pipe.unet.__dict__
    assert type(pipe) is StableDiffusionPipeline


COPIES = {
    "deepcopy": copy.deepcopy,
    "shared": sharing_copy,
    "pickle": lambda unet: pickle.loads(pickle.dumps(unet)),
    "saved": lambda unet: torch.load(saved(unet), weights_only=False),
    "assembled": lambda unet: assemble(unet, Plan({})),
}


def saved(unet):
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("name", list(COPIES))
def test_a_copy_of_an_enabled_unet_is_one_of_its_own(make, expected, name):
    pipe = make()
    with inheriting(pipe, RULE):
        twin = COPIES[name](pipe.unet)
        other = make(twin)
        assert torch.equal(latents(other), expected["plain"])
        weight = twin.conv_out.weight
        twin.conv_out.weight = torch.nn.Parameter(2 * weight.detach(), requires_grad=False)
        assert not torch.equal(latents(other), expected["plain"])
        with inheriting(other, RULE):
            assert not torch.equal(latents(other), expected["rule"])
        twin.conv_out.weight = weight
        with inheriting(other, RULE):
            assert torch.equal(latents(other), expected["rule"])
        assert torch.equal(latents(pipe), expected["rule"])
        assert torch.equal(latents(other), expected["plain"])


def test_a_copy_without_weights_and_a_student_of_an_enabled_unet(make, inputs):
    pipe = make()
    plan = Plan({"mid_block": "drop", "up_blocks.1.attentions.0": "drop"})
    with torch.no_grad():
        found = assemble(pipe.unet, plan)(*inputs).sample
        with inheriting(pipe, RULE):
            student = assemble(pipe.unet, plan)
            assert torch.equal(student(*inputs).sample, found)
            twin = meta_copy(pipe.unet)
            assert twin(*(tensor.to("meta") for tensor in inputs)).sample.device.type == "meta"
            latents(pipe)
        assert torch.equal(student(*inputs).sample, found)


def test_a_copied_pipeline_inherits_by_itself(make, expected):
    pipe = make()
    enable(pipe, RULE)
    twin = copy.deepcopy(pipe)
    disable(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.zero_()
    assert torch.equal(latents(twin), expected["rule"])
    disable(twin)
    assert torch.equal(latents(twin), expected["plain"])
    assert "forward" not in twin.unet.__dict__


def test_an_enabled_pipeline_is_saved_as_what_it_is_and_shares_its_parts(make, expected, tmp_path):
    pipe = make()
    with inheriting(pipe, RULE):
        pipe.save_pretrained(tmp_path)
        other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        assert type(other) is StableDiffusionImg2ImgPipeline
        assert other.unet is pipe.unet
        image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        inside = latents(other, image=image, strength=0.6)
        assert torch.equal(latents(pipe), expected["rule"])
    assert torch.equal(latents(other, image=image, strength=0.6), inside)
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is StableDiffusionPipeline
    assert torch.equal(latents(opened), expected["plain"])


def test_a_schedule_knows_its_model_in_offloaded_weights(make, expected):
    """What tells one model from another is read although the weights are elsewhere."""
    pipe = make()
    pipe.scheduler.set_timesteps(4)
    pipe._guidance_scale = 4.0
    made = validity_of(pipe, timeline_of(pipe.scheduler), torch.empty(2, 4, 16, 16), mark_of(pipe.unet))
    cpu_offload(pipe.unet, torch.device("cpu"))
    with inheriting(pipe, Schedule((FULL, cut(1, LINEAR), FULL, cut(1, LINEAR)), {}, made)):
        assert torch.equal(latents(pipe), expected["rule"])


class Counter:
    """A compiler that counts its graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return module


def compiled_around(unet, counter):
    return torch.compile(unet, fullgraph=True, backend=counter)


def compiled_in_place(unet, counter):
    unet.compile(fullgraph=True, backend=counter)
    return unet


@pytest.mark.parametrize(("compiled", "before"), [(compiled_around, True), (compiled_in_place, False)])
def test_a_compiled_unet_becomes_a_few_whole_graphs(make, unet, compiled, before):
    """One for each different pass; whole passes are the very graph of the pipeline that is not enabled."""
    torch._dynamo.reset()
    actions = (FULL, FULL, conditional_only(LINEAR, cut(1)), cut(1), FULL)
    pipe, theirs, ours = make(small(unet)), Counter(), Counter()
    plain = latents(pipe)
    with inheriting(pipe, Schedule(actions)):
        eager = latents(pipe, steps=len(actions))
    options = {"fullgraph": True, "backend": ours}
    if before:
        pipe.unet = compiled(pipe.unet, theirs)
        assert torch.equal(latents(pipe), plain)
        assert theirs.graphs == 1
    enable(pipe, Schedule(actions), options)
    if not before:
        pipe.unet = compiled(pipe.unet, theirs)
    kept = pipe.unet
    assert torch.equal(latents(pipe, steps=len(actions)), eager)
    # One that records, and the cut for one guidance branch and for both; whole passes are not compiled anew.
    assert ours.graphs == 3
    made = theirs.graphs
    assert made == 1 + before
    assert torch.equal(latents(pipe, steps=len(actions)), eager)
    assert (theirs.graphs, ours.graphs) == (made, 3)
    assert torch.equal(latents(make(kept)), plain)
    disable(pipe)
    assert torch.equal(latents(pipe), plain)
    assert ours.graphs == 3


def small(unet):
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=unet.config["cross_attention_dim"],
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return made.eval().requires_grad_(False)


def test_registries_of_diffusers_hooks_may_come_and_go(make, expected):
    pipe = make()
    enable(pipe, RULE)
    apply_group_offloading(pipe.unet, torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(latents(pipe), expected["rule"])
    for module in pipe.unet.modules():
        registry = HookRegistry.check_if_exists_or_initialize(module)
        for name in list(registry.hooks):
            registry.remove_hook(name, recurse=False)
    assert torch.equal(latents(pipe), expected["rule"])
    disable(pipe)
    assert torch.equal(latents(pipe), expected["plain"])
    assert pipe.unet.forward.__func__ is UNet2DConditionModel.forward
