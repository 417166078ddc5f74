"""What teacher and model cost: seconds in turns, memory, parameters, MACs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from diffusers import StableDiffusionPipeline

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.costs import fitted_macs, run_macs
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.members import HasMembers, member_of, with_own_members
from asdm_compress.inheritance.run_plan import RunPlan
from asdm_compress.inheritance.schedule import Schedule, actions_of
from asdm_compress.inheritance.schedule_file import read_rule
from asdm_compress.inheritance.shapes import value_shapes
from asdm_compress.inheritance.timeline import timeline_of
from asdm_compress.profiling.counting import ModuleCounts, count
from asdm_compress.sampling.images import decode, synchronise
from asdm_compress.sampling.schedulers import evaluations
from asdm_compress.sampling.settings import (
    SamplingSettings,
    check_size,
    encode,
    initial_latents,
    latent_side,
    step_generators,
)

Role = Literal["teacher", "model"]
ROLES: Final[tuple[Role, Role]] = ("teacher", "model")
_PATIENCE: Final = 300.0  # seconds after which the fewest repeats are enough
_FEWEST: Final = 3
Seconds = dict[str, dict[Role, list[float]]]


@dataclass(frozen=True, slots=True)
class Counted:
    """Exact on every machine: of the UNet, its weights, one pass for one image, and all passes of one image.

    `activation_bytes` are those of the largest pass. `pass_macs` is None for a switched UNet, whose passes differ, and
    `image_macs` where a schedule is carried over to another number of steps, so that its actions are known in a run
    alone.
    """

    parameters: int
    weight_bytes: int
    activation_bytes: int
    pass_macs: int | None
    image_macs: int | None


def count_costs(pipeline: StableDiffusionPipeline, settings: SamplingSettings, inherit: str | None) -> Counted:
    """Count a pipeline's UNet, before it inherits anything; `inherit` is the rule by which it will.

    Of a UNet with several members the passes are those that its schedule makes in a run of these settings.
    """
    unet, guided = pipeline.unet, settings.guidance > 1
    passes = _Passes(pipeline, settings)
    weights = list(unet.parameters())
    parameters = sum(p.numel() for p in weights), sum(p.numel() * p.element_size() for p in weights)
    if inherit is None and not isinstance(unet, HasMembers):
        whole = passes.counts(None, halved=False)
        each, calls = whole.macs[""].total, evaluations(pipeline.scheduler, settings.steps)
        return Counted(*parameters, whole.peak_bytes[""], each, calls * each)
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(settings.steps)
    timeline = timeline_of(scheduler)
    rule = None if inherit is None else read_rule(inherit)
    members: set[str | None] = {None}
    image_macs = None
    if not (isinstance(rule, Schedule) and len(rule.actions) != len(timeline)):
        actions = (Action(),) * len(timeline) if rule is None else actions_of(rule, timeline, 0)
        actions = with_own_members(unet, actions, timeline, 0)
        plan = Evaluator(unet).plan(actions, timeline, guided)
        members = {step.action.member for step in plan.steps if step.program.computes}
        image_macs = sum(run_macs(plan, passes.counts))
        if isinstance(rule, Schedule) and rule.corrections:
            image_macs += passes.of_corrections(plan, rule)
    pass_macs = None if isinstance(unet, HasMembers) else passes.counts(None, halved=False).macs[""].total
    peak = max(passes.counts(member, halved=False).peak_bytes[""] for member in members)
    return Counted(*parameters, peak, pass_macs, image_macs)


class _Passes:
    """The counts of the passes of a pipeline's UNet and of its members, each made once."""

    def __init__(self, pipeline: StableDiffusionPipeline, settings: SamplingSettings) -> None:
        self._unet = pipeline.unet
        self._rows = 2 if settings.guidance > 1 else 1
        self._side = latent_side(pipeline, settings)
        self._tokens = int(pipeline.tokenizer.model_max_length)
        self._found: dict[tuple[str | None, int], ModuleCounts] = {}

    def counts(self, member: str | None, halved: bool) -> ModuleCounts:
        """One pass of a member, None for the body, of one image with guidance, or of one branch of it."""
        rows = 1 if halved else self._rows
        if (member, rows) not in self._found:
            unet = member_of(self._unet, member)
            self._found[member, rows] = count(unet, rows, self._side, self._side, self._tokens)
        return self._found[member, rows]

    def of_corrections(self, plan: RunPlan, schedule: Schedule) -> int:
        """Of a run's fitted corrections, of one image."""
        looked_at = {feature.value for step in plan.steps for feature in step.sources}
        shapes = value_shapes(self._unet, looked_at, self._side, self._side)
        return sum(fitted_macs(plan, schedule.corrections, shapes, self._rows))


