"""Calibration triples (x_t, t, text) from the teacher's own sampling trajectories, and how much each moment matters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.core.errors import AsdmError

DEFAULT_BANDS: Final = 8
PERTURBATION: Final = 0.05  # of the noise prediction's norm, when the sampler's response is measured


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the teacher samples: the pipeline's own scheduler with this many steps and this guidance scale."""

    steps: int = 25
    guidance: float = 7.5
    seed: int = 0
    image_size: int | None = None


@dataclass(frozen=True, slots=True)
class Triples:
    """N moments of sampling runs.

    `samples` (N, C, H, W) as the UNet gets them, `timesteps` (N,), `texts` (N, branches, tokens, width) with the
    unconditional branch first where there is guidance, `bands` (N,) from 0 (most noise) on.
    """

    samples: Tensor
    timesteps: Tensor
    texts: Tensor
    bands: Tensor
    guidance: float

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, start: int, stop: int) -> Triples:
        """The triples from `start` to before `stop`."""
        rows = slice(start, stop)
        return Triples(self.samples[rows], self.timesteps[rows], self.texts[rows], self.bands[rows], self.guidance)

    def unet_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """One row per branch, R = N · branches: samples (R, C, H, W), timesteps (R,), texts (R, tokens, width)."""
        branches = self.texts.shape[1]
        return (
            self.samples.repeat_interleave(branches, 0),
            self.timesteps.repeat_interleave(branches, 0),
            self.texts.flatten(0, 1),
        )

    def guided(self, predictions: Tensor) -> Tensor:
        """The prediction that the sampler uses, (N, C, H, W), from one row per branch (Ho & Salimans, 2207.12598)."""
        if self.texts.shape[1] == 1:
            return predictions
        unconditional, conditional = predictions[0::2], predictions[1::2]
        return unconditional + self.guidance * (conditional - unconditional)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Triples, and per band the share of the final latent's error that an equal relative error there causes."""

    triples: Triples
    band_weights: tuple[float, ...]

    def to(self, device: torch.device) -> Calibration:
        """The same on another device; the bands stay where numpy can read them."""
        t = self.triples
        moved = Triples(t.samples.to(device), t.timesteps.to(device), t.texts.to(device), t.bands.cpu(), t.guidance)
        return Calibration(moved, self.band_weights)


Progress = Callable[[int, int], None]


