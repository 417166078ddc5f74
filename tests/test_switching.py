"""Multi-UNet switching: which member does which step, what members share held once, and one model in all else."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from asdm_compress.assembly.lora import remap_lora
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, Action, cut, skip
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.carrying import CarriedOver
from asdm_compress.inheritance.forecast import HOLD, LINEAR
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule, save_schedule
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.loader_source import loader_source
from asdm_compress.models.loading import LoadOptions, load_pipeline
from asdm_compress.models.saving import save_pipeline
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.switching.orders import parse_order
from asdm_compress.switching.places import is_run
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.sharing import as_prefixes, of_prefixes
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel

STEPS = 4
# One edit of every kind of sharing: layers gone, narrowed, replaced, the same weights in a layer of another class.
SMALL = {
    "mid_block": "drop",
    "down_blocks.2.layers.1": "conv1x1*2@timestep",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff": "narrow0.5",
    "up_blocks.1.resnets.1": "narrow0.5",
    "up_blocks.2.upsamplers.0": "subpixel",
}
TINY = {"levels.3": "drop", "up_blocks.2.layers.1": "drop"}  # the decoder is numbered anew


@pytest.fixture(scope="module")
def students(unet):
    small, tiny = assemble(unet, Plan(SMALL)), assemble(unet, Plan(TINY))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in small.state_dict().items():
        if ".slot." in name and "router" not in name:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    # What was solved anew, with a bias that stayed, and an attention whose query was trained.
    for student, name in ((small, "up_blocks.3.resnets.2.conv2"), (tiny, "up_blocks.1.attentions.0.proj_out")):
        student.get_submodule(name).weight.mul_(1.01)
    small.get_submodule("up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q").weight.mul_(0.99)
    return {"small": small, "tiny": tiny}


@pytest.fixture(scope="module")
def members(unet, students):
    return {"teacher": unet, **students}


def schedule_of(pipeline, order, names=("tiny", "small", "teacher"), steps=STEPS):
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    actions = parse_order(order, names, steps) if isinstance(order, str) else order
    return SwitchingSchedule(actions, tuple(scheduler.timesteps.tolist()), noise_of(scheduler))


@pytest.fixture(scope="module")
def switch(pipeline, members):
    def make(order, steps=STEPS):
        return SwitchedUNet2DConditionModel.of(members, schedule_of(pipeline, order, steps=steps))

    return make


def pipe_of(pipeline, unet, kind=StableDiffusionPipeline, **more):
    parts = {**pipeline.components, "unet": unet, "scheduler": copy.deepcopy(pipeline.scheduler), **more}
    made = kind(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe, seed=3, prompt="a small red circle", **more):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images


def switched_by_hand(pipeline, members, names, prompt="a small red circle", **more):
    """The reference: a pipeline whose UNet is exchanged between its steps."""
    pipe = pipe_of(pipeline, members[names[0]])

    def exchange(pipe, step, *_):
        if step + 1 < len(names):
            pipe.unet = members[names[step + 1]]
        return {}

    return call(pipe, prompt=prompt, callback_on_step_end=exchange, **more)


def held(*modules):
    """Bytes of all the different storages of some modules' tensors."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def own_bytes(unet, students):
    """Bytes of the students' tensors whose content no tensor of the teacher has at all."""
    known = {(tuple(t.shape), t.numpy().tobytes()) for t in unet.state_dict().values()}
    tensors = [t for student in students.values() for t in student.state_dict().values()]
    return sum(t.nbytes for t in tensors if (tuple(t.shape), t.numpy().tobytes()) not in known)


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("small-first:0", ["teacher"] * 4),
        ("small-first:4", ["tiny"] * 4),
        ("small-first:1/2", ["tiny", "small", "small", "teacher"]),
        ("large-first:2", ["teacher", "teacher", "tiny", "tiny"]),
        ("interleaved:3", ["teacher", "tiny", "tiny", "teacher"]),
        ("explicit:small/teacher*2/tiny", ["small", "teacher", "teacher", "tiny"]),
    ],
)
def test_every_step_is_its_members_own_to_the_last_bit(pipeline, members, switch, order, names):
    pipe = pipe_of(pipeline, switch(order))
    expected = switched_by_hand(pipeline, members, names)
    assert torch.equal(call(pipe), expected)
    assert torch.equal(call(pipe), expected), "a second run is another one"
    if len(set(names)) == 1:
        assert torch.equal(call(pipe_of(pipeline, members[names[0]])), expected)


