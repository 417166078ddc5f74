"""The forecast of a training: its memory counted, its time from a rehearsed pass on made-up latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.core.distillation import Distillation
from asdm_compress.core.errors import AsdmError, ExitCode, is_out_of_memory
from asdm_compress.core.units import format_bytes, format_duration, format_seconds
from asdm_compress.distillation.draws import micro_batches
from asdm_compress.distillation.estimate import Memory, encoder_bytes, estimate_memory, rows_kept, seconds_per_pass
from asdm_compress.distillation.features import FeatureUNet
from asdm_compress.distillation.losses import Batch, loss_terms, noise_scheduler, weighted_sum
from asdm_compress.distillation.selection import Phase, choose_parameters
from asdm_compress.distillation.trainer import LoopSettings
from asdm_compress.distillation.trajectory import rolled_rows
from asdm_compress.models.families import latent_size_of


@dataclass(frozen=True, slots=True)
class Forecast:
    """`memory` on one device; `seconds` of the whole training, without data, probes and checkpoints, and of a step."""

    memory: Memory
    seconds: float
    seconds_per_step: float
    trained: int
    checkpoint_bytes: int

    def text(self) -> str:
        """In one line."""
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in asdict(self.memory).items() if size)
        return (
            f"expected memory {format_bytes(self.memory.total)} per device ({parts}); "
            f"{format_seconds(self.seconds_per_step)} per step, {format_duration(self.seconds)} in all"
        )

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "seconds": self.seconds,
            "seconds_per_step": self.seconds_per_step,
            "trained_parameters": self.trained,
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def rehearse(
    student: UNet2DConditionModel,
    pipeline: StableDiffusionPipeline,
    training: Distillation,
    phases: Sequence[Phase],
    around: Sequence[str],
    places: tuple[Sequence[str], Sequence[str]],
    loop: LoopSettings,
    accelerator: Accelerator,
) -> Forecast:
    """Count and time the last phase, which trains the most; the student and its gradients are left as they were.

    `pipeline` is the teacher's. Raises AsdmError, with the memory as counted, where a pass does not fit.
    """
    teacher, text_tokens = pipeline.unet, int(pipeline.tokenizer.model_max_length)
    noising = noise_scheduler(pipeline.scheduler.config)
    device = accelerator.device
    rows, passes = micro_batches(training.batch, accelerator.num_processes, loop.micro_batch)
    student.to(device).train()
    chosen = choose_parameters(student, phases[-1].trains, around)
    asks_teacher = training.losses.needs_teacher
    trained = sum(p.numel() for _, p in chosen)
    kept = rows_kept(rows, training.losses)
    memory = estimate_memory(
        student, teacher if asks_teacher else None, trained, kept, text_tokens, loop.gradient_checkpointing,
        training.optimiser.name == "adamw-8bit", accelerator.mixed_precision in ("bf16", "fp16"),
    )  # fmt: skip
    memory = replace(memory, encoders=encoder_bytes(pipeline, asks_teacher))
    if loop.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    ours = FeatureUNet(student, places[0])
    theirs = FeatureUNet(teacher, places[1]) if asks_teacher else None
    batch = _made_up(student, rows, text_tokens, training.losses.trajectory_steps, device)

    def one_pass() -> None:
        with accelerator.autocast():
            loss = weighted_sum(loss_terms(ours, theirs, batch, noising, training.losses), training.losses)
        accelerator.backward(loss)
        student.zero_grad(set_to_none=True)

    try:
        seconds = seconds_per_pass(one_pass, device) * passes
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise AsdmError(
            f"memory ran out: a pass of {rows} images is expected to take {format_bytes(memory.total)}",
            f"Use a smaller --micro-batch than {rows}, --gradient-checkpointing, or --dtype bf16.",
            ExitCode.ENVIRONMENT,
        ) from error
    finally:
        ours.release()
        if theirs is not None:
            theirs.release()
        student.disable_gradient_checkpointing()
    checkpoint = memory.weights + memory.optimiser + memory.averages
    if loop.sharded:
        memory = memory.shared(accelerator.num_processes)
    return Forecast(memory, seconds * training.steps, seconds, trained, checkpoint)


def _made_up(
    student: UNet2DConditionModel, rows: int, text_tokens: int, trajectory_steps: int, device: torch.device
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, channels = latent_size_of(student), int(student.config["out_channels"])
    clean, noise = torch.randn(2, rows, channels, size, size, generator=generator).to(device)
    text = torch.randn(rows, text_tokens, int(student.config["cross_attention_dim"]), generator=generator).to(device)
    timesteps = torch.randint(0, 1000, (rows,), generator=generator).to(device)
    own, rolled = torch.ones(rows, dtype=torch.bool, device=device), rolled_rows(rows, trajectory_steps).to(device)
    return Batch(clean, noise, timesteps, text, own, rolled)
