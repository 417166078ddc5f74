"""Multi-UNet switching: which member does which step, what members share held once, and one model in all else."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import (
    AutoModel,
    StableDiffusionPipeline,
)
from safetensors import safe_open
from safetensors.torch import save_file
from switched import STEPS, call, held, own_bytes, pipe_of, schedule_of, switched_by_hand
from torch import nn

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.evaluation.record import load_evaluation
from asdm_compress.inheritance.actions import FULL, Action, cut, skip
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.forecast import LINEAR
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule, save_schedule
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.loader_source import loader_source
from asdm_compress.models.loading import LoadOptions, load_pipeline, with_parts
from asdm_compress.models.saving import save_pipeline
from asdm_compress.profiling.counting import count
from asdm_compress.sampling.own_steps import FILE_NAME, own_steps
from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.switching.orders import parse_order
from asdm_compress.switching.schedules import SwitchingSchedule
from asdm_compress.switching.sharing import as_prefixes, find_shared, of_prefixes
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel
from asdm_compress.workflows.progress import Silent
from asdm_compress.workflows.switch import SwitchSettings, open_models
from asdm_compress.workflows.switch import schedule_of as schedule_for


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


def test_what_a_third_member_has_of_the_second_is_held_once_too(pipeline, unet, students, inputs):
    # Both have solved the same layer anew, so that its unit is more like the other student's than like the teacher's.
    third = copy.deepcopy(students["tiny"])
    third.get_submodule("up_blocks.1.resnets.0.conv2").weight.mul_(1.01)
    three = {"teacher": unet, "tiny": students["tiny"], "third": third}
    schedule = schedule_of(pipeline, "small-first:2", ("third", "teacher"))
    switched = SwitchedUNet2DConditionModel.of(three, schedule)
    assert (
        held(switched)
        == held(unet)
        + own_bytes(unet, {"tiny": students["tiny"]})
        + third.get_submodule("up_blocks.1.resnets.0.conv2").weight.nbytes
    )
    with torch.no_grad():
        for name, member in three.items():
            assert torch.equal(switched.alone(name)(*inputs).sample, member(*inputs).sample)


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


def test_a_schedules_file_keeps_members(tmp_path, pipeline, switch):
    actions = (Action(member="teacher"), Action(cut(0, LINEAR).inherits, LINEAR, "small"), skip(), FULL)
    save_schedule(Schedule(actions), tmp_path / "inheritance.yaml")
    assert load_schedule(tmp_path / "inheritance.yaml").actions == actions
    with pytest.raises(AsdmError, match="no member 'teacher'"), inheriting(pipeline, Schedule(actions)):
        pass


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


def test_a_file_for_another_sampler_is_refused_with_what_to_do(pipeline, members, tmp_path):
    save_schedule(Schedule((Action(member="teacher"),) * STEPS), tmp_path / "switching.yaml")
    heun = with_parts(pipeline, scheduler=make_scheduler("heun", pipeline))
    with pytest.raises(AsdmError, match="has 4 actions, and HeunDiscreteScheduler calls the UNet 7 times") as caught:
        schedule_for(heun, members, SwitchSettings(str(tmp_path / "switching.yaml"), STEPS))
    assert "--scheduler" in caught.value.hint


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


def test_matrices_with_more_places_than_fp32_counts_are_shared_too():
    """As Stable Diffusion's decoder has them: of its largest convolutions fp32 takes the last place for one behind."""

    class Wide(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.conv_in = nn.Conv2d(1, 1, 1, bias=False)
            self.conv_in.weight = nn.Parameter(torch.full((1,), value).expand(1280, 2560, 3, 3))

    owner, same, other = Wide(1.0), Wide(1.0), Wide(2.0)
    assert find_shared(same, [("", owner)]).tensors == {"conv_in.weight": "conv_in.weight"}
    assert not find_shared(other, [("", owner)]).tensors


def test_shared_names_are_written_by_their_highest_places():
    names = ["a.b.weight", "a.b.bias", "a.c.weight", "d.weight", "d.bias"]
    tensors = {"a.b.weight": "x.b.weight", "a.b.bias": "x.b.bias", "a.c.weight": "x.c.weight", "d.bias": "e.bias"}
    written = as_prefixes(names, tensors)
    assert written == {"a": "x", "d.bias": "e.bias"}
    assert of_prefixes(names, written) == tensors
    same = {name: name for name in names}
    assert as_prefixes(names, same) == {"": ""}
    assert of_prefixes(names, {"": ""}) == same


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_every_member_stands_alone_too(members, switch, inputs):
    switched = switch("small-first:2")
    for name, member in members.items():
        alone = switched.alone(name)
        assert type(alone) is type(member)
        assert_same(alone, member)
        with torch.no_grad():
            assert torch.equal(alone(*inputs).sample, member(*inputs).sample)
    assert held(switched, switched.alone("teacher")) == held(switched)
    with pytest.raises(AsdmError, match="no member 'gone'"):
        switched.alone("gone")


def test_a_switched_folder_is_evaluated_and_exported(pipeline, students, switch, cli, tmp_path):
    save_pipeline(pipe_of(pipeline, switch("explicit:teacher/small/skip/tiny")), tmp_path / "both")
    few = ("--against", "mini-sd", "--images", "2", "--steps", "4", "--repeats", "2")
    done = cli("evaluate", "both", *few, "--out", "evaluated", "--json")
    assert done.returncode == 0, done.stderr
    found = load_evaluation(tmp_path / "evaluated/eval.json")
    assert found.model.sampling is None
    # What an image costs is what the members cost that its steps run, a skipped one nothing; no pass stands for all.
    passes = [count(students[name], 2, 16, 16, 40).macs[""].total for name in ("small", "tiny")]
    teacher = count(pipeline.unet, 2, 16, 16, 40).macs[""].total
    image = found.find("macs", "one image")
    assert (image.teacher.value, image.model.value) == (4 * teacher, teacher + sum(passes))
    assert found.find("macs", "one UNet pass") is None
    done = cli("export", "both", "--format", "portable", "--out", "portable")
    assert done.returncode == 0, done.stderr
    opened = AutoModel.from_pretrained(str(tmp_path / "portable/unet"), trust_remote_code=True)
    assert opened.member_names == ("teacher", "small", "tiny")
    refused = cli("export", "both", "--format", "ldm", "--out", "one.safetensors")
    assert refused.returncode == 2
    assert "Use portable" in refused.stderr


def test_the_command_writes_what_generate_opens(pipeline, students, cli, tmp_path):
    save_pipeline(pipe_of(pipeline, students["small"]), tmp_path / "small")
    few = ("--steps", "4", "--dtype", "fp32")  # in mini-sd's own the student is rounded
    made = cli("switch", "mini-sd", "small", "-s", "small-first:2", *few, "--out", "both", "--json")
    assert made.returncode == 0, made.stderr
    printed = json.loads(made.stdout)
    assert printed["steps"] == {"small": 2, "mini-sd": 2}
    assert printed["bytes"] < printed["bytes_apart"]
    assert own_steps(tmp_path / "both", pipeline.scheduler) == 4
    done = cli("generate", "both", "a small red circle")  # in the steps that it was made for
    assert done.returncode == 0, done.stderr
    assert "both is made for 4 steps" in done.stderr
    assert "carried over" not in done.stderr
    told = cli("report", "both", "--json")
    assert told.returncode == 0, told.stderr
    assert '<section id="switching"' in (tmp_path / "both/report.html").read_text(encoding="utf-8")
    # And by the guidance that it was made for, where it says that, with what it is compared with.
    own = tmp_path / "both" / FILE_NAME
    own.write_text(json.dumps(json.loads(own.read_text()) | {"guidance": 3.0}))
    for more, taken in (("", True), ("--guidance 3", False)):
        done = cli("generate", "both", "a ring", "--compare", "mini-sd", *more.split(), "--out", f"at{len(more)}")
        assert done.returncode == 0, done.stderr
        assert ("made for guidance 3" in done.stderr) == taken
    pictures = [sorted((tmp_path / place).glob("*-0000-*.png")) for place in ("at0", "at12")]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]]
    # By its own file too, whose number of steps counts; the first model's settings do not come along to a student.
    made = cli("switch", "mini-sd", "small", "-s", "both/switching.yaml", "--dtype", "fp32", "--out", "again")
    assert made.returncode == 0, made.stderr
    assert own_steps(tmp_path / "again", pipeline.scheduler) == 4
    damaged = tmp_path / "again" / FILE_NAME
    damaged.write_text(damaged.read_text().replace('"steps": 4', '"steps": 0'))
    refused = cli("generate", "again", "a small red circle", "--out", "more")
    assert refused.returncode == 2
    assert f"{FILE_NAME}: steps" in " ".join(refused.stderr.split())
    # Its members are members of others, without the teacher that it has in common with them.
    _, apart = open_models(["mini-sd", str(tmp_path / "both")], LoadOptions(), Silent())
    assert list(apart) == ["mini-sd", "small"]
    assert_same(apart["small"], students["small"])
    for arguments, code in (
        (("mini-sd", "-s", "small-first:2"), 2),
        (("mini-sd", "small", "-s", "small-first:30"), 2),
        (("mini-sd", "small", "-s", "nothing"), 2),
        (("mini-sd", "gone", "-s", "small-first:2"), 2),
        (("mini-sd", "small", "./small", "-s", "small-first:2"), 2),
    ):
        bad = cli("switch", *arguments, "--steps", "4", "--out", "none")
        assert (bad.returncode, "Traceback" in bad.stderr) == (code, False), bad.stderr
        assert not (tmp_path / "none").exists()
