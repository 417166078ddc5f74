"""Members for the tests of switching, and the references that they are compared with."""

from __future__ import annotations

import copy

import torch
from diffusers import (
    StableDiffusionPipeline,
)

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.switching.orders import parse_order
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of

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


def make_students(unet):
    """Two, with layers that are solved or trained anew beside those that are the teacher's."""
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


def schedule_of(pipeline, order, names=("tiny", "small", "teacher"), steps=STEPS):
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    actions = parse_order(order, names, steps) if isinstance(order, str) else order
    return SwitchingSchedule(actions, tuple(scheduler.timesteps.tolist()), noise_of(scheduler))


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
