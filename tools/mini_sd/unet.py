"""Stage `unet`: ε-prediction on the VAE's latents, with truncated v-weights, caption dropout and an EMA."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor

from asdm_compress.scenes.captions import caption_of
from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.world import Scene, sample_scene
from mini_sd.architecture import make_noise_scheduler, make_unet
from mini_sd.optimizer import MuonWithAdamW
from mini_sd.progress import TrainingRun
from mini_sd.text import load_text_encoder, tokenize
from mini_sd.vae import encoder_hash, load_vae

LEARNING_RATE: Final = 1e-3
BATCH: Final = 64
CAPTION_DROPOUT: Final = 0.1
MIN_SNR_GAMMA: Final = 5.0  # Hang et al., 2303.09556
EMA_DECAY: Final = 0.999
SCENES: Final = 40_000
NO_MATRICES: Final = ("conv_in", "conv_out", "time_embedding")


def train_unet(folder: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Train or go on training; the checkpoint is `unet.pt` in `folder`."""
    torch.manual_seed(seed)
    scenes, latents = encoded_scenes(folder, device)
    tokenizer, text_encoder = load_text_encoder(folder)
    text_encoder.to(device)
    unet, noising = make_unet().to(device), make_noise_scheduler()
    optimizer = MuonWithAdamW(unet, LEARNING_RATE, is_matrix=lambda name: not name.startswith(NO_MATRICES))
    ema = EMAModel(unet.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    ema.to(device)
    run = TrainingRun(folder, "unet", minutes, {"model": unet, "optimizer": optimizer, "ema": ema}, seed)
    ema.to(device)  # a checkpoint brings its averages to the CPU
    torch.manual_seed(seed + run.step)
    rng = np.random.default_rng([seed, run.step])
    for _ in run.steps(optimizer, LEARNING_RATE):
        chosen = rng.integers(len(scenes), size=BATCH)
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption_of(scenes[i], rng).text for i in chosen]
        with torch.no_grad():
            context = text_encoder(tokenize(tokenizer, captions).to(device)).last_hidden_state
        clean = latents[torch.from_numpy(chosen)].to(device, torch.float32)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, noising.config.num_train_timesteps, (BATCH,), device=device)
        prediction = unet(noising.add_noise(clean, noise, timesteps), timesteps, context).sample
        snr = compute_snr(noising, timesteps)
        # v-prediction's weight of the clean latents' error, (snr + 1), cut off as min-SNR does. The plain ε weight
        # (snr) all but ignores the noisiest steps, which decide plain backgrounds, and leaves those to the noise.
        weight = (snr + 1).clamp(max=MIN_SNR_GAMMA) / snr
        error = (prediction - noise).square().mean(dim=(1, 2, 3))
        loss = (weight * error).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        run.log(loss=loss.item(), error=error.mean().item())


def encoded_scenes(folder: Path, device: torch.device) -> tuple[list[Scene], Tensor]:
    """The training scenes and their latents (N, 4, 16, 16), fp16, scaled to unit variance; encoded once, then read."""
    rng = np.random.default_rng(20_240_601)
    scenes = [sample_scene(rng, held_out=False) for _ in range(SCENES)]
    path = folder / "latents.pt"
    vae = load_vae(folder)
    encoder = encoder_hash(vae)
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["encoder"] == encoder:
            return scenes, kept["latents"]
        print("the VAE's encoder has changed since the scenes were encoded: encoding them again", flush=True)
    vae.to(device)
    parts = []
    with torch.no_grad():
        for start in range(0, SCENES, 100):
            images = draw_scenes(scenes[start : start + 100]).to(device) * 2 - 1
            mean = vae.encode(images).latent_dist.mean
            parts.append((mean * vae.config.scaling_factor).half().cpu())
    latents = torch.cat(parts)
    torch.save({"encoder": encoder, "latents": latents}, path)
    return scenes, latents


def load_unet(folder: Path) -> tuple[UNet2DConditionModel, int, float]:
    """The UNet with its averaged weights, the steps that it was trained, and the seconds that they took."""
    state = torch.load(folder / "unet.pt", map_location="cpu", weights_only=True)
    unet = make_unet().eval()
    ema = EMAModel(unet.parameters())
    ema.load_state_dict(state["ema"])
    ema.copy_to(unet.parameters())
    return unet, state["step"], state["seconds"]
