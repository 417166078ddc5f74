"""What every step of one run takes from which earlier steps, and what it has to keep for later ones.

All of it is known before the first step, so that a run holds exactly the tensors that a later step will use, and
forgets each after its last use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from asdm_compress.inheritance.actions import Action, Inherit, correction_sources, features_of
from asdm_compress.inheritance.forecast import Forecast, weights
from asdm_compress.inheritance.graph import PREDICTION, Graph
from asdm_compress.inheritance.places import Feature, Place
from asdm_compress.inheritance.program import Program, is_fresh, program_of
from asdm_compress.inheritance.timeline import Timeline, distinct

# Rows that were computed at the same steps: all of them, or one guidance branch where a schedule leaves one out.
Rows = Literal["all", "unconditional", "conditional"]
BOTH: Final[tuple[Rows, ...]] = ("unconditional", "conditional")
# The conditional prediction minus the unconditional one.
DIFFERENCE: Final = Feature("guidance difference")
# What the prediction makes of the UNet's input.
DENOISED: Final = Feature("denoised latent")
DERIVED: Final = (DIFFERENCE, DENOISED)  # found from the prediction, which is no part of any pass
Kept = tuple[Feature, Rows, int]  # a tensor that a run holds: what, of which rows, from which step


@dataclass(frozen=True, slots=True)
class Use:
    """A forecast of a feature at a step: for each group of rows the kept tensors, the newest first, and factors.

    Where `denoised` is given, the denoised latent is forecast, and the feature, which is the prediction, is what makes
    it: `denoised` are a and b of `Timeline.denoised`.
    """

    feature: Feature
    groups: tuple[tuple[tuple[Kept, ...], tuple[float, ...]], ...]
    denoised: tuple[float, float] | None = None

    @property
    def kept(self) -> tuple[Kept, ...]:
        """All tensors that it uses."""
        return tuple(kept for tensors, _ in self.groups for kept in tensors)

    def last(self) -> Use:
        """The last computed value in place of the forecast."""
        return replace(self, groups=tuple((tensors[:1], (1.0,)) for tensors, _ in self.groups))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: the action as it can be carried out, its program, and what it takes, keeps and forgets.

    `uses` has one entry per `program.taken`, `sources` one per corrected feature of it.
    """

    action: Action
    program: Program
    uses: tuple[Use, ...] = ()
    sources: Mapping[Feature, Use] = field(default_factory=dict)
    difference: Use | None = None
    keeps: tuple[Kept, ...] = ()
    forgets: tuple[Kept, ...] = ()

    @property
    def conditional_only(self) -> bool:
        """Whether only the second half of the rows is computed."""
        return self.difference is not None

    @property
    def needs(self) -> tuple[Kept, ...]:
        """Everything of earlier steps that it takes."""
        uses = (*self.uses, *self.sources.values(), *([self.difference] if self.difference else []))
        return tuple(kept for use in uses for kept in use.kept)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a UNet's passes are made of: its graph, and the places in it that can be inherited."""

    graph: Graph
    places: Mapping[str, Place]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The steps of a run, and the graphs, by member, that their programs are parts of."""

    graphs: Mapping[str | None, Graph]
    steps: tuple[StepPlan, ...]

    def graph_of(self, step: StepPlan) -> Graph:
        """The graph of the UNet that computes a step."""
        return self.graphs[step.action.member]


def forecast_from(plan: RunPlan, first_step: int) -> dict[tuple[int, str], frozenset[tuple[int, ...]]]:
    """Which steps each corrected feature is forecast from at which step; the plan's first step has number `first_step`.

    A correction is fitted to the errors of one such forecast and is good for no other.
    """
    return {
        (first_step + i, use.feature.name): frozenset(
            tuple(first_step + step for _, _, step in kept)
            for some in (use, step.sources[use.feature])
            for kept, _ in some.groups
        )
        for i, step in enumerate(plan.steps)
        for use in step.uses
        if use.feature in step.sources
    }


def plan_run(
    anatomies: Mapping[str | None, Anatomy],
    actions: Sequence[Action],
    timeline: Timeline,
    guided: bool,
    split: bool = False,
    also: Mapping[Kept, int] | None = None,
) -> RunPlan:
    """The plan of a run of `len(actions)` evaluations, of which the first computes everything.

    `anatomies` has every member that an action names, under its name. A step whose action needs something that no
    earlier step of this run has computed computes everything too; features come from steps of the same member, the
    whole prediction from any. With `split` the guidance branches are kept apart though no action needs that, and what
    is in `also` is kept until a step though this run does not need it: what forks of the run may. Raises AsdmError for
    places that the UNet does not have and for abscissae that the timeline does not have.
    """
    graphs = {member: anatomy.graph for member, anatomy in anatomies.items()}
    return RunPlan(graphs, _Planner(anatomies, actions, timeline, guided, split).plan(also or {}))


def needed_from(plan: RunPlan, step: int) -> frozenset[Kept]:
    """The tensors of earlier steps that a run needs from a step on."""
    return frozenset(kept for each in plan.steps[step:] for kept in each.needs if kept[2] < step)


class _Planner:
    def __init__(
        self,
        anatomies: Mapping[str | None, Anatomy],
        actions: Sequence[Action],
        timeline: Timeline,
        guided: bool,
        split: bool,
    ) -> None:
        self.anatomies, self.timeline = anatomies, timeline
        self.actions = [action if guided else replace(action, guidance=None) for action in actions]
        self.split = (split and guided) or any(action.guidance is not None for action in self.actions[1:])
        found = [(a, anatomies[a.member].places) for a in self.actions]
        sources = [Feature(s).of(a.member) for a, places in found for s in correction_sources(a, places).values()]
        self.interest = list(dict.fromkeys([*(f for a, places in found for f in features_of(a, places)), *sources]))
        self.programs: dict[tuple[object, ...], Program] = {}
        self.history: dict[tuple[Feature, Rows], list[int]] = {}

    def plan(self, also: Mapping[Kept, int]) -> tuple[StepPlan, ...]:
        steps = [self._step(i, action if i else action.whole()) for i, action in enumerate(self.actions)]
        last_use: dict[Kept, int] = {}
        for i, step in enumerate(steps):
            last_use |= dict.fromkeys(step.needs, i)
        for kept, last in also.items():
            last_use[kept] = max(last, last_use.get(kept, last))
        return tuple(self._finished(i, step, last_use) for i, step in enumerate(steps))

    def _step(self, i: int, action: Action) -> StepPlan:
        step = self._possible(i, action) or (
            self._possible(i, replace(action, guidance=None)) if action.guidance is not None else None
        )
        step = step or self._possible(i, action.whole())
        assert step is not None
        groups: tuple[Rows, ...] = ("all",)
        if self.split:
            groups = ("conditional",) if step.conditional_only else BOTH
        live = {op.value for op in step.program.ops}
        taken = {f.value for f in step.program.taken}
        graph = self.anatomies[action.member].graph
        for feature in self.interest:
            mine = feature.member == action.member or feature.value == PREDICTION
            if mine and is_fresh(feature, graph, live, taken):
                for rows in groups:
                    self.history.setdefault((feature, rows), []).append(i)
        if PREDICTION not in taken:
            if self.split and not step.conditional_only:
                self.history.setdefault((DIFFERENCE, "all"), []).append(i)
            for rows in groups:
                self.history.setdefault((DENOISED, rows), []).append(i)
        return step

    def _possible(self, i: int, action: Action) -> StepPlan | None:
        """The step with this action, or None where something that it needs was never computed."""
        places = self.anatomies[action.member].places
        sources = correction_sources(action, places)
        entries = features_of(action, places)
        program = self._program(action.member, tuple(entries), (), sources)
        groups: tuple[Rows, ...] = ("all",)
        if self.split:
            groups = BOTH if action.guidance is None else ("conditional",)
        difference = None
        if action.guidance is not None:
            difference = self._use(i, DIFFERENCE, action.guidance, ("all",))
            if difference is None:
                return None
        uses = [self._taken(i, feature, entries[feature], groups) for feature in program.taken]
        looked_at = {
            f: self._use(i, Feature(source).of(action.member), entries[f].forecast, groups)
            for f, source in program.corrections.items()
        }
        if None in uses or None in looked_at.values():
            return None
        return StepPlan(
            action,
            program,
            tuple(use for use in uses if use is not None),
            {f: use for f, use in looked_at.items() if use is not None},
            difference,
        )

    def _taken(self, i: int, feature: Feature, entry: Inherit, groups: tuple[Rows, ...]) -> Use | None:
        if entry.thing != "denoised":
            return self._use(i, feature, entry.forecast, groups)
        use = self._use(i, DENOISED, entry.forecast, groups)
        return use and replace(use, feature=feature, denoised=self.timeline.denoised(i))

    def _use(self, i: int, feature: Feature, forecast: Forecast, groups: tuple[Rows, ...]) -> Use | None:
        found = []
        for rows in groups:
            steps = distinct(
                self.history.get((feature, rows), ()), self.timeline, forecast.abscissa, forecast.order + 1
            )
            if not steps:
                return None
            at = [self.timeline.at(step, forecast.abscissa) for step in steps]
            factors = weights(at, self.timeline.at(i, forecast.abscissa), forecast.damping)
            found.append((tuple((feature, rows, step) for step in steps), factors))
        return Use(feature, tuple(found))

    def _program(
        self,
        member: str | None,
        taken: tuple[Feature, ...],
        recorded: tuple[Feature, ...],
        sources: Mapping[Feature, str],
    ) -> Program:
        """The program, made once for all the steps that have it."""
        key = (member, taken, recorded, tuple(sources.items()))
        if key not in self.programs:
            self.programs[key] = program_of(self.anatomies[member].graph, taken, recorded, sources)
        return self.programs[key]

    def _finished(self, i: int, step: StepPlan, last_use: Mapping[Kept, int]) -> StepPlan:
        keeps = tuple(kept for kept in last_use if kept[2] == i)
        recorded = tuple(dict.fromkeys(feature for feature, _, _ in keeps if feature not in DERIVED))
        program = self._program(step.action.member, step.program.taken, recorded, step.program.corrections)
        forgets = tuple(kept for kept, last in last_use.items() if last == i)
        return replace(step, program=program, keeps=keeps, forgets=forgets)
