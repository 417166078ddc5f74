"""Calibration triples (x_t, t, text) from the teacher's own sampling trajectories, and how much each moment matters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.core.defaults import BANDS, MOMENTS, PROBES
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.models.precision import true_fp32
from asdm_compress.sampling.run import GuidedInputs, SamplingRun
from asdm_compress.sampling.settings import SamplingSettings, check_text_to_image, encode

DEFAULT_BANDS: Final = BANDS
PERTURBATION: Final = 0.05  # of the noise prediction's norm, when the sampler's response is measured
ONE_IN: Final = 6  # prompts is kept out of fits
FEW: Final = 12  # prompts, of fewer of which it is one in three
ONE_IN_FEW: Final = 3
HELD_OUT_EVERY: Final = 4  # every fourth prompt of a fit chooses its ridge
TOGETHER: Final = 16  # prompts that are sampled at once: bounds the memory
# Moments that every option is fitted and measured on, and every plan that is tried, where something is fitted.
OPTION_FITTED: Final = 192
OPTION_MEASURED: Final = 96
PLAN_MOMENTS: Final = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is recorded: about so many `moments`, at least one per prompt, at most one per prompt and band.

    `probes` are the runs whose response to an error says how much each band matters.
    """

    moments: int = MOMENTS
    probes: int = PROBES


THOROUGH: Final = Effort()


@dataclass(frozen=True, slots=True)
class Calibration:
    """N moments of sampling runs: `inputs`, and of each the band, (N,), from 0 (most noise) on, and the prompt, (N,).

    A band's weight is the share of the final latent's error that an equal relative error there causes. `boundaries` are
    the timesteps half-way between the last step of a band and the first of the next. `held_out` is whether damages are
    measured on other moments than what is fitted: without a fit that would only measure on fewer.
    """

    inputs: GuidedInputs
    bands: Tensor
    prompts: Tensor
    band_weights: tuple[float, ...]
    boundaries: tuple[float, ...]
    held_out: bool = True

    def __len__(self) -> int:
        return len(self.bands)

    def part(self, start: int, stop: int) -> GuidedInputs:
        """The inputs from `start` to before `stop`."""
        rows, i = slice(start, stop), self.inputs
        return GuidedInputs(i.samples[rows], i.timesteps[rows], i.texts[rows], i.guidance)

    def parts(self) -> tuple[Calibration, Calibration]:
        """The moments to fit on, and those of other prompts to measure on; of under three prompts, all for both.

        One prompt in six is measured on, of few prompts one in three, and all where none are to be held out.
        """
        return self._without_one_in(ONE_IN)

    def for_options(self) -> tuple[Calibration, Calibration]:
        """The same for single edits, of which there are many: thinned."""
        fitted, measured = self.parts()
        if fitted is measured:
            return self, self
        return fitted.thinned(OPTION_FITTED), measured.thinned(OPTION_MEASURED)

    def for_plans(self) -> tuple[Calibration, Calibration]:
        """The same for whole plans, of which the best is picked: of many prompts every second is measured on.

        A few prompts make up most of a damage, and the least of many damages on few prompts is too good to be true,
        while a fit loses little by having fewer moments, if they are of as many prompts. Both are thinned.
        """
        fitted, measured = self._without_one_in(2)
        if fitted is measured:
            return self, self
        return fitted.thinned(PLAN_MOMENTS), measured.thinned(PLAN_MOMENTS)

    def _without_one_in(self, share: int) -> tuple[Calibration, Calibration]:
        if not self.held_out:
            return self, self
        every = share if int(self.prompts.max()) >= FEW - 1 else ONE_IN_FEW
        measured = self.prompts % every == every - 1
        if not measured.any():
            return self, self
        return self.only(~measured), self.only(measured)

    def bands_without_moments(self) -> list[int]:
        """Those in which nothing can be measured."""
        there = set(self.bands.tolist())
        return [band for band in range(len(self.band_weights)) if band not in there]

    def thinned(self, moments: int) -> Calibration:
        """At most so many of the moments: evenly over prompts, of some none where there are more, and over bands as all
        are, among the prompts that choose a fit's ridge too.
        """
        if len(self) <= moments:
            return self
        prompts = int(self.prompts.max()) + 1
        chosen = torch.zeros(len(self), dtype=torch.bool)
        generator, shares, number = torch.Generator().manual_seed(0), _shares(self.band_weights), 0
        taken_by = torch.zeros(HELD_OUT_EVERY, len(shares))
        for prompt in range(prompts):
            keep = (prompt + 1) * moments // prompts - prompt * moments // prompts
            rows, taken = (self.prompts == prompt).nonzero()[:, 0], taken_by[number % HELD_OUT_EVERY]
            # At random between bands alike: in turns they would go with the prompts' own.
            order = ((taken + torch.rand(len(shares), generator=generator) / 2) / shares)[self.bands[rows]].argsort()
            kept = rows[order[:keep]]
            chosen[kept] = True
            taken += self.bands[kept].bincount(minlength=len(shares))
            number += keep > 0
        return self.only(chosen)

    def only(self, chosen: Tensor) -> Calibration:
        """The moments of a mask (N,)."""
        i, rows = self.inputs, chosen.to(self.inputs.samples.device)
        inputs = GuidedInputs(i.samples[rows], i.timesteps[rows], i.texts[rows], i.guidance)
        # Prompts are numbered anew, so that what holds some of them out finds them evenly spread.
        numbers = {prompt: i for i, prompt in enumerate(sorted(set(self.prompts[chosen].tolist())))}
        prompts = torch.tensor([numbers[prompt] for prompt in self.prompts[chosen].tolist()])
        return replace(self, inputs=inputs, bands=self.bands[chosen], prompts=prompts)

    def to(self, device: torch.device) -> Calibration:
        """The same with the inputs on another device."""
        i = self.inputs
        moved = GuidedInputs(i.samples.to(device), i.timesteps.to(device), i.texts.to(device), i.guidance)
        return replace(self, inputs=moved)


