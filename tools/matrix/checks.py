"""The matrix's rows, in the order in which it shows them."""

from __future__ import annotations

from matrix import companions, pipelines, runtimes
from matrix.outcome import Check

CHECKS: tuple[Check, ...] = (*companions.CHECKS, *pipelines.CHECKS, *runtimes.CHECKS)
