"""Runs under real pipelines: bit-exact where everything computes, and nothing of one run in another."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, conditional_only, cut, inherit, skip
from asdm_compress.inheritance.attach import disable, enable, inheriting
from asdm_compress.inheritance.costs import counts_alike, run_macs
from asdm_compress.inheritance.deepcache import DeepCacheHelper
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.forecast import LINEAR, combine, parse_forecast, weights
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule, save_schedule
from asdm_compress.inheritance.timeline import Timeline, timeline_of
from asdm_compress.inheritance.validity import mark_of, validity_of
from asdm_compress.models.call import UNetCall
from asdm_compress.models.tree import meta_copy
from asdm_compress.profiling.counting import count
from asdm_compress.sampling.schedulers import make_scheduler

RULE = "uniform:2,branch=1"
STEPS = 5


@pytest.fixture
def make(pipeline):
    """Pipelines of their own on the shared UNet."""

    def new(kind=StableDiffusionPipeline, scheduler="ddim", **more):
        parts = {k: v for k, v in pipeline.components.items() if k != "scheduler"}
        found = kind(**parts, scheduler=make_scheduler(scheduler, pipeline), requires_safety_checker=False, **more)
        found.set_progress_bar_config(disable=True)
        return found

    yield new
    assert "forward" not in pipeline.unet.__dict__


def latents(pipe, prompt="a small red circle", seed=3, **more):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images


def fresh(make, rule=RULE, scheduler="ddim", **more):
    pipe = make(scheduler=scheduler)
    with inheriting(pipe, rule):
        return latents(pipe, **more)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "dpm++-sde", "heun", "euler-a"])
def test_computing_everything_is_bit_identical_and_so_is_disabling(make, scheduler):
    pipe = make(scheduler=scheduler)
    plain = latents(pipe)
    enable(pipe, "uniform:1")
    enable(pipe, "uniform:1")
    assert torch.equal(latents(pipe), plain)
    enable(pipe, RULE)
    assert not torch.equal(latents(pipe), plain)
    disable(pipe)
    disable(pipe)
    assert torch.equal(latents(pipe), plain)
    assert type(pipe) is StableDiffusionPipeline


def test_an_assembled_student_inherits_as_its_teacher_does(make, unet):
    pipe = make()
    pipe.unet = assemble(unet, Plan({"mid_block": "conv1x1", "up_blocks.1.attentions.1": "drop"}))
    plain = latents(pipe)
    with inheriting(pipe, "uniform:1"):
        assert torch.equal(latents(pipe), plain)
    with inheriting(pipe, RULE):
        found = latents(pipe)
    assert not torch.equal(found, plain)
    assert float((found - plain).square().mean()) < 0.2 * float(plain.square().mean())


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++-sde", "heun", "euler-a", "pndm"])
def test_a_run_after_another_is_as_the_first(make, scheduler):
    expected = fresh(make, scheduler=scheduler)
    pipe = make(scheduler=scheduler)
    with inheriting(pipe, RULE):
        latents(pipe, "a large blue square", seed=8)
        latents(pipe, ["a green ring", "a cross"], seed=9, guidance_scale=1.0)
        latents(pipe, height=64, width=64)
        assert torch.equal(latents(pipe), expected)


def test_an_exception_half_way_leaves_nothing_behind(make):
    expected = fresh(make)
    pipe = make()

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with inheriting(pipe, RULE):
        with pytest.raises(KeyboardInterrupt):
            latents(pipe, "a large blue square", callback_on_step_end=stop)
        assert torch.equal(latents(pipe), expected)


def test_two_pipelines_on_one_unet_one_within_the_other(make):
    expected, deeper, other = fresh(make), fresh(make, "uniform:3", seed=5), latents(make(), seed=6)
    outer, inner, plain = make(), make(), make()
    found = []

    def between(pipe, step, timestep, tensors):
        if step == 2:
            found.extend((latents(inner, seed=5), latents(plain, seed=6)))
        return tensors

    with inheriting(outer, RULE), inheriting(inner, "uniform:3"):
        assert torch.equal(latents(outer, callback_on_step_end=between), expected)
        disable(inner)
        assert torch.equal(latents(outer), expected)
    assert torch.equal(found[0], deeper)
    assert torch.equal(found[1], other)


def test_threads_do_not_see_each_other(make):
    rules = {RULE: 3, "uniform:3": 4, "uniform:2,guidance=2": 5}
    expected = {rule: fresh(make, rule, seed=seed) for rule, seed in rules.items()}
    pipes = {rule: make() for rule in rules}
    found = {}
    for rule, pipe in pipes.items():
        # Fast tokenizers keep the padding of a call in themselves: a shared one gives threads one another's lengths.
        pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
        enable(pipe, rule)

    def work(rule):
        found[rule] = latents(pipes[rule], seed=rules[rule])

    threads = [threading.Thread(target=work, args=(rule,)) for rule in rules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pipe in pipes.values():
        disable(pipe)
    assert all(torch.equal(found[rule], expected[rule]) for rule in rules)


def test_image_to_image_starts_with_a_computed_step(make):
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = None
    for before in (False, True):
        pipe = make(StableDiffusionImg2ImgPipeline)
        with inheriting(pipe, RULE):
            if before:
                latents(pipe, "a large blue square", seed=8, image=1 - image, strength=0.9)
            found = latents(pipe, image=image, strength=0.6)
        expected = found if expected is None else expected
    assert torch.equal(found, expected)
    plain = latents(make(StableDiffusionImg2ImgPipeline), image=image, strength=0.6)
    assert not torch.equal(found, plain)


def test_freeu_and_guidance_switched_off_half_way(make):
    pipe = make()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        plain = latents(pipe)
        with inheriting(pipe, "uniform:1,guidance=1"):
            assert torch.equal(latents(pipe), plain)
        with inheriting(pipe, "uniform:2,branch=8,forecast=hold"):
            first = latents(pipe)
            assert torch.equal(latents(pipe), first)
    finally:
        pipe.disable_freeu()

    def off(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    more = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with inheriting(pipe, "uniform:2,guidance=2"):
        assert torch.isfinite(latents(pipe, **more)).all()


class Reads(TorchDispatchMode):
    """Counts what asks the device for a value, and so waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [RULE, "uniform:2,branch=8,guidance=2,forecast=linear@log-snr", "uniform:3"])
