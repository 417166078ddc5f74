"""Local search on a plan: edits exchanged for others, one or two at a time, while the damage with all pairs falls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

CANDIDATES: Final = 60  # edits tried in twos
LEAST_GAIN: Final = 1e-9  # share of the summed damages; less is rounding
MOST_EXCHANGES: Final = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """What a choice x ∈ {0, 1}ⁿ is worth, d·x + xᵀPx / 2, and when it is allowed.

    `damages` d is (n,); `pairs` P (n, n), symmetric with a zero diagonal; `overlaps` (n, n) says which exclude each
    other; `savings` (limits, n) must reach `missing` (limits,).
    """

    damages: np.ndarray
    pairs: np.ndarray
    overlaps: np.ndarray
    savings: np.ndarray
    missing: np.ndarray

    def damage(self, chosen: Sequence[int]) -> float:
        """The damage of the edits with these numbers."""
        picked = list(chosen)
        return float(self.damages[picked].sum() + self.pairs[np.ix_(picked, picked)].sum() / 2)


def polish(problem: Problem, chosen: Sequence[int]) -> tuple[int, ...]:
    """The choice at which no exchange lowers the damage any more; `chosen` must be allowed."""
    current = set(chosen)
    for _ in range(MOST_EXCHANGES):
        least = -LEAST_GAIN * float(problem.damages[sorted(current)].sum())
        best: tuple[set[int], set[int]] | None = None
        for change, out, into in _exchanges(problem, current):
            if change < least:
                least, best = change, (out, into)
        if best is None:
            break
        current = (current - best[0]) | best[1]
    return tuple(sorted(current))


def _exchanges(problem: Problem, current: set[int]) -> Iterator[tuple[float, set[int], set[int]]]:
    """The change of damage of the best allowed exchange of each kind: what goes, and what comes."""
    inside = np.array(sorted(current), dtype=int)
    outside = np.array([i for i in range(len(problem.damages)) if i not in current], dtype=int)
    slope = problem.damages + problem.pairs[:, inside].sum(1)
    going: list[tuple[int, ...]] = [(), *((int(i),) for i in inside)]
    going += [(int(a), int(b)) for k, a in enumerate(inside) for b in inside[k + 1 :]]
    for out in going:
        rest = np.array([i for i in inside if i not in out], dtype=int)
        gone = list(out)
        change = -slope[gone].sum() + problem.pairs[np.ix_(gone, gone)].sum() / 2
        spare = problem.savings[:, rest].sum(1) - problem.missing
        if (spare >= 0).all():
            yield float(change), set(out), set()
        free = outside[~problem.overlaps[np.ix_(outside, rest)].any(1)]
        coming = slope[free] - problem.pairs[np.ix_(free, gone)].sum(1)
        allowed = (spare[:, None] + problem.savings[:, free] >= 0).all(0)
        if allowed.any():
            at = int(np.where(allowed, coming, np.inf).argmin())
            yield float(change + coming[at]), set(out), {int(free[at])}
        if len(out) < 2:
            yield from _in_twos(problem, free, coming, spare, float(change), set(out))


def _in_twos(
    problem: Problem, free: np.ndarray, coming: np.ndarray, spare: np.ndarray, change: float, out: set[int]
) -> Iterator[tuple[float, set[int], set[int]]]:
    few: Any = np.argsort(coming)[:CANDIDATES]
    free, coming = free[few], coming[few]
    if len(free) < 2:
        return
    both = coming[:, None] + coming[None, :] + problem.pairs[np.ix_(free, free)]
    saved = problem.savings[:, free]
    allowed = (spare[:, None, None] + saved[:, :, None] + saved[:, None, :] >= 0).all(0)
    allowed &= ~problem.overlaps[np.ix_(free, free)] & ~np.eye(len(free), dtype=bool)
    if allowed.any():
        a, b = np.unravel_index(int(np.where(allowed, both, np.inf).argmin()), both.shape)
        yield change + float(both[a, b]), out, {int(free[a]), int(free[b])}
