"""Which students switch best together: a ladder of plans, fitted and measured, and a program over members and steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ortools.sat.python import cp_model

from asdm_compress.assembly.attempts import ATTEMPTS, LEAST_ATTEMPTS, Search
from asdm_compress.assembly.damage import Damage, measure_plan
from asdm_compress.assembly.in_time import measured_ratio, search_in_time
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.search import Solution
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.edits import Edit
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit

SHARES: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the teacher's latency, that plans are made for
PATIENCE: Final = 20.0  # seconds of the program over members and steps
RUNG_PATIENCE: Final = 4.0  # seconds of the search for one plan
_RESOLUTION: Final = 10**12  # the objective of the worst line-up as an integer
_TICKS: Final = 10**6  # a step of the teacher as an integer
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Rung:
    """A plan, its student's share of the teacher's latency as measured, and what it damages per band on prompts that
    were kept out of its fit."""

    solution: Solution
    latency: float
    damage: Damage

    @property
    def plan(self) -> Plan:
        """The plan alone."""
        return self.solution.plan


@dataclass(frozen=True, slots=True)
class Lineup:
    """The students of a switched UNet, as numbers of rungs, and who takes how many steps of every band.

    `counts[band]` has the teacher's first and then those of every student. `predicted` is what that damages, as a share
    like a damage's total; no line-up is under `bound`.
    """

    students: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    predicted: float
    bound: float
    proven: bool

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "students": list(self.students), "counts": [list(row) for row in self.counts],
            "predicted": self.predicted, "bound": self.bound, "proven": self.proven,
        }  # fmt: skip


def climb(
    search: Search, shares: Sequence[float] = SHARES, exact: Sequence[float] = (), progress: Progress | None = None
) -> list[Rung]:
    """The best plans for these shares of the teacher's latency by the searches that every assembly makes, each fitted,
    measured and timed, from the slowest on.

    Those for `shares` are as fast as predicted, those for `exact` as measured. Shares that no plan meets are left out.
    Raises AsdmError with exit code 3 where that is all of them.
    """
    fitting, measuring = search.calibration.for_plans()
    plans: list[Solution] = []
    refused: AsdmError | None = None
    timed: dict[frozenset[tuple[str, Edit]], float] = {}
    for share in sorted({*shares, *exact}, reverse=True):
        limits = (Limit("latency", share, relative=True),)
        clock = search.clock(limits, timed)
        for attempt in ATTEMPTS[:LEAST_ATTEMPTS]:
            here = search.suited_to(attempt)
            if here is None:
                continue
            solver = partial(here.solve, pairs={}, belief=attempt.belief, patience=RUNG_PATIENCE)
            try:
                found = search_in_time(solver, clock, limits).solution if share in exact else solver(limits)
            except AsdmError as error:
                if error.exit_code != ExitCode.INFEASIBLE:
                    raise
                refused = refused or error
                continue
            if all(found.plan != other.plan for other in plans):
                plans.append(found)
    if not plans:
        assert refused is not None
        raise refused
    rungs = []
    for number, solution in enumerate(plans, start=1):
        weights = search.fit(solution.plan, fitting)
        damage = measure_plan(search.teacher, solution.plan, measuring, weights)
        student = assemble(clock.teacher, solution.plan, weights)
        rungs.append(Rung(solution, measured_ratio(clock.teacher, student, search.settings), damage))
        if progress:
            progress(number, len(plans))
    return sorted(rungs, key=lambda rung: -rung.latency)


def line_up(
    rungs: Sequence[Rung], band_weights: Sequence[float], steps: int, share: float, most: int, overhead: float = 0.0
) -> Lineup:
    """The at most `most` students, and who takes which steps, of least damage within a share of the teacher's time.

    The errors of different steps are taken to be independent, so that their squares add up: a step in band b by a
    student of damage d_b adds w_b d_b / n_b, with the band's weight and its number of steps. `overhead` is the part of
    a step's time that is not the UNet's, which no student makes shorter. All sets of students are in one integer
    program. Raises AsdmError with exit code 3 where none takes so little time.
    """
    bands = len(band_weights)
    lengths = [sum(step * bands // steps == band for step in range(steps)) for band in range(bands)]
    model = cp_model.CpModel()
    chosen = [model.new_bool_var(f"student {i}") for i in range(len(rungs))]
    counts = [
        [model.new_int_var(0, length, f"{i} in {band}") for i in range(len(rungs) + 1)]
        for band, length in enumerate(lengths)
    ]
    model.add(sum(chosen) <= most)
    for row, length in zip(counts, lengths, strict=True):
        model.add(sum(row) == length)
        for variable, there in zip(row[1:], chosen, strict=True):
            model.add(variable <= length * there)
    shares = [overhead + (1 - overhead) * rung.latency for rung in rungs]
    ticks = [_TICKS, *(-int(-each * _TICKS // 1) for each in shares)]
    model.add(sum(t * n for row in counts for t, n in zip(ticks, row, strict=True)) <= int(share * steps * _TICKS))
    costs = [
        [0.0, *(weight * rung.damage.bands[band] / max(length, 1) for rung in rungs)]
        for band, (weight, length) in enumerate(zip(band_weights, lengths, strict=True))
    ]
    scale = _RESOLUTION / (sum(max(row) * length for row, length in zip(costs, lengths, strict=True)) or 1.0)
    model.minimize(
        sum(
            round(c * scale) * n
            for row, some in zip(costs, counts, strict=True)
            for c, n in zip(row, some, strict=True)
        )
    )
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = PATIENCE
    solver.parameters.random_seed = 0
    solver.parameters.num_workers = 1
    solver.parameters.relative_gap_limit = 0.0
    solver.parameters.catch_sigint_signal = False
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise AsdmError(
            f"no students that were found take turns in {share:.4g}x of the teacher's time",
            f"The fastest of them takes latency={min(shares):.4f}x by itself. Allow more.",
            ExitCode.INFEASIBLE,
        )
    taken = [[solver.value(variable) for variable in row] for row in counts]
    students = tuple(i for i in range(len(rungs)) if any(row[i + 1] for row in taken))
    predicted = sum(c * n for row, some in zip(costs, taken, strict=True) for c, n in zip(row, some, strict=True))
    return Lineup(
        students,
        tuple((row[0], *(row[i + 1] for i in students)) for row in taken),
        predicted,
        min(solver.best_objective_bound / scale, predicted),
        status == cp_model.OPTIMAL,
    )