def test_members_hold_what_they_share_once(unet, students, switch):
    expected = held(unet) + own_bytes(unet, students)
    assert held(unet) < expected < 0.75 * held(unet, *students.values())
    switched = switch("small-first:2")
    assert held(switched) == expected
    assert held(unet, switched) == expected, "the teacher's own tensors were copied"
    twin = copy.deepcopy(switched)
    assert held(twin) == expected
    assert held(twin.to(torch.float64)) == 2 * expected
    assert held(twin.to(torch.bfloat16)) == expected // 2
    assert held(twin.to(memory_format=torch.channels_last)) == expected // 2
    assert sum(t.nbytes for t in switched.state_dict().values()) == expected


def test_a_moved_model_still_runs_as_its_members_do(pipeline, members, switch):
    twin = copy.deepcopy(switch("small-first:1/2")).to(torch.float64)
    exact = {name: copy.deepcopy(member).to(torch.float64) for name, member in members.items()}
    whole = {**pipeline.components, "text_encoder": copy.deepcopy(pipeline.text_encoder).to(torch.float64)}
    names = ["tiny", "small", "small", "teacher"]
    pipe = StableDiffusionPipeline(**whole, requires_safety_checker=False)
    found = call(pipe_of(pipe, twin))
    assert found.dtype == torch.float64
    assert torch.equal(found, switched_by_hand(pipe, exact, names))


