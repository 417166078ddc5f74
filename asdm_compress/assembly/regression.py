"""Ridge regression of convolution kernels from normal equations that are summed up patch by patch in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

# Shares of the mean diagonal of the patches' Gram matrix. The largest all but hold the weights where they are pulled.
RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
CONSTANT_RIDGE: Final = 1e-8  # share of the number of samples; keeps a constant without samples solvable
BYTES_PER_BLOCK: Final = 256 * 2**20  # of unfolded patches held at a time
SHARE_FOR_SUMS: Final = 0.3  # of the memory
SHARE_OF_CUDA: Final = 0.8  # of a GPU's memory: the rest is for weights
# Places of an image that are taken as samples: neighbours tell nearly the same, other prompts tell more.
PLACES: Final = 64
# Of Linux's control groups, the new and the old.
_CONTAINER_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_of(device: torch.device) -> int:
    """The bytes that a device has beside its weights, or the host for what is not CUDA.

    All there is, not what is free at the moment: what is fitted, and whether, should not hang on what else runs. Of a
    host's each of several processes that share the work there has its part.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * SHARE_OF_CUDA)
    return _host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _host_bytes() -> int:
    """Of the host, or of the container that this runs in, where that may take less."""
    whole = int(psutil.virtual_memory().total)
    for limit in _CONTAINER_LIMITS:
        try:
            said = limit.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if said.isdigit():  # `max` for none
            whole = min(whole, int(said))
    return whole


def memory_for_sums(device: torch.device) -> int:
    """The bytes that normal equations of a model on a device may take.

    With what solving them takes it is two and a half times that, and the rest is for what runs meanwhile.
    """
    return int(memory_of(device) * SHARE_FOR_SUMS)


