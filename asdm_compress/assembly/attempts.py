"""The ways in which plans are searched for, and what a search is made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.in_time import Clock
from asdm_compress.assembly.options import Finest, Option, is_coarse_enough, teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import RefitChoice, fit_plan
from asdm_compress.assembly.search import TIME_LIMIT_SECONDS, Interaction, Pairs, Solution, solve
from asdm_compress.assembly.teacher_runs import TeacherRuns
from asdm_compress.core.defaults import NEIGHBOURS_SECONDS
from asdm_compress.core.edits import Edit, has_weights
from asdm_compress.core.units import Limit
from asdm_compress.models.edits import SlotWeights
from asdm_compress.profiling.profile import Profile, ProfileSettings


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to search.

    How much of the errors' scalar products it believes: they hold for small errors, and come from few samples. And
    whether it may use what is fitted in the cut places, which can do worse on unseen prompts than one-shot damages say.

    A `plain` attempt takes edits by what they damage before anything makes up for it (`Search.plain_damages`), perhaps
    units and larger parts alone: what a whole plan's refit makes up for is then found out by its fit.
    """

    belief: float
    with_weights: bool = True
    plain: bool = False
    units_alone: bool = False

    @property
    def plans(self) -> str:
        """Which plans it searches, for people."""
        if self.with_weights:
            return "all plans"
        return f"plans that only take {'whole units and layers' if self.units_alone else 'parts'} out"

    @property
    def damages(self) -> str:
        """What it sums up of them."""
        return "damage before anything makes up for it" if self.plain else "damage"


# Made in this order until one is measured as predicted.
ATTEMPTS: Final = (
    Attempt(1.0),
    Attempt(1.0, with_weights=False),
    Attempt(0.5),
    Attempt(0.0, with_weights=False),
    Attempt(0.0),
)
# Made always. The first is the knapsack of LAPTOP-Diff (2404.11098); its plans come out well once they are refitted.
PLAIN_ATTEMPTS: Final = (
    Attempt(0.0, with_weights=False, plain=True, units_alone=True),
    Attempt(0.0, with_weights=False, plain=True),
)
LEAST_ATTEMPTS: Final = 2


@dataclass(frozen=True, slots=True)
class Search:
    """Everything that a verified search is made with. `limits` are the user's.

    `of_options` are the moments that single edits were fitted and measured on, by default those of `calibration`, which
    may be fewer: a plan's fit holds more of each.
    `damages` are of edits with what is fitted for each, `plain_damages` of those that only take out, without: none
    where nothing is refitted, since they would be the same. `timed` is the teacher that times are measured on, where it
    is in another precision than the one that errors are measured on.
    """

    teacher: UNet2DConditionModel
    profile: Profile
    options: Sequence[Option]
    damages: Mapping[str, Damage]
    limits: Sequence[Limit]
    settings: ProfileSettings
    calibration: Calibration
    refit: RefitChoice = "none"
    neighbours_seconds: float = NEIGHBOURS_SECONDS
    plain_damages: Mapping[str, Damage] = field(default_factory=dict)
    of_options: tuple[Calibration, Calibration] | None = None
    timed: UNet2DConditionModel | None = None

    def clock(
        self, limits: Sequence[Limit] | None = None, known: dict[frozenset[tuple[str, Edit]], float] | None = None
    ) -> Clock:
        """What times students, under the search's own limits or others; `known` are shares that are timed already."""
        teacher = self.teacher if self.timed is None else self.timed
        limits = self.limits if limits is None else limits
        return Clock(teacher, self.profile, limits, self.settings, {} if known is None else known)

    def fit(self, plan: Plan, calibration: Calibration, runs: TeacherRuns | None = None) -> SlotWeights:
        """The weights of a plan fitted on some moments, of which the teacher's states may be known."""
        return fit_plan(self.teacher, plan, calibration, refit=self.refit, runs=runs)

    def suited_to(self, attempt: Attempt) -> Search | None:
        """The same search among the edits that an attempt takes; None where another attempt has the same."""
        if attempt.with_weights:
            return self
        left = [option for option in self.options if not has_weights(option.edit)]
        if not attempt.plain:
            return replace(self, options=left) if len(left) < len(self.options) else None
        smallest: Finest = "unit" if attempt.units_alone else "sub-unit"
        left = [o for o in left if o.name in self.plain_damages and is_coarse_enough(o.site, o.edit, smallest)]
        return replace(self, options=left, damages=self.plain_damages) if left else None

    def without(self, name: str) -> Search:
        """The same search without one option."""
        return replace(self, options=[option for option in self.options if option.name != name])

    def solve(
        self, inner: Sequence[Limit], pairs: Pairs, belief: float, patience: float = TIME_LIMIT_SECONDS
    ) -> Solution:
        """The best plan under other limits; of pairs not measured (`pairs`) `belief` of the scalar product counts."""
        totals = {name: damage.total for name, damage in self.damages.items()}
        whole = teacher_costs(self.profile)
        known = self.among_options(pairs)
        return solve(self.options, totals, whole, inner, known, self.interaction(belief), patience)

    def interaction(self, belief: float) -> Interaction | None:
        """What the errors of two edits add up to above their own damages, as far as that is believed."""
        if not belief:
            return None
        return lambda one, other: belief * self.damages[one].interaction(self.damages[other])

    def among_options(self, pairs: Pairs) -> dict[frozenset[str], float]:
        """The pairs of which this search may use both edits."""
        names = {option.name for option in self.options}
        return {pair: term for pair, term in pairs.items() if pair <= names}

    def predicted(self, options: Sequence[Option], pairs: Pairs) -> float:
        """The sum of damages and of all pairs' terms, before any factor."""
        of_pairs = [
            pairs.get(frozenset((a.name, b.name)), self.damages[a.name].interaction(self.damages[b.name]))
            for a, b in combinations(options, 2)
        ]
        return max(sum(self.damages[o.name].total for o in options) + sum(of_pairs), 0.0)