def test_saved_loaded_and_run_in_a_fresh_process_it_is_the_same(
    unet, students, switch, reloaded_difference, tmp_path, inputs
):
    # The two rows of the inputs have timesteps of different members.
    switched = switch("small-first:2")
    assert "DIFFERENCE 0.0" in reloaded_difference(switched, tmp_path / "switched")
    expected = held(unet) + own_bytes(unet, students)
    with safe_open(tmp_path / "switched/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == expected  # noqa: SIM118
    switched.save_pretrained(tmp_path / "shards", max_shard_size="10MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    with torch.no_grad():
        reference = switched(*inputs).sample
        for folder in (tmp_path / "shards", tmp_path / "switched/unet"):
            for memory in (True, False):
                loaded = SwitchedUNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=memory)
                assert held(loaded) == expected
                assert torch.equal(loaded(*inputs).sample, reference)
    half = load_pipeline(str(tmp_path / "switched"), LoadOptions(torch.bfloat16)).unet
    assert held(half) == expected // 2
    assert half.member_names == switched.member_names
    assert half.schedule.actions == switched.schedule.actions


OUTSIDE = """
import sys, torch
sys.modules["asdm_compress"] = None  # an import of it fails as if it were not there
from diffusers import AutoModel, StableDiffusionPipeline
from safetensors.torch import load_file
folder, again, case = sys.argv[1:]
case = load_file(case)
unet = AutoModel.from_pretrained(folder, trust_remote_code=True)
unet.save_pretrained(again)
twice = AutoModel.from_pretrained(again, trust_remote_code=True)
timesteps = case["timesteps"]
for one in (unet, twice):
    off = []
    with torch.no_grad():
        for t, expected in zip(timesteps, case["expected"]):
            off.append((one(case["sample"], t, case["text"]).sample - expected).abs().max().item())
    print("DIFFERENCE", max(off))
"""


def test_the_unet_opens_where_this_package_is_not(switch, inputs, tmp_path):
    switched = switch("explicit:teacher/small/skip/tiny")
    switched.save_pretrained(tmp_path / "unet")
    timesteps = torch.tensor(switched.schedule.timesteps, dtype=torch.int64)
    with torch.no_grad():
        expected = torch.stack([switched(inputs[0], t, inputs[2]).sample for t in timesteps])
    case = tmp_path / "case.safetensors"
    save_file({"sample": inputs[0], "timesteps": timesteps, "text": inputs[2], "expected": expected}, case)
    result = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(tmp_path / "unet"), str(tmp_path / "again"), str(case)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("DIFFERENCE 0.0\n") == 2
    assert "asdm_compress" not in loader_source("switching.switched_unet").partition("class ")[0].partition('"""')[0]


def test_a_skipped_step_is_the_forecast_of_a_run_that_inherits(pipeline, unet, switch):
    switched = switch("explicit:teacher*2/skip/skip:hold")
    pipe = pipe_of(pipeline, unet)
    with inheriting(pipe, Schedule((FULL, FULL, skip(LINEAR), skip(HOLD)))):
        expected = call(pipe)
    assert torch.equal(call(pipe_of(pipeline, switched)), expected)
    assert not torch.equal(call(pipe_of(pipeline, unet)), expected)


def test_runs_of_two_pipelines_and_threads_do_not_meet(pipeline, switch):
    switched = switch("explicit:teacher/small/skip/tiny")
    prompts = ["a small red circle", "a large blue square", "a green ring", "a white star"]
    expected = [call(pipe_of(pipeline, switched), prompt=prompt) for prompt in prompts]
    found = {}

    def work(prompt):
        found[prompt] = [call(pipe_of(pipeline, switched), prompt=prompt) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, image in zip(prompts, expected, strict=True):
        assert all(torch.equal(other, image) for other in found[prompt])


def test_runs_that_take_turns_in_one_thread_and_one_that_breaks_off_do_not_meet(pipeline, switch):
    switched = switch("explicit:teacher/small/skip/tiny")
    first, second = pipe_of(pipeline, switched), pipe_of(pipeline, switched)
    expected = call(first), call(second, prompt="a large blue square")
    inside = []

    def other_run(pipe, step, *_):
        if step == 1:
            inside.append(call(second, prompt="a large blue square"))
        return {}

    assert torch.equal(call(first, callback_on_step_end=other_run), expected[0])
    assert torch.equal(inside[0], expected[1])

    def fail(*_):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        call(first, callback_on_step_end=fail)
    assert torch.equal(call(first), expected[0])


def test_a_run_that_breaks_off_keeps_no_model_in_memory(pipeline, switch):
    def fail(*_):
        raise RuntimeError("stopped")

    switched = switch("explicit:teacher/small/skip/tiny")
    with pytest.raises(RuntimeError, match="stopped"):
        call(pipe_of(pipeline, switched), callback_on_step_end=fail)
    twin = copy.deepcopy(switched)  # which has no runs of its own
    assert torch.equal(call(pipe_of(pipeline, twin)), call(pipe_of(pipeline, switched)))
    gone = weakref.ref(switched)
    del switched
    gc.collect()
    assert gone() is None


def test_a_timestep_of_a_batch_is_no_place_in_a_run():
    assert is_run([900.0, 500.0, 500.0, 100.0])
    for timesteps in ([500.0, 500.0], [100.0, 900.0], [900.0, -1.0], [900.0, 20_000.0]):
        assert not is_run(timesteps)


def test_batches_and_sizes_change_between_runs(pipeline, switch):
    switched = switch("explicit:teacher/small/skip/tiny")
    pipe = pipe_of(pipeline, switched)
    for more in ({}, {"height": 64, "width": 96}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 3}):
        fresh = pipe_of(pipeline, copy.deepcopy(switched))
        assert torch.equal(call(pipe, **more), call(fresh, **more))


def test_image_to_image_starts_mid_way(pipeline, students, switch):
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pipe = pipe_of(pipeline, switch("large-first:2"), StableDiffusionImg2ImgPipeline)
    alone = pipe_of(pipeline, students["tiny"], StableDiffusionImg2ImgPipeline)
    assert torch.equal(call(pipe, image=image, strength=0.5), call(alone, image=image, strength=0.5))
    skipping = pipe_of(pipeline, switch("explicit:teacher*2/skip/tiny"), StableDiffusionImg2ImgPipeline)
    # There is nothing to forecast from where a run begins: the step is computed, by the body.
    computing = pipe_of(pipeline, switch("explicit:teacher*3/tiny"), StableDiffusionImg2ImgPipeline)
    expected = call(computing, image=image, strength=0.5)
    assert torch.equal(call(skipping, image=image, strength=0.5), expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "dpm++-karras", "unipc", "euler", "pndm", "heun"])