@torch.no_grad()
def record(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    bands: int = DEFAULT_BANDS,
    progress: Progress | None = None,
    band_weights: tuple[float, ...] | None = None,
) -> Calibration:
    """Run the sampler on the prompts and keep one moment per prompt and band.

    The weights of the bands are measured by disturbing one step per band, unless they are known and given. Raises
    AsdmError without prompts or with fewer steps than bands.
    """
    if not prompts:
        raise AsdmError("calibration needs at least one prompt")
    if settings.steps < bands:
        raise AsdmError(f"{settings.steps} sampling steps cannot be split into {bands} bands", "Use more steps.")
    report = progress or (lambda done, total: None)
    texts = encode(pipeline, prompts, settings.guidance)
    runs = _Sampler(pipeline, texts, settings)
    band_of = [i * bands // settings.steps for i in range(settings.steps)]
    chosen = torch.Generator().manual_seed(settings.seed + 1)
    picks = torch.stack(
        [
            torch.tensor([b for b in range(settings.steps) if band_of[b] == band])[
                torch.randint(band_of.count(band), (len(prompts),), generator=chosen)
            ]
            for band in range(bands)
        ]
    )
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    energy = torch.zeros(settings.steps, dtype=torch.float64)
    middle = {band_of.index(band) + band_of.count(band) // 2: band for band in range(bands)}
    middle = {} if band_weights is not None else middle
    saved: dict[int, _Sampler] = {}
    total = settings.steps + sum(settings.steps - step for step in middle)
    done = 0
    for step in range(settings.steps):
        if step in middle:
            saved[step] = runs.fork(min(len(prompts), 8))
        rows = (picks[band_of[step]] == step).nonzero()[:, 0]
        prediction, model_input = runs.advance()
        energy[step] = prediction.double().square().mean()
        if len(rows):
            when = runs.timesteps[step].expand(len(rows))
            kept.append((model_input[rows].clone(), when, texts[rows], torch.full((len(rows),), band_of[step])))
        report(done := done + 1, total)
    weights = torch.zeros(bands, dtype=torch.float64)
    for step, band in middle.items():
        gain, taken = _response(saved[step], runs.latents)
        weights[band] = gain * energy[step] * band_of.count(band)
        report(done := done + taken, total)
    samples, timesteps, triple_texts, triple_bands = (torch.cat(parts) for parts in zip(*kept, strict=True))
    triples = Triples(samples, timesteps, triple_texts, triple_bands, settings.guidance)
    return Calibration(triples, band_weights or tuple((weights / weights.sum()).tolist()))


def _response(sampler: _Sampler, undisturbed: Tensor) -> tuple[float, int]:
    """‖Δx_0‖² per ‖Δε‖² of a small random error in one step's prediction, and the steps that measuring took."""
    generator = torch.Generator().manual_seed(sampler.step)
    began = sampler.step
    scale = 0.0

    def disturb(prediction: Tensor) -> Tensor:
        nonlocal scale
        noise = torch.randn(prediction.shape, generator=generator).to(prediction)
        noise *= PERTURBATION * prediction.norm() / noise.norm()
        scale = float(noise.double().square().mean())
        return prediction + noise

    sampler.advance(disturb)
    while not sampler.finished:
        sampler.advance()
    moved = (sampler.latents - undisturbed[: len(sampler.latents)]).double().square().mean()
    return float(moved) / scale, sampler.step - began


class _Sampler:
    """A batch of sampling runs that can be stopped between steps and forked."""

    def __init__(self, pipeline: StableDiffusionPipeline, texts: Tensor, settings: SamplingSettings) -> None:
        self.unet, self.texts, self.guidance = pipeline.unet, texts, settings.guidance
        self.scheduler = copy.deepcopy(pipeline.scheduler)
        self.scheduler.set_timesteps(settings.steps, device=pipeline.device)
        if len(self.scheduler.timesteps) != settings.steps:
            raise AsdmError(
                f"{type(self.scheduler).__name__} visits {len(self.scheduler.timesteps)} timesteps in {settings.steps} "
                "steps",
                "Calibrate with a sampler of one evaluation per step, for example DPMSolverMultistepScheduler.",
            )
        self.timesteps: Tensor = self.scheduler.timesteps
        self.latents = initial_latents(pipeline, len(texts), settings) * self.scheduler.init_noise_sigma
        # Samplers that add noise draw it from here, so that a fork sees the same noise as its original.
        self.noise = torch.Generator(device="cpu").manual_seed(settings.seed + 2)
        self.takes_generator = "generator" in self.scheduler.step.__code__.co_varnames
        self.step = 0

    @property
    def finished(self) -> bool:
        return self.step == len(self.timesteps)

    def fork(self, rows: int) -> _Sampler:
        """A copy of the first `rows` runs at this moment."""
        twin = copy.copy(self)
        twin.scheduler = _first_rows(self.scheduler, rows, len(self.latents))
        twin.latents, twin.texts = self.latents[:rows].clone(), self.texts[:rows]
        twin.noise = torch.Generator(device="cpu")
        twin.noise.set_state(self.noise.get_state())
        return twin

    def advance(self, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take a step; the guided prediction (N, C, H, W), and the UNet's input before it was repeated per branch."""
        timestep = self.timesteps[self.step]
        model_input = self.scheduler.scale_model_input(self.latents, timestep)
        here = Triples(model_input, timestep.expand(len(model_input)), self.texts, model_input, self.guidance)
        prediction = here.guided(self.unet(*here.unet_inputs(), return_dict=False)[0])
        used = change(prediction) if change else prediction
        extra: dict[str, Any] = {"generator": self.noise} if self.takes_generator else {}
        self.latents = self.scheduler.step(used, timestep, self.latents, return_dict=False, **extra)[0]
        self.step += 1
        return prediction, model_input


def _first_rows(scheduler: Any, rows: int, batch: int) -> Any:
    """A copy of a scheduler whose remembered predictions hold only the first rows of the batch."""
    twin = copy.deepcopy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, Tensor) and value.ndim == 4 and len(value) == batch:
            setattr(twin, name, value[:rows])
        elif isinstance(value, list):
            cut = [v[:rows] if isinstance(v, Tensor) and v.ndim == 4 and len(v) == batch else v for v in value]
            setattr(twin, name, cut)
    return twin


def encode(pipeline: StableDiffusionPipeline, prompts: Sequence[str], guidance: float) -> Tensor:
    """Text embeddings (N, branches, tokens, width), the empty prompt first where there is guidance."""
    guided = guidance > 1
    with torch.no_grad():
        conditional, unconditional = pipeline.encode_prompt(list(prompts), pipeline.device, 1, guided)
    parts = [unconditional, conditional] if guided else [conditional]
    return torch.stack(parts, dim=1)


def initial_latents(pipeline: StableDiffusionPipeline, count: int, settings: SamplingSettings) -> Tensor:
    """Unit noise (count, C, H, W); image i has its own seed, so that it does not depend on the batch it is in."""
    config = pipeline.unet.config
    size = settings.image_size // pipeline.vae_scale_factor if settings.image_size else int(config["sample_size"])
    rows = [
        torch.randn(config["in_channels"], size, size, generator=torch.Generator().manual_seed(settings.seed + i))
        for i in range(count)
    ]
    return torch.stack(rows).to(pipeline.device, pipeline.unet.dtype)
