"""The memory of a training as it is forecast, against what is counted and what autograd keeps."""

from __future__ import annotations

import pytest
import torch

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.distillation import Losses
from asdm_compress.distillation.estimate import encoder_bytes, estimate_memory, rows_kept, saved_bytes

PLAN = Plan({"mid_block": "drop", "up_blocks.1.attentions.1": "conv1x1*4@timestep", "down_blocks.1.layers.1": "drop"})


def test_memory_is_counted_by_what_it_is_for(tiny):
    student = assemble(tiny, PLAN)
    parameters = sum(p.numel() for p in student.parameters())
    whole = estimate_memory(student, tiny, parameters, 4, 5)
    assert (whole.weights, whole.gradients, whole.optimiser) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert whole.teacher == 4 * sum(p.numel() for p in tiny.parameters())
    assert estimate_memory(student, tiny, parameters, 1, 5).activations == whole.activations / 4
    assert (
        0
        < estimate_memory(student, tiny, parameters, 4, 5, gradient_checkpointing=True).activations
        < whole.activations
    )
    assert estimate_memory(student, None, 10, 4, 5, eight_bit=True).optimiser == 20
    assert estimate_memory(student, None, 10, 4, 5).teacher == 0
    shared = whole.shared(2)
    assert (2 * shared.weights, 2 * shared.optimiser) == (whole.weights, whole.optimiser)
    assert (shared.teacher, shared.activations) == (whole.teacher, whole.activations)


def test_rollouts_keep_the_activations_of_all_their_steps():
    assert rows_kept(8, Losses()) == 8
    assert rows_kept(8, Losses(trajectory=0.1, trajectory_steps=4)) == 8 + 2 * 4
    assert rows_kept(1, Losses(trajectory=0.1, trajectory_steps=4)) == 1 + 4


def test_what_else_of_the_teacher_stays_on_the_device_is_counted(pipeline):
    beside = sum(p.numel() * p.element_size() for m in (pipeline.vae, pipeline.text_encoder) for p in m.parameters())
    assert encoder_bytes(pipeline) == beside > 0
    unet = sum(p.numel() * p.element_size() for p in pipeline.unet.parameters())
    assert encoder_bytes(pipeline, runs_unet=False) == beside + unet


def test_saved_activations_are_those_that_autograd_keeps(tiny):
    """Counted on the meta device unit by unit, against the hooks of a real pass."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    student = assemble(tiny, Plan({"mid_block": "drop"})).train().requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = student(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 12)).sample
    real = sum(size for place, size in sizes.items() if place not in weights)
    assert output.requires_grad
    assert saved_bytes(student, 5) == pytest.approx(real, rel=0.2)
