"""What a calibrated schedule is valid for, and whether a run is that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from accelerate.utils import align_module_device
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.provenance import content_hash
from asdm_compress.inheritance.carrying import CALIBRATE_HINT
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.families import architecture

# In the names of weights that adapters bring: LoRA, LoHa, LoKr, and IP-Adapter's processors and projection.
_ADAPTERS: Final = ("lora_", "hada_", "lokr_", ".processor.", "encoder_hid_proj.")
_SAMPLED_WEIGHTS: Final = 48
# Rounding to bfloat16 moves a weight by at most 2^-8 of itself, a fine-tuning by more. Weight by weight: those of
# normalisations are so much larger that they would hide what has become of all others.
_WEIGHT_TOLERANCE: Final = 1.25 * 2**-8
_ROUNDED_TO_NOTHING: Final = 1e-6  # in fp16
_SIGMA_TOLERANCE: Final = 1e-3
_GUIDANCE_TOLERANCE: Final = 1e-3

_SOLVER: Final = ("prediction_type", "algorithm_type", "solver_type", "solver_order")

_Difference = tuple[str, object, object, bool]  # what, in what was made, in what is seen, whether that is the same


@dataclass(frozen=True, slots=True)
class ModelMark:
    """What tells one UNet from another: a hash of its architecture and edits, and some of its weights.

    Weights and not their hash, so that the same model in another floating-point precision is known again. A LoRA beside
    the weights does not change the mark; one fused into them does, and so do integers in their place.
    """

    architecture: str
    weights: tuple[float, ...]

    def fits(self, other: ModelMark) -> bool:
        """Whether both are of the same model."""
        if self.architecture != other.architecture or len(self.weights) != len(other.weights):
            return False
        return all(
            math.isclose(own, theirs, rel_tol=_WEIGHT_TOLERANCE, abs_tol=_ROUNDED_TO_NOTHING)
            for own, theirs in zip(self.weights, other.weights, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Validity:
    """What a schedule was made for. `latent_size` is (height, width) of the UNet's input.

    `solver` is how the scheduler goes from step to step, where its kind leaves that open; empty where it is not known.
    `sigmas` has one entry per evaluation of the UNet in a whole run, and so says how many steps there are; it is empty
    for a scheduler without σs.
    """

    model: str
    mark: ModelMark
    scheduler: str
    evaluations: int
    sigmas: tuple[float, ...]
    guidance: float
    latent_size: tuple[int, int]
    solver: str = ""

    def check(self, seen: Validity) -> None:
        """Raise AsdmError, naming what differs, where a run is none that this was made for."""
        steps: list[_Difference] = [
            ("number of steps", self.evaluations, seen.evaluations, self.evaluations == seen.evaluations),
            ("noise schedule", _ends(self.sigmas), _ends(seen.sigmas), _close(self.sigmas, seen.sigmas)),
        ]
        kind = self._kind(seen)
        _refuse_first([*kind[:2], *steps, *kind[2:]])

    def check_but_for_steps(self, seen: Validity) -> None:
        """The same for a run whose number of steps may be another."""
        _refuse_first(self._kind(seen))

    def _kind(self, seen: Validity) -> list[_Difference]:
        return [
            ("model", self.model, "this one", self.mark.fits(seen.mark)),
            ("scheduler", self.scheduler, seen.scheduler, self.scheduler == seen.scheduler),
            (
                "solver", self.solver, seen.solver,
                not self.solver or not seen.solver or self.solver == seen.solver,
            ),
            (
                "guidance scale", f"{self.guidance:g}", f"{seen.guidance:g}",
                abs(self.guidance - seen.guidance) <= _GUIDANCE_TOLERANCE,
            ),
            (
                "image size", _size(self.latent_size), _size(seen.latent_size), self.latent_size == seen.latent_size,
            ),
        ]  # fmt: skip


def _refuse_first(differences: Sequence[_Difference]) -> None:
    for what, made, found, same in differences:
        if not same:
            raise AsdmError(
                f"this inheritance schedule was calibrated for another {what}: {made}, not {found}", CALIBRATE_HINT
            )


def mark_of(unet: UNet2DConditionModel) -> ModelMark:
    """The mark of a UNet; reads a few weights from the device."""
    facts = {**architecture(unet), "edits": dict(unet.config.get("edits") or {})}
    tensors = sorted(_own_weights(unet))
    picked = [tensors[len(tensors) * i // _SAMPLED_WEIGHTS][1:] for i in range(_SAMPLED_WEIGHTS)]
    weights = torch.stack([_middle(unet.get_submodule(path), name) for path, name in picked])
    return ModelMark(content_hash(facts), tuple(weights.tolist()))


def validity_of(
    pipeline: Any, timeline: Timeline, sample: Tensor, mark: ModelMark, model: str = "this model"
) -> Validity:
    """What a run under way is, from its pipeline, its timeline and the UNet's input."""
    guided = bool(getattr(pipeline, "do_classifier_free_guidance", False))
    return Validity(
        model,
        mark,
        type(pipeline.scheduler).__name__,
        len(timeline),
        timeline.sigmas or (),
        float(pipeline.guidance_scale) if guided else 1.0,
        (sample.shape[2], sample.shape[3]),
        solver_of(pipeline.scheduler),
    )


def solver_of(scheduler: Any) -> str:
    """What a scheduler's settings say of how it goes from step to step, beside the noise levels."""
    known = ((name, scheduler.config.get(name)) for name in _SOLVER)
    return ", ".join(f"{name}={value}" for name, value in known if value is not None)


def _own_weights(unet: UNet2DConditionModel) -> Iterator[tuple[str, str, str]]:
    """The weights: what each is called without an adapter's layers around it, and the module and its name now."""
    for full_name, tensor in unet.named_parameters():
        if tensor.numel() and not any(mark in full_name for mark in _ADAPTERS):
            path, _, name = full_name.rpartition(".")
            yield full_name.replace(".base_layer", ""), path, name


def _middle(module: nn.Module, name: str) -> Tensor:
    """One weight of a module, which is fetched for it where accelerate keeps its weights elsewhere."""
    with align_module_device(module):
        tensor = module.get_parameter(name).detach()
        return tensor.flatten()[tensor.numel() // 2].float().cpu()


def _close(made: Sequence[float], seen: Sequence[float]) -> bool:
    return len(made) == len(seen) and all(
        math.isclose(a, b, rel_tol=_SIGMA_TOLERANCE) for a, b in zip(made, seen, strict=True)
    )


def _ends(sigmas: Sequence[float]) -> str:
    return f"σ from {sigmas[0]:.4g} to {sigmas[-1]:.4g}" if sigmas else "no σs"


def _size(latent_size: tuple[int, int]) -> str:
    return f"latents of {latent_size[0]} x {latent_size[1]}"