def time_in_turns(
    pipelines: Mapping[Role, StableDiffusionPipeline],
    prompt: str,
    settings: Mapping[Role, SamplingSettings],
    repeats: int,
    progress: Callable[[int, int], None],
) -> Seconds:
    """Seconds of one image's text encoder, sampling loop and VAE, of both pipelines in turns.

    Which goes first alternates, so that a slow moment of the machine, or the other's warm caches, meets both alike. One
    turn before the first is not counted. Of long runs the fewest repeats are enough.
    """
    found: Seconds = {part: {role: [] for role in ROLES} for part in ("text", "loop", "vae")}
    began = time.perf_counter()
    for turn in range(repeats + 1):
        for role in ROLES if turn % 2 else ROLES[::-1]:
            seconds = _one_image(pipelines[role], prompt, settings[role])
            if turn:
                for part, one in zip(found, seconds, strict=True):
                    found[part][role].append(one)
        progress(turn + 1, repeats + 1)
        if turn >= _FEWEST and time.perf_counter() - began > _PATIENCE:
            break
    return found


@torch.no_grad()
def _one_image(
    pipeline: StableDiffusionPipeline, prompt: str, settings: SamplingSettings
) -> tuple[float, float, float]:
    marks = [_now(pipeline.device)]
    texts = encode(pipeline, [prompt], settings.guidance)
    marks.append(_now(pipeline.device))
    latents = pipeline(**loop_arguments(pipeline, texts, settings)).images
    marks.append(_now(pipeline.device))
    decode(pipeline, latents)
    marks.append(_now(pipeline.device))
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def loop_arguments(
    pipeline: StableDiffusionPipeline, texts: torch.Tensor, settings: SamplingSettings
) -> dict[str, Any]:
    """What a pipeline is called with to sample latents of given texts (N, branches, tokens, width)."""
    return {
        "prompt_embeds": texts[:, -1],
        "negative_prompt_embeds": texts[:, 0] if texts.shape[1] == 2 else None,
        "latents": initial_latents(pipeline, len(texts), settings),
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "height": settings.image_size,
        "width": settings.image_size,
        "generator": step_generators(pipeline, len(texts), settings),
        "output_type": "latent",
    }


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


def peak_while_sampling(pipeline: StableDiffusionPipeline, prompt: str, settings: SamplingSettings) -> int | None:
    """Bytes that the accelerator's allocator held at most for one image: this pipeline's weights and what it computes.

    None on a CPU, where torch does not tell. What else is on the device is not counted.
    """
    if pipeline.device.type != "cuda":
        return None
    pipeline.unet.eval()  # which forgets kernels that earlier runs have left there
    torch.cuda.reset_peak_memory_stats(pipeline.device)
    before = torch.cuda.memory_allocated(pipeline.device)
    _one_image(pipeline, prompt, settings)
    computed = torch.cuda.max_memory_allocated(pipeline.device) - before
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return computed + sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def check_pair(teacher: StableDiffusionPipeline, model: StableDiffusionPipeline, settings: SamplingSettings) -> None:
    """Raise AsdmError for two models whose images cannot be laid side by side, or a size that one cannot make."""
    for pipeline in (teacher, model):
        check_size(pipeline, settings)
    reads, writes = (model.unet.config["cross_attention_dim"], model.text_encoder.config.hidden_size)
    if reads != writes:
        raise AsdmError(
            f"the model's UNet reads text of width {reads}, and its text encoder writes {writes}",
            "A UNet alone is put into its teacher's pipeline: give a teacher of its own kind with --against.",
        )
    shapes = [(p.unet.config["in_channels"], latent_side(p, settings)) for p in (teacher, model)]
    if shapes[0] != shapes[1]:
        raise AsdmError("the two models make images of different sizes", "Give both one --image-size.")
