"""The final-trajectory loss: a short sampler rollout of the student against the teacher's, from the same noise."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from asdm_compress.distillation.features import FeatureUNet


def trajectory_loss(
    student: nn.Module, teacher: FeatureUNet, noise: Tensor, text: Tensor, noising: DDPMScheduler, steps: int
) -> Tensor:
    """Mean squared difference of the final latents of two rollouts of so many DDIM steps (2010.02502), unguided.

    One row in `steps` is rolled out, so that the term costs about one more pass; gradients go through all its steps.
    """
    noise, text = noise[::steps], text[::steps]
    with torch.no_grad():
        wanted = rollout(teacher, noise, text, noising, steps)
    return (rollout(student, noise, text, noising, steps) - wanted).square().mean()


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