def check_bands(steps: int, bands: int) -> None:
    """Raise AsdmError where there are fewer steps than bands."""
    if steps < bands:
        raise AsdmError(f"{steps} sampling steps cannot be split into {bands} timestep bands", "Use more steps.")


@torch.no_grad()
@true_fp32()
def record(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    bands: int = DEFAULT_BANDS,
    progress: Progress | None = None,
    band_weights: tuple[float, ...] | None = None,
    effort: Effort = THOROUGH,
    processes: Processes = ALONE,
) -> Calibration:
    """Run the sampler on the prompts and keep moments, at most one per prompt and band.

    The bands' weights are measured (see `measure_band_weights`) unless they are known and given. Several processes
    share the prompts, `TOGETHER` at a time, and each has the whole result, that of one. Raises AsdmError
    without prompts, with fewer steps than bands, and for a scheduler that calls the UNet more than once per step.
    """
    if not prompts:
        raise AsdmError("calibration needs at least one prompt")
    check_bands(settings.steps, bands)
    check_text_to_image(pipeline)
    report = progress or (lambda done, total: None)
    probed = processes.share(_middles(settings.steps, bands))
    probing_steps = 0 if band_weights is not None else _steps_from(probed, settings.steps)
    starts = processes.share(range(0, len(prompts), TOGETHER))
    total = len(starts) * settings.steps + probing_steps
    texts = encode(pipeline, prompts, settings.guidance).to(pipeline.unet.dtype)
    if band_weights is None:

        def probing(taken: int, _: int) -> None:
            report(taken, total)

        band_weights = measure_band_weights(pipeline, texts[: effort.probes], settings, bands, probing, processes)
    picks = _pick_steps(len(prompts), settings, band_weights, effort.moments)
    kept: dict[int, list[tuple[Tensor, ...]]] = {}
    for number, start in enumerate(starts):
        here = slice(start, start + TOGETHER)
        run = SamplingRun(pipeline, texts[here], replace(settings, seed=settings.seed + start))
        for step in range(settings.steps):
            _, model_input = run.advance()
            rows = (picks[:, here] == step).any(dim=0).nonzero()[:, 0]
            when = run.timesteps[step].expand(len(rows))
            at = torch.full((len(rows),), step)
            moments = (model_input[rows].clone(), when, texts[here][rows], at, start + rows)
            kept.setdefault(start, []).append(moments if processes.count == 1 else tuple(x.cpu() for x in moments))
            report(probing_steps + number * settings.steps + step + 1, total)
    everything = {start: parts for share in processes.gather(kept) for start, parts in share.items()}
    in_order = [part for start in sorted(everything) for part in everything[start]]
    samples, timesteps, kept_texts, steps, kept_prompts = (torch.cat(parts) for parts in zip(*in_order, strict=True))
    # Moments of one time lie side by side, for convolutions that are routed by it.
    order = torch.argsort(steps, stable=True)
    samples, timesteps, kept_texts, kept_prompts = (
        x[order.to(x.device)] for x in (samples, timesteps, kept_texts, kept_prompts)
    )
    kept_bands = steps[order] * bands // settings.steps
    inputs = GuidedInputs(samples, timesteps, kept_texts, settings.guidance)
    schedule = SamplingRun(pipeline, texts[:1], settings).timesteps
    found = Calibration(inputs, kept_bands, kept_prompts, band_weights, _boundaries(schedule, bands))
    return found.to(pipeline.device)