def test_other_samplers_and_steps_are_served_by_noise_level_with_a_notice(pipeline, switch, scheduler):
    switched = switch("large-first:2")
    seen = []
    for name in ("small", "tiny"):
        switched.member(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    pipe = pipe_of(pipeline, switched, scheduler=make_scheduler(scheduler, pipeline))
    with pytest.warns(CarriedOver, match="carried over by noise level"):
        call(pipe, num_inference_steps=9)
    evaluations = len(pipe.scheduler.timesteps)
    assert 0.2 * evaluations < len(seen) < 0.8 * evaluations
    assert set(seen) == {"tiny"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CarriedOver)
        call(pipe, num_inference_steps=9)


def test_skipping_schedules_are_carried_over_too(pipeline, switch):
    switched = switch("explicit:teacher/tiny/skip/teacher")
    pipe = pipe_of(pipeline, switched)
    with pytest.warns(CarriedOver):
        assert call(pipe, num_inference_steps=8).isfinite().all()
    actions = switched.schedule.actions_at(switched.schedule.timeline_of(pipe.scheduler.timesteps.tolist()))
    assert actions[0] == Action(member="teacher")
    assert {action.name for action in actions} == {"full@teacher", "full@tiny", "skip:linear"}


def test_a_timestep_that_stands_alone_is_served_by_its_noise(unet, students, switch, inputs):
    switched = switch("explicit:teacher*2/skip/tiny")
    sample, _, text = inputs
    with torch.no_grad(), pytest.warns(CarriedOver, match="no part of a sampler's timesteps"):
        assert torch.equal(switched(sample, 990, text).sample, unet(sample, 990, text).sample)
        assert torch.equal(switched(sample, torch.tensor(3), text).sample, students["tiny"](sample, 3, text).sample)
        mixed = switched(sample, torch.tensor([990, 3]), text).sample
    with torch.no_grad():
        same = torch.tensor([3, 3])  # of a batch, and no run of two steps whose second is skipped
        assert torch.equal(switched(sample, same[1], text).sample, students["tiny"](sample, 3, text).sample)
        assert torch.allclose(mixed[:1], unet(sample[:1], 990, text[:1]).sample, atol=1e-5)
        assert torch.allclose(mixed[1:], students["tiny"](sample[1:], 3, text[1:]).sample, atol=1e-5)


def test_inheritance_works_on_top_of_switching(pipeline, unet, students, switch):
    def inherited(unet, rule):
        pipe = pipe_of(pipeline, unet)
        with inheriting(pipe, rule):
            return call(pipe)

    rule = "uniform:2,branch=1"
    assert torch.equal(inherited(switch("small-first:0"), rule), inherited(unet, rule))
    assert torch.equal(inherited(switch("small-first:4"), rule), inherited(students["tiny"], rule))
    plain = pipe_of(pipeline, switch("small-first:2"))
    expected = call(plain)
    with inheriting(plain, "uniform:1"):
        assert torch.equal(call(plain), expected)
    assert torch.equal(call(plain), expected)
    # A step inherits from the member that computes it: where that has computed nothing yet, it computes all.
    actions = (
        Action(member="teacher"),
        Action(cut(0).inherits, None, "small"),
        Action(cut(0).inherits, None, "teacher"),
    )
    mixed = inherited(switch("small-first:0"), Schedule((*actions, Action(member="tiny"))))
    same = inherited(
        switch("small-first:0"), Schedule((actions[0], Action(member="small"), *actions[2:], Action(member="tiny")))
    )
    assert torch.equal(mixed, same)


def test_a_schedules_file_keeps_members(tmp_path, pipeline, switch):
    actions = (Action(member="teacher"), Action(cut(0, LINEAR).inherits, LINEAR, "small"), skip(), FULL)
    save_schedule(Schedule(actions), tmp_path / "inheritance.yaml")
    assert load_schedule(tmp_path / "inheritance.yaml").actions == actions
    with pytest.raises(AsdmError, match="no member 'teacher'"), inheriting(pipeline, Schedule(actions)):
        pass


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory):
    unet = copy.deepcopy(pipeline.unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1", "proj_out", "ff.net.2"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


def test_a_lora_is_put_on_every_member_that_has_the_layer(pipeline, unet, members, switch, lora, tmp_path):
    from safetensors.torch import load_file

    plans = {"teacher": {}, "small": SMALL, "tiny": TINY}
    for name in members:
        switched = copy.deepcopy(switch(f"explicit:{name}*{STEPS}"))
        pipe = pipe_of(pipeline, switched)
        before = call(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CarriedOver)
            pipe.load_lora_weights(lora)
        alone = pipe_of(pipeline, copy.deepcopy(members[name]))
        file = tmp_path / f"{name}.safetensors"
        save_file(dict(remap_lora(load_file(lora), unet, Plan(plans[name])).tensors), file)
        alone.load_lora_weights(file)
        for more in ({}, {"cross_attention_kwargs": {"scale": 0.5}}):
            with_lora = call(pipe, **more)
            assert torch.equal(with_lora, call(alone, **more))
            assert not torch.equal(with_lora, before)
        pipe.fuse_lora()
        alone.fuse_lora()
        assert torch.equal(call(pipe), call(alone))
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert torch.allclose(call(pipe), before, atol=1e-3)
        assert held(switched) == held(switch("small-first:0"))


def test_layers_that_a_lora_does_not_fit_are_told(pipeline, switch, lora):
    pipe = pipe_of(pipeline, copy.deepcopy(switch("small-first:2")))
    with pytest.warns(CarriedOver, match="does not fit"):
        pipe.load_lora_weights(lora)


def test_a_controlnets_residuals_reach_the_members(pipeline, unet, members, switch):
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    for name, parameter in controlnet.named_parameters():
        if "controlnet_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    pipe = pipe_of(pipeline, switch("explicit:teacher*4"), StableDiffusionControlNetPipeline, controlnet=controlnet)
    alone = pipe_of(pipeline, unet, StableDiffusionControlNetPipeline, controlnet=controlnet)
    found = call(pipe, image=image)
    assert torch.equal(found, call(alone, image=image))
    assert not torch.equal(found, call(pipe_of(pipeline, unet)))
    # One whose encoder lacks a level takes no residuals of the whole one, and says so.
    pipe = pipe_of(pipeline, switch("small-first:1"), StableDiffusionControlNetPipeline, controlnet=controlnet)
    with pytest.raises(AsdmError, match="residuals were given for"):
        call(pipe, image=image)


def test_freeu_is_every_members(pipeline, students, switch):
    switched = copy.deepcopy(switch("small-first:4"))
    alone = copy.deepcopy(students["tiny"])
    for unet in (switched, alone):
        unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    assert torch.equal(call(pipe_of(pipeline, switched)), call(pipe_of(pipeline, alone)))
    switched.disable_freeu()
    assert torch.equal(call(pipe_of(pipeline, switched)), call(pipe_of(pipeline, students["tiny"])))


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("smallest:3", "unknown order"),
        ("small-first:x", "no number"),
        ("small-first:3/2", "has 4"),
        ("small-first:1/1/1", "the last of 3"),
        ("interleaved:0", "at least 1"),
        ("explicit:teacher*2", "2 steps"),
        ("explicit:teacher/huge*3", "no member 'huge'"),
        ("explicit:skip/teacher*3", "first step"),
        ("explicit:teacher//teacher*2", "empty step"),
        ("explicit:teacher/skip:cubic/teacher*2", "unknown forecast"),
    ],
)
def test_orders_that_are_none_are_refused(order, says):
    with pytest.raises(AsdmError, match=says):
        parse_order(order, ("tiny", "small", "teacher"), STEPS)


