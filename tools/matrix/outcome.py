"""What a check finds, and when that counts as working."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from matrix.subjects import Subject

ROUNDING = 1e-4  # of values of the order of one, where only the order of sums differs
LEAST_EFFECT = 1e-3


@dataclass(frozen=True, slots=True)
class Outcome:
    """The largest difference from the oracle (None where there is none, only a run); whether it is a share of the
    oracle's norm; what the thing checked changed at all; and what else is to be said."""

    difference: float | None = None
    relative: bool = False
    effect: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One row: what is put beside or around the UNet, and the largest difference with which that works."""

    name: str
    run: Callable[[Subject], Outcome]
    tolerance: float = ROUNDING

    @property
    def oracle(self) -> str:
        """The check's own words."""
        function = self.run.func if isinstance(self.run, partial) else self.run
        return inspect.getdoc(function) or ""

    def works(self, outcome: Outcome) -> bool:
        """Whether the difference is small, and what is checked did something."""
        close = outcome.difference is None or outcome.difference <= self.tolerance
        return close and (outcome.effect is None or outcome.effect >= LEAST_EFFECT)


def largest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference."""
    assert one.shape == other.shape and one.isfinite().all(), "another shape, or no numbers"
    return float((one.double() - other.double()).abs().max())


def against(subject: Subject, found: Tensor, expected: Tensor) -> float | None:
    """The largest difference from what the edited teacher gives; of the teacher itself that says nothing."""
    return None if subject.is_teacher else largest(found, expected)


def share(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the expected one's."""
    assert found.shape == expected.shape and found.isfinite().all(), "another shape, or no numbers"
    return float((found.float() - expected.float()).norm() / expected.float().norm())
