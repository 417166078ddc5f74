"""Planned costs: the MACs of every program and step, from the counts of the modules that are left to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from asdm_compress.inheritance.corrections import Correction, CorrectionKey, correction_macs
from asdm_compress.inheritance.program import Program
from asdm_compress.inheritance.run_plan import RunPlan
from asdm_compress.inheritance.shapes import Shape
from asdm_compress.profiling.counting import MacCount, ModuleCounts

CountsOf = Callable[[str | None, bool], ModuleCounts]
_TIME = ("time_embedding",)


def program_macs(program: Program, counts: ModuleCounts) -> int:
    """Multiply-accumulate operations of one pass, for the rows and sizes that `counts` were made for.

    Fitted corrections are not in it; `fitted_macs` has theirs.
    """
    if not program.computes:
        return 0
    paths = [*_TIME, *(path for op in program.ops for path in op.priced)]
    return sum(_of(counts.macs, path).total for path in paths)


def run_macs(plan: RunPlan, counts: CountsOf) -> tuple[int, ...]:
    """The MACs of every step.

    `counts` has those of one whole pass of a member (None: the body), with all rows, or with half of them where a step
    leaves the unconditional branch out.
    """
    return tuple(program_macs(s.program, counts(s.action.member, s.conditional_only)) for s in plan.steps)


def counts_alike(all_rows: ModuleCounts, half_of_them: ModuleCounts | None = None) -> CountsOf:
    """For a UNet without members, and of runs without conditional steps without the half."""

    def counts(member: str | None, conditional_only: bool) -> ModuleCounts:
        assert member is None, f"nobody has counted the member {member}"
        assert not conditional_only or half_of_them is not None, "conditional steps need the counts of half the rows"
        return half_of_them if conditional_only and half_of_them is not None else all_rows

    return counts


def fitted_macs(
    plan: RunPlan, corrections: Mapping[CorrectionKey, Correction], shapes: Mapping[str, Shape], rows: int
) -> tuple[int, ...]:
    """The MACs of the fitted corrections at every step of a run of `rows` rows; `shapes` are those of the values."""
    found = []
    for i, step in enumerate(plan.steps):
        here = rows // 2 if step.conditional_only else rows
        fitted = [(f, corrections[i, f.name]) for f in step.sources if (i, f.name) in corrections]
        found.append(sum(correction_macs(c, here, *shapes[f.value][-2:]) for f, c in fitted))
    return tuple(found)


def _of(macs: Mapping[str, MacCount], path: str) -> MacCount:
    return macs.get(path, MacCount())
