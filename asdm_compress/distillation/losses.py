"""The terms of the training loss: L = task + output + feature + trajectory (BK-SDM, 2305.15798, and its successors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from asdm_compress.core.distillation import Losses
from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.features import FeatureUNet
from asdm_compress.distillation.trajectory import trajectory_loss

PREDICTIONS = ("epsilon", "v_prediction")


def noise_scheduler(config: Mapping[str, object]) -> DDPMScheduler:
    """The training noise of a pipeline's scheduler; raises AsdmError for a model that predicts neither ε nor v."""
    scheduler = DDPMScheduler.from_config(dict(config), clip_sample=False, thresholding=False)
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise AsdmError(
            f"this model predicts {scheduler.config.prediction_type}, and training knows {' and '.join(PREDICTIONS)}"
        )
    return scheduler


@dataclass(frozen=True, slots=True)
class Batch:
    """What the UNets are given: `clean` and `noise` (B, C, h, w), `timesteps` (B,), `text` (B, tokens, width).

    `own` (B,) is False for rows with another image's caption, which have no task. `rolled` (B,) are the weights of the
    rows in the trajectory loss, 0 for those that are not rolled out.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor
    own: Tensor
    rolled: Tensor


def row_weights(timesteps: Tensor, noising: DDPMScheduler, losses: Losses) -> Tensor:
    """(B,) weights of the squared errors of ε or v.

    A squared error of the clean latents is one of ε divided by the signal-to-noise ratio s, one of v divided by s + 1.
    In these terms, min-SNR's weight of the clean latents' error is min(s, γ), the truncated one's min(s + 1, γ).
    """
    if losses.weighting == "none":
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr: Tensor = compute_snr(noising, timesteps)
    of_clean = (snr if losses.weighting == "min-snr" else snr + 1).clamp(max=losses.snr_gamma)
    return of_clean / (snr + 1 if noising.config.prediction_type == "v_prediction" else snr)


def loss_terms(
    student: torch.nn.Module, teacher: FeatureUNet | None, batch: Batch, noising: DDPMScheduler, losses: Losses
) -> dict[str, Tensor]:
    """The terms of weight above 0, unweighted, each a mean over rows, so that parts of a batch average to the whole.

    Features are compared by their mean squared difference, summed over the pairs, each divided by the mean square of
    the teacher's where `normalise` is set. The teacher runs only if a term asks for it.
    """
    noisy = noising.add_noise(batch.clean, batch.noise, batch.timesteps)
    prediction, features = student(noisy, batch.timesteps, batch.text)
    prediction = prediction.float()
    weights = row_weights(batch.timesteps, noising, losses)
    terms = {}
    if losses.task:
        is_v = noising.config.prediction_type == "v_prediction"
        target = noising.get_velocity(batch.clean, batch.noise, batch.timesteps) if is_v else batch.noise
        terms["task"] = (weights * batch.own * _squares(prediction - target)).mean()
    if losses.output or losses.feature:
        assert teacher is not None
        with torch.no_grad():
            wanted, theirs = teacher(noisy, batch.timesteps, batch.text)
        if losses.output:
            terms["output"] = (weights * _squares(prediction - wanted.float())).mean()
        if losses.feature:
            terms["feature"] = feature_loss(features, theirs, losses.normalise)
    if losses.trajectory:
        assert teacher is not None
        terms["trajectory"] = trajectory_loss(
            student, teacher, batch.noise, batch.text, batch.rolled, noising, losses.trajectory_steps
        )
    return terms


def feature_loss(ours: Sequence[Tensor], theirs: Sequence[Tensor], normalise: bool) -> Tensor:
    """Σ_l ‖f_S − f_T‖² over pairs; every row by its own norm, so that it does not matter who shares its batch."""
    total = torch.zeros((), device=ours[0].device)
    for mine, target in zip(ours, theirs, strict=True):
        if mine.shape != target.shape:
            raise AsdmError(f"a feature has the shape {tuple(mine.shape)}, the teacher's {tuple(target.shape)}")
        error = _squares(mine.float() - target.float())
        if normalise:
            error = error / _squares(target.float()).clamp(min=1e-12)
        total = total + error.mean()
    return total


def weighted_sum(terms: Mapping[str, Tensor], losses: Losses) -> Tensor:
    """The loss itself."""
    return torch.stack([getattr(losses, name) * term for name, term in terms.items()]).sum()


def _squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).mean(dim=1)
