"""Stage `reader`: the scene reader, on the renderer's own images under blur, noise, colour shifts, and the VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.reader import CELLS, DENSE_PARTS, STRIDE, SceneReader
from asdm_compress.scenes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, sample_scene
from mini_sd.progress import TrainingRun
from mini_sd.vae import load_vae

LEARNING_RATE: Final = 3e-3
BATCH: Final = 48
RECONSTRUCTIONS: Final = 1500
HEAT_WIDTH: Final = 0.75  # deviation, in cells, of the Gaussian that marks an object's centre


def train_reader(folder: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Train or go on training; the checkpoint is `reader.pt` in `folder`."""
    torch.manual_seed(seed)
    reader = SceneReader().to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    run = TrainingRun(folder, "reader", minutes, {"model": reader, "optimizer": optimizer}, seed)
    rng = np.random.default_rng([seed, 7, run.step])
    pool, reconstructions = _reconstructed_scenes(folder, seed) if (folder / "vae.pt").exists() else ([], None)
    for _ in run.steps(optimizer, LEARNING_RATE):
        # Half of the batch has been through the VAE, where there is one.
        fresh = BATCH if reconstructions is None else BATCH // 2
        scenes = [sample_scene(rng, held_out=False) for _ in range(fresh)]
        images = degrade(draw_scenes(scenes), rng)
        if reconstructions is not None:
            chosen = rng.integers(len(pool), size=BATCH - fresh)
            scenes += [pool[i] for i in chosen]
            images = torch.cat([images, degrade(reconstructions[torch.from_numpy(chosen)], rng, strength=0.3)])
        dense, background = reader(images.to(device))
        loss = reading_loss(dense, background, scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss.item())


def reading_loss(dense: Tensor, background: Tensor, scenes: list[Scene]) -> Tensor:
    """Heat-map cross-entropy, attribute cross-entropy and offset error near the centres, background cross-entropy."""
    centre, shape, colour, size, offset = dense.split(DENSE_PARTS, dim=1)
    heat = torch.zeros(len(scenes), CELLS, CELLS)
    places, answers, offsets = [], [], []
    for b, scene in enumerate(scenes):
        for item in scene.objects:
            x, y = item.centre_x / STRIDE - 0.5, item.centre_y / STRIDE - 0.5
            for row in range(round(y) - 1, round(y) + 2):
                for column in range(round(x) - 1, round(x) + 2):
                    strength = np.exp(-((row - y) ** 2 + (column - x) ** 2) / (2 * HEAT_WIDTH**2))
                    heat[b, row, column] = float(strength)
                    places.append((b, row, column))
                    answers.append((SHAPES.index(item.shape), COLOURS.index(item.colour), SIZES.index(item.size)))
                    offsets.append((STRIDE * (x - column), STRIDE * (y - row)))
    b, row, column = torch.tensor(places).T
    wanted = torch.tensor(answers, device=dense.device).T
    loss = 20 * F.binary_cross_entropy_with_logits(centre[:, 0], heat.to(dense.device))
    for logits, answer in zip((shape, colour, size), wanted, strict=True):
        loss = loss + F.cross_entropy(logits[b, :, row, column], answer)
    loss = loss + 0.05 * F.l1_loss(offset[b, :, row, column], torch.tensor(offsets, device=dense.device))
    names = torch.tensor([BACKGROUNDS.index(s.background) for s in scenes], device=dense.device)
    return loss + F.cross_entropy(background, names)


def _reconstructed_scenes(folder: Path, seed: int) -> tuple[list[Scene], Tensor]:
    """Training scenes with what the VAE makes of them, (N, 3, 128, 128) in [0, 1]."""
    vae, rng = load_vae(folder), np.random.default_rng([seed, 11])
    scenes = [sample_scene(rng, held_out=False) for _ in range(RECONSTRUCTIONS)]
    parts = []
    with torch.no_grad():
        for start in range(0, len(scenes), 50):
            images = draw_scenes(scenes[start : start + 50]) * 2 - 1
            decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
            parts.append((decoded / 2 + 0.5).clamp(0, 1))
    return scenes, torch.cat(parts)


def degrade(images: Tensor, rng: np.random.Generator, strength: float = 1.0) -> Tensor:
    """A random blur (deviation up to 1.6 pixels), noise (up to 0.06) and shift of each colour channel (up to 0.05).

    `strength` scales all three.
    """
    sigma = 0.05 + strength * rng.uniform(0, 1.55)
    taps = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, taps, groups=3), taps.transpose(2, 3), groups=3)
    noise = torch.randn_like(images) * float(strength * rng.uniform(0, 0.06))
    shift = strength * (torch.rand(len(images), 3, 1, 1) - 0.5) * 0.1
    return (blurred + noise + shift).clamp(0, 1)


def load_trained_reader(folder: Path) -> SceneReader:
    """The reader at its last checkpoint."""
    reader = SceneReader().eval().requires_grad_(False)
    reader.load_state_dict(torch.load(folder / "reader.pt", map_location="cpu", weights_only=True)["model"])
    return reader
