"""The closed-form start of slot convolutions: ridge regression on what the removed modules took in and gave out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from asdm_compress.assembly.calibration import HELD_OUT_EVERY, Calibration
from asdm_compress.assembly.regression import NormalEquations, solve_at_best_ridge
from asdm_compress.core.edits import ConvSpec
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.expert_conv import TRAIN_TIMESTEPS, MultiExpertConv2d
from asdm_compress.models.walk import State, Step, joined

FEWEST_PROMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class BandSums:
    """The normal equations of one slot, once for the fit's prompts and once for the others.

    The timestep bands share `groups` sums, as many as the slot has experts that own an interval each. A band counts as
    much as an error in it matters, whatever its number of samples.
    """

    train: Sequence[NormalEquations]
    held_out: Sequence[NormalEquations]
    kernel: int

    @staticmethod
    def empty(groups: int, channels: int, targets: int, kernel: int, device: torch.device) -> BandSums:
        """Sums without samples; `targets` is the number of output channels, of all modules fitted together."""
        features = channels * kernel**2 + 1
        both = [[NormalEquations(features, targets, device) for _ in range(groups)] for _ in range(2)]
        return BandSums(both[0], both[1], kernel)

    @staticmethod
    def bytes(groups: int, channels: int, targets: int, kernel: int) -> int:
        """The memory that the sums take."""
        features = channels * kernel**2 + 1
        return 2 * groups * 8 * features * (features + targets)

    def add(self, calibration: Calibration, first: int, inputs: Tensor, targets: Tensor) -> None:
        """Take in the activations of the triples from `first` on; a triple has one row per guidance branch.

        See `samples_of` for what becomes of them.
        """
        weights = band_sample_weights(calibration)
        for held_out, band, x, y in samples_of(calibration, first, inputs, targets):
            group = band * len(self.train) // len(weights)
            (self.held_out if held_out else self.train)[group].add(x, y, self.kernel, weights[band])

    def centre(self) -> BandSums:
        """The sums of a 1 x 1 kernel."""
        return BandSums([s.centre(self.kernel) for s in self.train], [s.centre(self.kernel) for s in self.held_out], 1)

    def gram(self, group: int) -> Tensor:
        """The patches' Gram matrix of a group, over all prompts."""
        return self.train[group].gram + self.held_out[group].gram

    def together(self, experts: int) -> BandSums:
        """The sums of fewer groups."""
        have = len(self.train)
        groups = [[i for i in range(have) if i * experts // have == e] for e in range(experts)]
        train, held_out = ([_sum([p[i] for i in g]) for g in groups] for p in (self.train, self.held_out))
        return BandSums(train, held_out, self.kernel)


def band_sample_weights(calibration: Calibration) -> list[float]:
    """What each sample of a band counts, at most 1."""
    counts = calibration.bands.bincount(minlength=len(calibration.band_weights)).tolist()
    weights = [w / max(n, 1) for w, n in zip(calibration.band_weights, counts, strict=True)]
    return [w / max(weights) for w in weights]


def groups_of(spec: ConvSpec) -> int:
    """How many sums a convolution's fit needs: one for every expert with an interval of its own."""
    return spec.experts if spec.needs_timestep else 1


def samples_of(
    calibration: Calibration, first: int, inputs: Tensor, targets: Tensor
) -> Iterator[tuple[bool, int, Tensor, Tensor]]:
    """The activations (R, …) of the triples from `first` on: whether held out, band, inputs, targets.

    A triple has one row per guidance branch. Of two branches their guided combination is a third sample: the error that
    a sampler sees is a fit's error on it, as far as what follows is linear.
    """
    branches, guidance = calibration.inputs.texts.shape[1], calibration.inputs.guidance
    if branches == 2:
        inputs, targets = (torch.cat([x, _guided(x, guidance)[:, None]], 1) for x in _split(inputs, targets))
    else:
        inputs, targets = inputs[:, None], targets[:, None]
    triples = torch.arange(first, first + len(inputs))
    enough = int(calibration.prompts.max()) >= HELD_OUT_EVERY - 1
    who = calibration.prompts[triples] if enough else triples
    held_out = who % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    for is_held_out, of_this in ((False, ~held_out), (True, held_out)):
        for band in sorted(set(calibration.bands[triples][of_this].tolist())):
            rows = of_this & (calibration.bands[triples] == band)
            yield is_held_out, band, inputs[rows].flatten(0, 1), targets[rows].flatten(0, 1)


def check_finite(sums: Sequence[NormalEquations]) -> None:
    """Raise AsdmError where activations were no numbers."""
    if not all(bool(part.gram.isfinite().all() and part.cross.isfinite().all()) for part in sums):
        raise AsdmError(
            "activations of the model are not finite numbers, nothing can be fitted to them",
            "Does the model overflow in this dtype? Try --dtype fp32.",
        )


def _split(*activations: Tensor) -> tuple[Tensor, ...]:
    """(2 N, …) with the branches in turns to (N, 2, …)."""
    return tuple(x.reshape(len(x) // 2, 2, *x.shape[1:]) for x in activations)


def _guided(both: Tensor, guidance: float) -> Tensor:
    return both[:, 0] + guidance * (both[:, 1] - both[:, 0])


def slot_activations(step: Step, module: Any, state: State, output: Tensor) -> tuple[Tensor, Tensor]:
    """What a slot's convolution takes in, (R, C_in, H, W), and what it should give, (R, C_out, H, W).

    `state` is the one before the step, `module` the teacher's there, `output` the hidden state that the teacher had
    behind everything that the slot stands for.
    """
    hidden = state.hidden
    shortcut = getattr(module, "conv_shortcut", None)
    if step.kind == "decoder-resnet":
        hidden = joined(step, hidden, state.skips[-1])
    if step.kind == "downsampler":
        hidden = F.avg_pool2d(hidden, 2, ceil_mode=True)
    if step.kind == "upsampler":
        # Interpolation repeats every pixel: the least squared error to a patch is that to its mean.
        output = F.interpolate(output, size=hidden.shape[2:], mode="area")
    around = hidden if shortcut is None else shortcut(hidden) / module.output_scale_factor
    # In half precision the differences that guidance amplifies would be rounding noise.
    return hidden.float(), output.float() - around.float()


def check_fits(specs: Sequence[ConvSpec], bands: int) -> None:
    """Raise AsdmError for convolutions that have no closed form: whose experts do not own a timestep band each."""
    for spec in specs:
        if spec.needs_timestep and spec.experts > bands:
            raise AsdmError(
                f"{spec.experts} experts cannot be fitted on {bands} timestep bands",
                f"Use --bands {spec.experts} or more, or --experts {bands} or fewer.",
            )
        if spec.experts > 1 and (spec.mixing != "softmax" or spec.temperature != 1):
            raise AsdmError(
                f"{spec.name} cannot be fitted: its experts do not add up to one kernel per timestep",
                "Fit a softmax of temperature 1, or start from zero and train.",
            )


def check_prompts(count: int, instead: str = "--slot none --narrow none --refit none") -> None:
    """Raise AsdmError for too few prompts to fit on some and measure on others; `instead` are options without a fit."""
    if count < FEWEST_PROMPTS:
        raise AsdmError(
            f"{count} calibration prompts are too few to fit convolutions on some and measure them on others",
            f"Use --calibration-prompts {FEWEST_PROMPTS} or more (with --prompts, a file that has more), or {instead}.",
        )


class SlotFits:
    """The fits of every convolution that may stand in one slot, from one set of sums.

    `targets` are the channels, among the sums' targets, of each span of modules that a convolution may stand for, one
    behind the other.
    """

    def __init__(self, sums: BandSums, calibration: Calibration, module: Any, targets: Sequence[slice]) -> None:
        self.calibration, self.module, self.targets = calibration, module, targets
        self._sums = {sums.kernel: sums}
        if sums.kernel > 1:
            self._sums[1] = sums.centre()
        self._solved: dict[tuple[int, int], list[Tensor]] = {}

    @torch.no_grad()
    def state(self, spec: ConvSpec, target: int = 0) -> dict[str, Tensor]:
        """The state of the convolution `spec` for the span number `target`.

        Time-routed experts are the fits of the timestep bands, each pulled towards the fit of all bands together by a
        ridge that held-out prompts choose. Feature-routed experts start equal.
        """
        experts = groups_of(spec)
        columns = self.targets[target]
        solutions = [weights[:, columns] for weights in self._solve(spec.kernel, experts)]
        if len(solutions) < spec.experts:
            solutions *= spec.experts
        channels = (len(solutions[0]) - 1) // spec.kernel**2
        layer = MultiExpertConv2d(channels, solutions[0].shape[1], spec)
        is_dense = spec.rank is None and not spec.separable
        of_experts = None if is_dense else self._sums[spec.kernel].together(experts)
        of_all = None if is_dense else self._sums[spec.kernel].together(1).gram(0)
        shortcut = getattr(self.module, "conv_shortcut", None)
        for expert, solution in enumerate(solutions):
            gram = None if of_experts is None else of_experts.gram(expert % experts)
            if gram is not None and gram[-1, -1] == 0:  # no moments there, for which it has the weights of all bands
                gram = of_all
            kernels, bias = _kernels(solution, spec, channels, gram)
            if is_dense and shortcut is not None:
                middle, scale = spec.kernel // 2, self.module.output_scale_factor
                kernels[0][:, :, middle, middle] += shortcut.weight[:, :, 0, 0].to(bias) / scale
                bias = bias + shortcut.bias.to(bias) / scale
            for weight, kernel in zip(layer.weights, kernels, strict=True):
                weight[expert] = kernel.to(weight)
            layer.bias[expert] = bias.to(layer.bias)
        if layer.time_router is not None:
            layer.time_router.boundaries.copy_(_expert_boundaries(self.calibration, spec.experts))
        if layer.feature_router is not None:
            torch.nn.init.zeros_(layer.feature_router.weight)
            torch.nn.init.zeros_(layer.feature_router.bias)
        return layer.state_dict()

    def _solve(self, kernel: int, experts: int) -> list[Tensor]:
        """The weights (F, T) of every expert; solved once. Raises AsdmError for activations that are no numbers."""
        if (kernel, experts) not in self._solved:
            sums = self._sums[kernel].together(experts)
            check_finite([*sums.train, *sums.held_out])
            towards = self._solve(kernel, 1)[0] if experts > 1 else None
            self._solved[kernel, experts] = solve_at_best_ridge(sums.train, sums.held_out, self.targets, towards)
        return self._solved[kernel, experts]


def _sum(parts: Sequence[NormalEquations]) -> NormalEquations:
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return total


def _kernels(solution: Tensor, spec: ConvSpec, channels: int, gram: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """A solution (F, T) as the kernels of a spec, and its bias; factorised ones by the Gram matrix of its patches.

    What a factorised kernel cannot express is left out where the inputs vary least; its mean goes into the bias.
    """
    k, weights, bias = spec.kernel, solution[:-1], solution[-1]
    dense = weights.T.reshape(-1, channels, k, k)
    if gram is None:
        return [dense.clone()], bias
    mean = gram[:-1, -1] / gram[-1, -1]
    spread = gram[:-1, :-1] - torch.outer(mean, gram[-1, :-1])
    if spec.rank is not None:
        # Reduced-rank regression: the outputs' leading directions under the inputs' own statistics.
        directions = torch.linalg.eigh(weights.T @ spread @ weights).eigenvectors[:, -spec.rank :]
        if directions.shape[1] < spec.rank:
            raise AsdmError(f"rank {spec.rank} is more than the slot's {directions.shape[1]} output channels")
        first = directions.T @ weights.T
        reduced = first.T @ directions.T
        return [first.reshape(-1, channels, k, k), directions[:, :, None, None]], bias + mean @ (weights - reduced)
    # Per input channel the best single pattern for all its outputs, then the best mix of these patterns.
    per_input = dense.flatten(2).transpose(0, 1)  # (C_in, C_out, k k)
    patterns = torch.linalg.svd(per_input, full_matrices=False).Vh[:, 0]
    expand = torch.zeros(channels, k * k, channels, dtype=solution.dtype, device=solution.device)
    index = torch.arange(channels, device=solution.device)
    expand[index, :, index] = patterns
    expand = expand.flatten(0, 1)  # (C_in k k, C_in)
    inner = expand.T @ spread @ expand
    inner += 1e-6 * inner.diagonal().mean() * torch.eye(channels, dtype=inner.dtype, device=inner.device)
    mix = torch.linalg.solve(inner, expand.T @ spread @ weights)
    reduced = expand @ mix
    return [patterns.reshape(channels, 1, k, k), mix.T[:, :, None, None]], bias + mean @ (weights - reduced)


def _expert_boundaries(calibration: Calibration, experts: int) -> Tensor:
    """The experts' borders on the time axis, as shares of the training steps."""
    bands = len(calibration.band_weights)
    borders = [
        calibration.boundaries[band - 1]
        for band in range(1, bands)
        if band * experts // bands != (band - 1) * experts // bands
    ]
    return torch.tensor(borders) / TRAIN_TIMESTEPS