def test_no_step_of_a_run_waits_for_the_device(make, rule):
    pipe = make(scheduler="dpm++")

    def reads(steps):
        with Reads() as seen:
            latents(pipe, num_inference_steps=steps)
        return seen.count

    plain = {steps: reads(steps) for steps in (4, 8)}
    with inheriting(pipe, rule):
        inherited = {steps: reads(steps) for steps in (4, 8)}
    # Whatever a run asks once, as when it begins, it asks for no step; pipelines and samplers have reads of their own.
    assert inherited[8] - plain[8] == inherited[4] - plain[4]


def test_deepcache_parameters_are_a_uniform_schedule_that_holds(make):
    expected = fresh(make, "uniform:3,branch=2,forecast=hold")
    pipe = make()
    helper = DeepCacheHelper(pipe)
    with pytest.raises(AsdmError, match="no parameters"):
        helper.enable()
    with pytest.raises(AsdmError, match="skip_mode"):
        helper.set_params(3, 2, "nonuniform")
    helper.set_params(cache_interval=3, cache_branch_id=2, skip_mode="uniform")
    helper.enable()
    assert torch.equal(latents(pipe), expected)
    helper.disable()
    assert torch.equal(latents(pipe), latents(make()))
    other = make()
    helper.enable(other)
    assert torch.equal(latents(other), expected)
    helper.disable()


@torch.no_grad()
def test_planned_macs_are_the_executed_ones_and_memory_ends_at_nothing(unet):
    actions = (
        FULL,
        cut(2, LINEAR),
        conditional_only(LINEAR),
        inherit(["up_blocks.3.resnets.0", "mid_block", "up_blocks.2.attentions.0.transformer_blocks.0.ff"]),
        conditional_only(LINEAR, cut(0)),
        skip(LINEAR),
        FULL,
    )
    timeline = Timeline(tuple(float(900 - 100 * i) for i in range(len(actions))))
    twin = meta_copy(unet)  # where attention is counted too; on a CPU torch does not know its fused kernel's operations
    run = Run(Evaluator(twin), actions, timeline, guided=True)
    plan = run._plan
    assert [s.action.name for s in plan.steps] == [a.name for a in actions]
    planned = run_macs(plan, counts_alike(count(unet, 4, 16, 16, 40), count(unet, 2, 16, 16, 40)))
    sample = torch.empty(4, 4, 16, 16, device="meta")
    text = torch.empty(4, 40, unet.config["cross_attention_dim"], device="meta")
    held = []
    for i in range(len(actions)):
        counter = FlopCounterMode(display=False)
        with counter:
            prediction = run.evaluate(UNetCall(sample, torch.empty((), device="meta"), text))
        assert prediction.shape == sample.shape
        assert counter.get_total_flops() // 2 == planned[i], actions[i].name
        held.append(len(run._kept))
    assert min(held[:5]) > 0
    assert held[5:] == [0, 0]