class NormalEquations:
    """What a linear least-squares fit needs to know of its samples: P Pᵀ, P Yᵀ and ‖Y‖², however many there are.

    A sample is a k x k patch of the inputs (C k² values and a constant 1, F in all) with T target values; several
    targets may be fitted from the same patches.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        # Of the accelerators only CUDA is sure to have float64.
        self.device = device if device.type == "cuda" else torch.device("cpu")
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=self.device)
        self.cross = torch.zeros(features, targets, dtype=torch.float64, device=self.device)
        self.energy = torch.zeros(targets, dtype=torch.float64, device=self.device)

    def add(self, inputs: Tensor, targets: Tensor, kernel: int, weight: float = 1.0) -> None:
        """Take in `inputs` (N, C, H, W), zero-padded, and `targets` (N, T, H, W), each sample `weight` times.

        Of more than `PLACES` places as many are taken, drawn anew for every call.
        """
        every = inputs.shape[2] * inputs.shape[3]
        places: Tensor | None = None
        if every > PLACES:
            generator = torch.Generator().manual_seed(round(self.samples * 1e6) % 2**31)
            places = torch.randperm(every, generator=generator)[:PLACES].to(inputs.device)
        patch_bytes = 8 * kernel**2 * inputs[0].numel()
        rows = max(1, BYTES_PER_BLOCK // patch_bytes)
        for start in range(0, len(inputs), rows):
            x, y = inputs[start : start + rows].float(), targets[start : start + rows].float()
            patches, wanted = F.unfold(x, kernel, padding=kernel // 2), y.flatten(2)
            if places is not None:
                patches, wanted = patches[..., places], wanted[..., places]
            patches, wanted = (part.to(self.gram).transpose(0, 1).flatten(1) for part in (patches, wanted))
            patches = torch.cat([patches, patches.new_ones(1, patches.shape[1])])
            self.gram.addmm_(patches, patches.T, alpha=weight)
            self.cross.addmm_(patches, wanted.T, alpha=weight)
            self.energy += weight * wanted.square().sum(1)

    def plus(self, other: NormalEquations, weight: float = 1.0) -> NormalEquations:
        """These and `weight` times the other's."""
        return self._with(
            self.gram + weight * other.gram, self.cross + weight * other.cross, self.energy + weight * other.energy
        )

    def times(self, weight: float) -> NormalEquations:
        """These with every sample counted `weight` times."""
        return self._with(weight * self.gram, weight * self.cross, weight * self.energy)

    def centre(self, kernel: int) -> NormalEquations:
        """The equations of the patches' middle pixels alone: those of a 1 x 1 kernel."""
        features = len(self.gram) - 1
        keep = torch.tensor([*range(kernel**2 // 2, features, kernel**2), features], device=self.device)
        return self._with(self.gram[keep][:, keep], self.cross[keep], self.energy)

    def onto(self, keep: Tensor, weights: Tensor, constant: bool) -> NormalEquations:
        """The equations of giving what `weights` (C, T) give of all C values from those at `keep` (K,) alone.

        Without `constant` the fit's constant comes out as zero.
        """
        kept = torch.cat([keep, keep.new_tensor([len(self.gram) - 1])])
        given = self.gram[:, :-1] @ weights
        gram, cross = self.gram[kept][:, kept], given[kept]
        if not constant:
            gram[-1, :-1] = gram[:-1, -1] = cross[-1] = 0
        return self._with(gram, cross, (given[:-1] * weights).sum(0))

    def _with(self, gram: Tensor, cross: Tensor, energy: Tensor) -> NormalEquations:
        twin = object.__new__(NormalEquations)
        twin.device, twin.gram, twin.cross, twin.energy = self.device, gram, cross, energy
        return twin

    def solve(self, ridge: float, towards: Tensor | None = None) -> Tensor:
        """The weights (F, T) of least squared error, with `ridge` pulling all but the constant to `towards` or zero."""
        penalty = torch.full((len(self.gram),), ridge * self.scale, dtype=torch.float64, device=self.device)
        penalty[-1] = CONSTANT_RIDGE * max(self.samples, 1e-30)
        right = self.cross if towards is None else self.cross + penalty[:, None] * towards
        matrix = self.gram.clone()
        matrix.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(matrix)
        return torch.cholesky_solve(right, factor)

    @property
    def samples(self) -> float:
        """How many patches there are, or what they weigh together."""
        return float(self.gram[-1, -1])

    @property
    def scale(self) -> float:
        """The mean diagonal of the Gram matrix, without the constant's."""
        return max(float(self.gram.diagonal()[:-1].mean()), 1e-30)

    def error(self, weights: Tensor) -> Tensor:
        """The summed squared error (T,) of any weights (F, T)."""
        fitted = ((self.gram @ weights) * weights).sum(0)
        return self.energy - 2 * (self.cross * weights).sum(0) + fitted


def best_ridges(errors_at: Callable[[float], Sequence[float]], groups: int) -> list[int]:
    """The number, in `RIDGES`, of the ridge of least error for each group of targets.

    From the middle on, towards both ends for as long as the error of any group falls: it has one valley.
    """
    middle = len(RIDGES) // 2
    known = {middle: errors_at(RIDGES[middle])}
    for direction in (1, -1):
        at = middle + direction
        while 0 <= at < len(RIDGES):
            known[at] = errors_at(RIDGES[at])
            if all(new >= old for new, old in zip(known[at], known[at - direction], strict=True)):
                break
            at += direction
    return [min(sorted(known), key=lambda at: known[at][group]) for group in range(groups)]


def solve_at_best_ridge(
    train: Sequence[NormalEquations],
    held_out: Sequence[NormalEquations],
    targets: Sequence[slice],
    towards: Tensor | None = None,
) -> list[Tensor]:
    """The weights (F, T) of several fits from all samples together.

    Each group of `targets` has the one ridge for all the fits that had the least error on held-out samples when the
    others were fitted; where no fit has both kinds of samples, the strongest one.
    """
    told = [(t, h) for t, h in zip(train, held_out, strict=True) if t.samples > 0 and h.samples > 0]

    def errors_at(ridge: float) -> list[float]:
        errors = torch.stack([h.error(t.solve(ridge, towards)) for t, h in told]).sum(0)
        return [float(errors[group].sum()) for group in targets]

    best = best_ridges(errors_at, len(targets)) if told else [len(RIDGES) - 1] * len(targets)
    solved = []
    for t, h in zip(train, held_out, strict=True):
        both = t.plus(h)
        by_ridge = {i: both.solve(RIDGES[i], towards) for i in set(best)}
        solved.append(torch.cat([by_ridge[i][:, group] for i, group in zip(best, targets, strict=True)], dim=1))
    return solved
