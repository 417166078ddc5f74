"""The frontier: for every budget the plan of least damage, each proven on its own by integer programming.

One search per budget and nothing else: no plan is built, timed or fitted here. Damages are the edits' one-shot ones;
what the plans would do together is predicted beside them from the scalar products of their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from asdm_compress.assembly.options import Option
from asdm_compress.assembly.search import TIME_LIMIT_SECONDS, Interaction, Solution, smallest_reachable, solve
from asdm_compress.core.checked_json import read_record
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.recipe import EditEntry
from asdm_compress.core.units import Limit, Resource, parse_budget

SCHEMA_VERSION: Final = 1
FILE_NAME: Final = "frontier.json"
IMAGES_FOLDER: Final = "frontier"
SHARES: Final = tuple(round(0.95 - 0.05 * i, 2) for i in range(15))  # down to a quarter of the teacher's
_AGAIN: Final = "Make it again with `asdm-compress frontier`."


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PlanCosts(_Record):
    """Costs of a UNet as predicted: seconds, MACs and parameters."""

    latency: float
    macs: float
    params: float


class FrontierImage(_Record):
    """An image of a plan's student, with its decibels from the teacher's; files relative to `frontier.json`."""

    prompt: str
    seed: int
    teacher: str
    student: str
    psnr: float


class FrontierPoint(_Record):
    """The plan of least damage under a budget.

    `summed_damage` is what the search minimised and `bound` what no plan can be under, with the terms of pairs only as
    far as those that were looked at go; they are the same where `proven`. `predicted_damage` has the terms of all pairs
    of its edits. `measured_damage` and `measured_latency` (a share of the teacher's) are None where the plan was not
    built, fitted and measured.
    """

    budget: str
    edits: list[EditEntry]
    costs: PlanCosts
    summed_damage: float
    bound: float
    proven: bool
    predicted_damage: float
    measured_damage: float | None = None
    measured_latency: float | None = None
    images: list[FrontierImage] = []


class Frontier(_Record):
    """The whole of `frontier.json`, points from the loosest budget to the tightest that a plan meets.

    `also` are limits that hold for every point. With `pairs` the search minimised the damage with the terms of pairs,
    whose optimality it cannot always prove; without, the sum alone. `smallest` is the least of the resource that any
    plan reaches, as a share of the teacher's.
    """

    schema_version: Literal[1] = 1
    model: str
    command: str
    resource: Resource
    also: list[str]
    pairs: bool
    options: int
    teacher: PlanCosts
    smallest: float
    points: list[FrontierPoint]

    def save(self, path: Path) -> None:
        """Write `frontier.json`."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def proof(self, point: FrontierPoint) -> str:
        """What is known of a point's optimality, for tables: with pairs, among those of them that were looked at."""
        if not point.proven:
            return f"at least {point.bound:.3g}"
        return "of the pairs looked at" if self.pairs else "yes"

    def share(self, point: FrontierPoint) -> float:
        """A point's predicted share of the teacher's resource."""
        return float(getattr(point.costs, self.resource) / getattr(self.teacher, self.resource))


def load_frontier(path: Path) -> Frontier:
    """Read a `frontier.json`; raises AsdmError for one that is damaged or of another schema version."""
    return read_record(path, Frontier, SCHEMA_VERSION, _AGAIN)


@dataclass(frozen=True, slots=True)
class Question:
    """What a frontier is asked for: the resource whose budget changes, in which `shares` of the teacher's, under which
    other limits, whether the search minimises the terms of pairs too, and the seconds that one budget's may take."""

    resource: Resource
    shares: tuple[float, ...] = SHARES
    also: tuple[Limit, ...] = ()
    pairs: bool = False
    patience: float = TIME_LIMIT_SECONDS


@dataclass(frozen=True, slots=True)
class Menu:
    """What a search chooses from: options, their damages by name, what pairs of them add, and the teacher's costs."""

    options: Sequence[Option]
    damages: Mapping[str, float]
    teacher: Mapping[Resource, float]
    interaction: Interaction


def find_frontier(
    menu: Menu, question: Question, progress: Callable[[int, int], None] | None = None
) -> tuple[list[tuple[Limit, Solution]], float]:
    """The solutions by budget, from the loosest on, and the least share of the resource that any plan reaches.

    Budgets that no plan meets are left out, and the least share itself becomes the last one in their place. A plan that
    another one beats or equals in both, cost and damage, is left out. Raises AsdmError with exit code 3 where no plan
    meets the limits that hold for all budgets, or any of the budgets.
    """
    report = progress or (lambda done, total: None)
    resource, also = question.resource, question.also
    smallest = smallest_reachable(menu.options, menu.teacher, resource, also)
    if smallest is None:
        raise AsdmError(f"no plan meets {', '.join(map(str, also))}", "Choose a larger budget.", ExitCode.INFEASIBLE)
    reachable = smallest / menu.teacher[resource]
    if max(question.shares) < reachable:
        raise AsdmError(
            f"no plan meets {resource}={max(question.shares):g}x; the smallest that can be reached is "
            f"{resource}={math.ceil(1e4 * reachable) / 1e4:.4f}x",
            "Choose larger budgets.",
            ExitCode.INFEASIBLE,
        )
    wanted = sorted({share for share in question.shares if share >= reachable}, reverse=True)
    if len(wanted) < len(set(question.shares)):
        # A little more, so that the solver's own rounding does not make it impossible.
        wanted.append(min(1.0, math.ceil(1e6 * reachable + 1e-3) / 1e6))
    found: list[tuple[Limit, Solution]] = []
    for number, share in enumerate(wanted):
        limit = Limit(resource, share, relative=True)
        interaction = menu.interaction if question.pairs else None
        new = solve(
            menu.options, menu.damages, menu.teacher, [limit, *also], None, interaction, question.patience
        )  # fmt: skip
        # A tighter budget's plan keeps the looser ones too.
        found = [
            (old, plan) for old, plan in found if plan.damage < new.damage or plan.costs[resource] < new.costs[resource]
        ]
        found.append((limit, new))
        report(number + 1, len(wanted))
    return found, reachable


def frontier_of(
    menu: Menu, question: Question, model: str, command: str, progress: Callable[[int, int], None] | None = None
) -> Frontier:
    """The frontier for the file: as `find_frontier`, with what the edits of each plan would damage together.

    A plan that a smaller one is predicted to beat with these terms is left out too: it would be the worse choice.
    """
    found, reachable = find_frontier(menu, question, progress)
    points: list[FrontierPoint] = []
    for limit, solution in found:
        names = [o.name for o in solution.options]
        terms = 0.0 if solution.pairs else sum(menu.interaction(a, b) for a, b in combinations(names, 2))
        predicted = max(solution.damage + terms, 0.0)
        points = [point for point in points if point.predicted_damage < predicted]
        points.append(
            FrontierPoint(
                budget=str(limit),
                edits=[EditEntry(site=o.site, edit=o.edit) for o in solution.options],
                costs=_plan_costs(solution.costs),
                summed_damage=solution.damage,
                bound=solution.bound,
                proven=solution.proven,
                predicted_damage=predicted,
            )
        )
    return Frontier(
        model=model,
        command=command,
        resource=question.resource,
        also=[str(limit) for limit in question.also],
        pairs=question.pairs,
        options=len(menu.options),
        teacher=_plan_costs(menu.teacher),
        smallest=reachable,
        points=points,
    )


def _plan_costs(costs: Mapping[Resource, float]) -> PlanCosts:
    return PlanCosts(latency=costs["latency"], macs=costs["macs"], params=costs["params"])


def parse_shares_of(text: str) -> tuple[float, ...]:
    """Budgets such as `0.9x,0.8x,70%` as shares; raises AsdmError for anything else."""
    shares = []
    for word in text.split(","):
        if not word.strip().endswith(("x", "%")):
            raise AsdmError(f"{word.strip()!r} is no share of the teacher's", "For example 0.9x,0.8x,70%.")
        limit = parse_budget([f"latency={word.strip()}"])[0]
        shares.append(limit.value)
    return tuple(shares)
