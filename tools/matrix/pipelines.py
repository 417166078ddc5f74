"""Other pipelines, and the switches of pipelines: tasks, memory, schedulers, batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from torch import Tensor

from asdm_compress.models.walk import finish, start, steps_of
from matrix.outcome import Check, Outcome, largest
from matrix.subjects import Subject, predict

PROMPT = "a small red circle above a large blue square"


def _images(pipeline: Any, steps: int = 2, seed: int = 3, **extra: Any) -> Tensor:
    generator = extra.pop("generator", None) or torch.Generator().manual_seed(seed)
    found: Tensor = pipeline(
        extra.pop("prompt", PROMPT), num_inference_steps=steps, generator=generator, **{"output_type": "pt", **extra}
    ).images
    return found


def _as_the_edited_teacher(subject: Subject, make: Callable[[Any], Tensor]) -> float | None:
    """The difference between what is made with the UNet and with the edited teacher; the teacher has no oracle."""
    found = make(subject.unet)
    assert found.isfinite().all() and float(found.std()) > 0, "no picture"
    return None if subject.is_teacher else largest(found, make(subject.reference()))


def _pictures() -> tuple[Tensor, Tensor]:
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    return image, mask


def image_to_image(subject: Subject) -> Outcome:
    """Oracle: the edited teacher in the same pipeline."""
    image, _ = _pictures()

    def make(unet: Any) -> Tensor:
        pipeline = subject.pipeline(unet, StableDiffusionImg2ImgPipeline)
        return _images(pipeline, 4, image=image, strength=0.5)

    return Outcome(_as_the_edited_teacher(subject, make))


def inpainting(subject: Subject) -> Outcome:
    """Oracle: the edited teacher in the same pipeline, whose UNet has four channels."""
    image, mask = _pictures()

    def make(unet: Any) -> Tensor:
        pipeline = subject.pipeline(unet, StableDiffusionInpaintPipeline)
        return _images(pipeline, image=image, mask_image=mask, height=128, width=128)

    return Outcome(_as_the_edited_teacher(subject, make))


def sequential_offload(subject: Subject) -> Outcome:
    """accelerate's hooks of `enable_sequential_cpu_offload`: every module's weights come when it runs, and go."""
    expected = predict(subject.unet, subject.inputs)
    unet = cpu_offload(subject.fresh(), torch.device("cpu"))
    assert next(unet.parameters()).is_meta, "nothing was offloaded"
    first = largest(predict(unet, subject.inputs), expected)
    return Outcome(max(first, largest(predict(unet, subject.inputs), expected)))


def model_offload(subject: Subject) -> Outcome:
    """accelerate's hooks of `enable_model_cpu_offload`: the whole model comes and goes."""
    expected = predict(subject.unet, subject.inputs)
    unet, hook = cpu_offload_with_hook(subject.fresh(), torch.device("cpu"))
    first = largest(predict(unet, subject.inputs), expected)
    hook.offload()
    return Outcome(max(first, largest(predict(unet, subject.inputs), expected)))


def attention_slicing(subject: Subject) -> Outcome:
    """Oracle: without slices."""
    unet = subject.fresh()
    unet.set_attention_slice("max")
    return Outcome(largest(predict(unet, subject.inputs), predict(subject.unet, subject.inputs)))


def vae_slicing(subject: Subject) -> Outcome:
    """Oracle: without slices."""
    pipeline = subject.pipeline(subject.unet)
    prompts = [PROMPT, "a red circle"]
    expected = _images(pipeline, prompt=prompts)
    pipeline.vae.enable_slicing()
    try:
        return Outcome(largest(_images(pipeline, prompt=prompts), expected))
    finally:
        pipeline.vae.disable_slicing()


def vae_tiling(subject: Subject) -> Outcome:
    """Oracle: the edited teacher, decoded in the same tiles of half the picture's side."""
    vae = subject.teacher.vae
    sizes = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    try:
        return Outcome(_as_the_edited_teacher(subject, lambda unet: _images(subject.pipeline(unet))))
    finally:
        vae.disable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = sizes


def schedulers(subject: Subject) -> Outcome:
    """Oracle: the edited teacher with the same scheduler, for each that diffusers calls compatible."""
    differences, missing = [0.0], []
    for kind in sorted(subject.teacher.scheduler.compatibles, key=lambda kind: kind.__name__):
        if getattr(kind, "_backends", None):  # diffusers' stand-in for a class whose package is not installed
            missing.append(kind.__name__)
            continue
        # One draws its noise from a seed of its own, which is another at every run unless it is told.
        seeded = {"noise_sampler_seed": 0} if "noise_sampler_seed" in signature(kind.__init__).parameters else {}
        scheduler = kind.from_config(subject.teacher.scheduler.config, **seeded)

        def make(unet: Any, scheduler: Any = scheduler) -> Tensor:
            # PNDM asks for four steps.
            return _images(subject.pipeline(unet, scheduler=scheduler), 4, output_type="latent")

        differences.append(_as_the_edited_teacher(subject, make) or 0.0)
    note = f"{len(differences) - 1} kinds" + (f", not {', '.join(missing)}" if missing else "")
    return Outcome(None if subject.is_teacher else max(differences), note=note)


def several_per_prompt(subject: Subject) -> Outcome:
    """Oracle: each image made alone from its own seed; in double precision, in which the order of sums says nothing."""
    pipeline = copy.deepcopy(subject.pipeline(subject.unet)).to(torch.float64)
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    together = _images(pipeline, generator=seeds, num_images_per_prompt=3)
    alone = torch.cat([_images(pipeline, seed=i) for i in range(3)])
    return Outcome(largest(together, alone), note="in float64")


def guidance_off(subject: Subject) -> Outcome:
    """Oracle: the edited teacher without guidance."""

    def make(unet: Any) -> Tensor:
        return _images(subject.pipeline(unet), guidance_scale=1.0)

    return Outcome(_as_the_edited_teacher(subject, make))


@torch.no_grad()
def freeu(subject: Subject) -> Outcome:
    """Oracle: the pass made step by step. It acts once per decoder layer, so that no edited teacher can be one."""
    unet = subject.fresh()
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    found, plain = predict(unet, subject.inputs), predict(subject.unet, subject.inputs)
    by_steps = finish(steps_of(unet), start(unet, *subject.inputs))
    return Outcome(largest(found, by_steps), effect=largest(found, plain))


CHECKS = (
    Check("image to image", image_to_image),
    Check("inpainting (4 channels)", inpainting),
    Check("sequential CPU offload (accelerate)", sequential_offload),
    Check("model CPU offload (accelerate)", model_offload),
    Check("attention slicing", attention_slicing),
    Check("VAE slicing", vae_slicing),
    Check("VAE tiling", vae_tiling),
    Check("FreeU", freeu),
    Check("schedulers", schedulers),
    Check("several images per prompt", several_per_prompt),
    Check("guidance off", guidance_off),
)
