"""The final-trajectory loss: a short sampler rollout of the student against the teacher's, from the same noise."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from asdm_compress.distillation.features import FeatureUNet


def trajectory_loss(
    student: nn.Module,
    teacher: FeatureUNet,
    noise: Tensor,
    text: Tensor,
    rolled: Tensor,
    noising: DDPMScheduler,
    steps: int,
) -> Tensor:
    """Mean squared difference of the final latents of two rollouts of so many DDIM steps (2010.02502), unguided.

    Rows with a weight in `rolled` (B,) are rolled out, and the mean over all rows is taken of their weighted errors
    (see `rolled_rows`); gradients go through all steps. Where no row has a weight one is rolled out for nothing: with
    sharded weights all processes have to make as many passes.
    """
    chosen = rolled.nonzero()[:, 0]
    chosen = chosen if len(chosen) else torch.zeros_like(rolled[:1], dtype=torch.long)
    noise, text = noise[chosen], text[chosen]
    with torch.no_grad():
        wanted = rollout(teacher, noise, text, noising, steps)
    errors = (rollout(student, noise, text, noising, steps) - wanted).square().flatten(1).mean(dim=1)
    return (rolled[chosen] * errors).sum() / len(rolled)


def rolled_rows(batch: int, steps: int) -> Tensor:
    """(B,) weights of a whole batch's rows: of one in `steps`, so that the term costs about one more pass.

    The mean over all rows of weighted errors is the mean over the rows that are rolled out, and the mean over equal
    parts of the batch the same, wherever these rows are.
    """
    rolled = torch.zeros(batch)
    rolled[::steps] = 1.0
    return rolled / rolled.mean()


def rollout(unet: nn.Module, noise: Tensor, text: Tensor, noising: DDPMScheduler, steps: int) -> Tensor:
    """Latents (B, C, h, w) after deterministic DDIM from pure noise, the last step to the clean latents."""
    last = int(noising.config.num_train_timesteps) - 1
    times = torch.linspace(last, last / steps, steps, device=noise.device).round().long()
    alphas: Tensor = noising.alphas_cumprod.to(noise.device, torch.float32)
    latents = noise
    for number, time in enumerate(times):
        prediction: Tensor = unet(latents, time.expand(len(latents)), text)[0].float()
        signal, sigma = alphas[time].sqrt(), (1 - alphas[time]).sqrt()
        if noising.config.prediction_type == "v_prediction":
            clean, epsilon = signal * latents - sigma * prediction, sigma * latents + signal * prediction
        else:
            clean, epsilon = (latents - sigma * prediction) / signal, prediction
        if number == len(times) - 1:
            return clean
        after = alphas[times[number + 1]]
        latents = after.sqrt() * clean + (1 - after).sqrt() * epsilon
    return latents