def test_a_schedule_file_survives_and_is_refused_elsewhere(make, tmp_path):
    pipe = make()
    pipe.scheduler.set_timesteps(STEPS)
    pipe._guidance_scale = 4.0
    validity = validity_of(pipe, timeline_of(pipe.scheduler), torch.empty(2, 4, 16, 16), mark_of(pipe.unet), "mini-sd")
    actions = (FULL, cut(0, LINEAR), conditional_only(LINEAR), cut(1), FULL)
    path = tmp_path / "inheritance.yaml"
    save_schedule(Schedule(actions, {}, validity), path)
    assert load_schedule(path) == Schedule(actions, {}, validity)
    with inheriting(pipe, path):
        assert torch.isfinite(latents(pipe)).all()
        for change, words in (
            ({"num_inference_steps": 6, "guidance_scale": 5.0}, "guidance scale: 4, not 5"),
            ({"guidance_scale": 1.0}, "guidance scale: 4, not 1"),
            ({"height": 64, "width": 64}, "image size"),
        ):
            with pytest.raises(AsdmError, match=words):
                latents(pipe, **change)
    other = make(scheduler="euler")
    with inheriting(other, path), pytest.raises(AsdmError, match="another scheduler"):
        latents(other)
    text = path.read_text()
    for change, words in (
        (("- full", "- ful"), "no action is called 'ful'"),
        (("asdm_inheritance: 1", "asdm_inheritance: 2"), "yaml:1: asdm_inheritance"),
        (("forecast: linear", "forecast: lineal"), "unknown forecast"),
    ):
        path.write_text(text.replace(*change))
        with pytest.raises(AsdmError, match=words):
            load_schedule(path)


def test_modes_choose_their_steps():
    steps = {text: parse_mode(text).computed_steps(12) for text in (
        "uniform:3", "power:3,p=2", "power-late:3,p=2", "centred:3,centre=0.5", "gaussian:3,sigma=0.1", "explicit:2/7",
    )}  # fmt: skip
    assert steps["uniform:3"] == (0, 3, 6, 9)
    early, late = steps["power:3,p=2"], steps["power-late:3,p=2"]
    assert sum(early) / len(early) < 4.5 < sum(late) / len(late)
    assert steps["explicit:2/7"] == (0, 2, 7)
    assert all(found[0] == 0 and max(found) < 12 for found in steps.values())
    assert parse_mode("gaussian:3").computed_steps(12) == parse_mode("gaussian:3").computed_steps(12)
    assert [parse_mode("uniform:2").computed_steps(n) for n in (0, 1)] == [(), (0,)]
    for text in ("unform:3", "uniform", "uniform:x", "uniform:0", "uniform:3,p=2", "uniform:3,forecast=guess"):
        with pytest.raises(AsdmError):
            parse_mode(text)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_forecast_is_exact_for_polynomials_of_its_order(order):
    anchors = [4.0, 2.5, 1.0, 0.5][: order + 1]
    values = [torch.tensor([x**order, 3.0]) for x in anchors]
    found = combine(values, weights(anchors, 6.0))
    assert torch.allclose(found, torch.tensor([6.0**order, 3.0]), rtol=1e-4)
    damped = combine(values, weights(anchors, 6.0, damping=1e-9))
    assert torch.allclose(damped, values[0])
    assert parse_forecast(parse_forecast("order2@sigma*0.5").name).damping == 0.5


def test_a_compiled_run_chooses_among_a_few_whole_graphs(make):
    """Every program has a form of its own, without a break, although torch may keep only one for each function here."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module

    actions = (FULL, cut(0), cut(1), cut(0))
    expected = fresh(make, Schedule(actions), num_inference_steps=len(actions))
    pipe = make()
    once = torch._dynamo.config.patch(recompile_limit=1)
    with once, inheriting(pipe, Schedule(actions), {"fullgraph": True, "backend": backend}):
        assert torch.equal(latents(pipe, num_inference_steps=len(actions)), expected)
        made = len(graphs)
        assert torch.equal(latents(pipe, num_inference_steps=len(actions)), expected)
    assert len(graphs) == made <= len(actions)