def test_what_makes_no_switched_unet_is_refused(pipeline, unet, students, switch, tmp_path):
    schedule = schedule_of(pipeline, "small-first:2", ("small", "teacher"))
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        large = UNet2DConditionModel(**FAMILIES["sd15"].unet_config)
    with pytest.raises(AsdmError, match="cannot take turns"):
        SwitchedUNet2DConditionModel.of({"teacher": unet, "small": large}, schedule)
    half = copy.deepcopy(students["small"]).to(torch.bfloat16)
    with pytest.raises(AsdmError, match="bfloat16 on cpu"):
        SwitchedUNet2DConditionModel.of({"teacher": unet, "small": half}, schedule)
    with pytest.raises(AsdmError, match="no member 'small'"):
        SwitchedUNet2DConditionModel.of({"teacher": unet, "other": students["small"]}, schedule)
    twice = switch("small-first:2")
    alone = schedule_of(pipeline, (Action(member="teacher"),) * STEPS)
    for members, order in (
        ({"teacher": twice, "small": students["small"]}, schedule),
        ({"teacher": unet, "small": twice}, schedule),
        ({"teacher": twice}, alone),
    ):
        with pytest.raises(AsdmError, match="switched UNet itself"):
            SwitchedUNet2DConditionModel.of(members, order)
    with pytest.raises(AsdmError, match="3 actions"):
        SwitchingSchedule((FULL,) * 3, (999.0,), schedule.noise)
    with pytest.raises(AsdmError, match="first step"):
        SwitchingSchedule((skip(),), (999.0,), schedule.noise)
    switched = switch("small-first:2")
    with pytest.raises(AsdmError, match="no IP-Adapter"):
        switched._load_ip_adapter_weights({})
    with pytest.raises(AsdmError, match="switched between"):
        assemble(switched, Plan({"mid_block": "drop"}))
    switched.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for change, says in (
        ({"switching": {**config["switching"], "steps": ["gone"]}}, "schedule cannot be read"),
        ({"members": [{"name": "teacher"}]}, "no member"),
        ({"members": [config["members"][0], {**config["members"][1], "shared": {}}, config["members"][2]]}, "missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        with pytest.raises(AsdmError, match=says):
            SwitchedUNet2DConditionModel.from_pretrained(tmp_path)


def test_shared_names_are_written_by_their_highest_places():
    names = ["a.b.weight", "a.b.bias", "a.c.weight", "d.weight", "d.bias"]
    tensors = {"a.b.weight": "x.b.weight", "a.b.bias": "x.b.bias", "a.c.weight": "x.c.weight", "d.bias": "e.bias"}
    written = as_prefixes(names, tensors)
    assert written == {"a": "x", "d.bias": "e.bias"}
    assert of_prefixes(names, written) == tensors
    same = {name: name for name in names}
    assert as_prefixes(names, same) == {"": ""}
    assert of_prefixes(names, {"": ""}) == same


def test_the_command_writes_what_generate_opens(pipeline, students, cli, tmp_path):
    save_pipeline(pipe_of(pipeline, students["small"]), tmp_path / "small")
    made = cli("switch", "mini-sd", "small", "-s", "small-first:2", "--steps", "4", "--out", "both", "--json")
    assert made.returncode == 0, made.stderr
    printed = json.loads(made.stdout)
    assert printed["steps"] == {"small": 2, "mini-sd": 2}
    assert printed["bytes"] < printed["bytes_apart"]
    done = cli("generate", "both", "a small red circle", "--steps", "4", "--compare", "mini-sd", "--json")
    assert done.returncode == 0, done.stderr
    for arguments, code in (
        (("mini-sd", "-s", "small-first:2"), 2),
        (("mini-sd", "small", "-s", "small-first:30"), 2),
        (("mini-sd", "small", "-s", "nothing"), 2),
        (("mini-sd", "gone", "-s", "small-first:2"), 2),
    ):
        bad = cli("switch", *arguments, "--steps", "4", "--out", "none")
        assert (bad.returncode, "Traceback" in bad.stderr) == (code, False), bad.stderr
        assert not (tmp_path / "none").exists()
