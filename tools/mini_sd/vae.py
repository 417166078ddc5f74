"""Stages `vae` and `decoder`: the autoencoder, mostly on crops around the objects, then its decoder alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.world import IMAGE_SIZE, Scene, sample_scene
from mini_sd.architecture import make_vae
from mini_sd.progress import TrainingRun

CROP: Final = 64
CROP_SHARE: Final = 0.7  # of the time; crops hold four times as many edges per pixel as whole pictures
KL_WEIGHT: Final = 1e-4
LEARNING_RATE: Final = 2e-3
DECODER_NOISE: Final = 0.02  # deviation of what is added to the latents, as a share of theirs


def train_vae(folder: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Train or go on training; the checkpoint is `vae.pt` in `folder`."""
    torch.manual_seed(seed)
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    run = TrainingRun(folder, "vae", minutes, {"model": vae, "optimizer": optimizer}, seed)
    rng = np.random.default_rng([seed, run.step])
    for _ in run.steps(optimizer, LEARNING_RATE):
        cropped = run.seconds - run.seconds_before < CROP_SHARE * run.seconds_allowed
        images = _batch(rng, cropped).to(device) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        difference = decoded - images
        reconstruction = difference.abs().mean() + difference.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        psnr = -10 * torch.log10(difference.detach().square().mean() / 4)
        run.log(loss=loss.item(), psnr=psnr.item(), kl=kl.item())


def train_decoder(folder: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Go on with the decoder alone, which leaves the latents, and so a UNet trained on them, as they are.

    Starts from `vae.pt`; the checkpoint is `decoder.pt` in `folder`.
    """
    torch.manual_seed(seed)
    vae = make_vae().to(device)
    vae.load_state_dict(torch.load(folder / "vae.pt", map_location=device, weights_only=True)["model"])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    run = TrainingRun(folder, "decoder", minutes, {"model": vae, "optimizer": optimizer}, seed)
    rng = np.random.default_rng([seed, 3, run.step])
    for _ in run.steps(optimizer, LEARNING_RATE):
        cropped = run.seconds - run.seconds_before < CROP_SHARE * run.seconds_allowed
        images = _batch(rng, cropped).to(device) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
            # A UNet's latents are never quite those of the encoder.
            latents = latents + DECODER_NOISE * latents.std() * torch.randn_like(latents)
        difference = vae.decode(latents).sample - images
        loss = difference.abs().mean() + difference.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        run.log(loss=loss.item(), psnr=(-10 * torch.log10(difference.detach().square().mean() / 4)).item())


def _batch(rng: np.random.Generator, cropped: bool) -> Tensor:
    if not cropped:
        return draw_scenes([sample_scene(rng, held_out=False) for _ in range(16)])
    scenes = [sample_scene(rng, held_out=False) for _ in range(24)]
    return torch.stack([_crop(i, s, rng) for i, s in zip(draw_scenes(scenes), scenes, strict=True)])


def _crop(image: Tensor, scene: Scene, rng: np.random.Generator) -> Tensor:
    target = scene.objects[int(rng.integers(len(scene.objects)))]
    corner = [
        int(np.clip(centre - CROP / 2 + rng.uniform(-CROP / 2.5, CROP / 2.5), 0, IMAGE_SIZE - CROP))
        for centre in (target.centre_x, target.centre_y)
    ]
    return image[:, corner[1] : corner[1] + CROP, corner[0] : corner[0] + CROP]


def load_vae(folder: Path) -> AutoencoderKL:
    """The trained VAE with its scaling factor set so that latents of training scenes have unit variance."""
    vae = make_vae().eval()
    tuned = folder / "decoder.pt"
    weights = torch.load(folder / "vae.pt", map_location="cpu", weights_only=True)["model"]
    if tuned.exists():
        later = torch.load(tuned, map_location="cpu", weights_only=True)["model"]
        encoder = [key for key in weights if key.startswith(("encoder.", "quant_conv."))]
        if all(torch.equal(weights[key], later[key]) for key in encoder):
            weights = later
        else:
            print("decoder.pt belongs to another encoder and is left out", flush=True)
    vae.load_state_dict(weights)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        images = draw_scenes([sample_scene(rng, held_out=False) for _ in range(256)]) * 2 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(32)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def encoder_hash(vae: AutoencoderKL) -> str:
    """A hash of what decides the latents: the encoder's weights and the scaling factor."""
    digest = hashlib.sha256(str(vae.config.scaling_factor).encode())
    for part in (vae.encoder, vae.quant_conv):
        for tensor in part.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """PSNR in dB of the VAE's reconstruction of `images` (B, 3, H, W) in [0, 1]."""
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample
    return float(-10 * torch.log10(F.mse_loss((decoded / 2 + 0.5).clamp(0, 1), images)))