@torch.no_grad()
def measure_band_weights(
    pipeline: StableDiffusionPipeline,
    texts: Tensor,
    settings: SamplingSettings,
    bands: int,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> tuple[float, ...]:
    """How much an equal relative error of the prediction in each band moves the final latent; sums to 1.

    In the middle of every band a small random error is put into one step of a fork of the run, and both are run to the
    end: ‖Δx_0‖² per ‖Δε‖², the median over the runs (single runs can jump to another picture), times the prediction's
    energy and the band's number of steps. Always in fp32: in half precision, rounding alone moves the end as far.
    Several processes share the forks.
    """
    exact = pipeline.unet if pipeline.unet.dtype == torch.float32 else copy.deepcopy(pipeline.unet).float()
    report = progress or (lambda done, total: None)
    run = SamplingRun(pipeline, texts, settings, exact)
    middles = processes.share(_middles(settings.steps, bands))
    total = settings.steps + sum(settings.steps - step for step in middles)
    forks: list[tuple[SamplingRun, Tensor]] = []
    energy: list[float] = []
    done = 0
    for step in range(settings.steps):
        fork = run.fork() if step in middles else None
        prediction, _ = run.advance()
        energy.append(float(prediction.double().square().mean()))
        if fork is not None:
            noise = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(step)).to(prediction)
            forks.append((fork, noise * PERTURBATION * energy[-1] ** 0.5))
        report(done := done + 1, total)
    gains: dict[int, float] = {}
    for fork, error in forks:
        step = fork.step
        band = step * bands // settings.steps
        fork.advance(error.add)
        while not fork.finished:
            fork.advance()
        moved = (fork.latents - run.latents).double().square().mean(dim=(1, 2, 3))
        gain = float((moved / error.double().square().mean(dim=(1, 2, 3))).median())
        steps_in_band = sum(i * bands // settings.steps == band for i in range(settings.steps))
        gains[band] = gain * energy[step] * steps_in_band
        report(done := done + settings.steps - step, total)
    together = {band: gain for share in processes.gather(gains) for band, gain in share.items()}
    weights = [together[band] for band in range(bands)]
    return tuple(weight / sum(weights) for weight in weights)


def _boundaries(timesteps: Tensor, bands: int) -> tuple[float, ...]:
    steps = [float(t) for t in timesteps]
    band_of = [i * bands // len(steps) for i in range(len(steps))]
    return tuple((a + b) / 2 for a, b, i, j in zip(steps, steps[1:], band_of, band_of[1:], strict=False) if i != j)


def _middles(steps: int, bands: int) -> list[int]:
    """The middle step of every band."""
    in_band = [[i for i in range(steps) if i * bands // steps == band] for band in range(bands)]
    return [members[len(members) // 2] for members in in_band]


def probe_steps(steps: int, bands: int) -> int:
    """How often `measure_band_weights` runs the UNet for an image: a whole run, and one from each band's middle."""
    return _steps_from(_middles(steps, bands), steps)


def _steps_from(middles: Sequence[int], steps: int) -> int:
    return steps + sum(steps - step for step in middles)


def _pick_steps(count: int, settings: SamplingSettings, weights: Sequence[float], moments: int) -> Tensor:
    """For every band and prompt a random step of the band, or -1 where the prompt has no moment in it, (bands, count).

    Few moments of many prompts tell more than many moments of few: those of one run look alike. They are spread over
    the bands (see `_shares`) among the prompts that are kept out of fits too (see `Calibration.for_options`).
    """
    generator = torch.Generator().manual_seed(settings.seed + 1)
    bands, picks = len(weights), []
    for band in range(bands):
        members = torch.tensor([i for i in range(settings.steps) if i * bands // settings.steps == band])
        picks.append(members[torch.randint(len(members), (count,), generator=generator)])
    steps = torch.stack(picks)
    each = min(bands, -(-moments // count))
    apart, shares = ONE_IN if count >= FEW else ONE_IN_FEW, _shares(weights)
    taken_by = torch.zeros(apart, bands)
    for prompt in range(count):
        taken = taken_by[prompt % apart]
        order = ((taken + torch.rand(bands, generator=generator) / 2) / shares).argsort()  # the least taken first
        taken[order[:each]] += 1
        steps[order[each:], prompt] = -1
    return steps


def _shares(weights: Sequence[float]) -> Tensor:
    """The share of the moments that every band is given, (bands,): half of them evenly, half as errors there matter.

    What a total damage is off by, and what a fit for it is, goes mostly by the moments of the bands that weigh most.
    """
    return (torch.tensor(weights) + 1 / len(weights)) / 2
