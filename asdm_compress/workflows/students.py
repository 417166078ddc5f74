"""Students that switch well together, made from what was measured of their teacher: their sizes are solved for."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.attempts import Search
from asdm_compress.assembly.in_time import TIMING_TOLERANCE
from asdm_compress.assembly.ladder import SHARES, Lineup, Rung, climb, line_up
from asdm_compress.assembly.plan_fit import RefitChoice
from asdm_compress.assembly.store import weights_hash
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.provenance import versions
from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe
from asdm_compress.core.units import Limit
from asdm_compress.inheritance.actions import FULL
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.families import architecture
from asdm_compress.models.rounding import rounded_as_stored
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.sampling.settings import encode
from asdm_compress.scheduling.switch_times import SKIP, time_options
from asdm_compress.workflows.plan import Measured, PlanSettings
from asdm_compress.workflows.progress import Progress

FILE_NAME: Final = "members.json"
RECIPES: Final = "members"  # the folder of the students' recipes
FASTER: Final = 0.75  # times the budget: some of the ladder's plans are made for less than it


@dataclass(frozen=True, slots=True)
class Students:
    """The ladder, who was lined up, and the names and weights, by number of rung, of those and of the best single one.

    The latter is only compared with, unless it is lined up itself.
    """

    rungs: Sequence[Rung]
    lineup: Lineup
    names: Mapping[int, str]
    weights: Mapping[int, SlotWeights]
    band_weights: Sequence[float]

    @property
    def bystanders(self) -> list[str]:
        """Those that are only compared with."""
        return [name for i, name in self.names.items() if i not in self.lineup.students]

    def of(self, teacher: UNet2DConditionModel) -> dict[str, UNet2DConditionModel]:
        """All of them by name, built from a teacher with whom they share what they have of it."""
        return {name: assemble(teacher, self.rungs[i].plan, self.weights[i]) for i, name in self.names.items()}

    def as_json(self) -> dict[str, Any]:
        """The ladder from the slowest student on, and the line-up, whose students are its numbers."""
        return {
            "band_weights": list(self.band_weights), "lineup": self.lineup.as_json(),
            "ladder": [
                {
                    "name": self.names.get(i), "latency": rung.latency, "damage": rung.damage.total,
                    "bands": list(rung.damage.bands), "edits": {o.site: o.edit for o in rung.solution.options},
                }
                for i, rung in enumerate(self.rungs)
            ],
        }  # fmt: skip

    def as_stored(self, source: Source, options: LoadOptions) -> Students:
        """With their weights rounded as they will be stored, so that what is measured is what is written."""
        return replace(self, weights={i: rounded_as_stored(some, source, options) for i, some in self.weights.items()})

    def line(self) -> str:
        """For the terminal."""
        times = " and ".join(f"{self.rungs[i].latency:.3f}x" for i in self.lineup.students)
        proof = "proven" if self.lineup.proven else f"with a bound of {self.lineup.bound:.3g}"
        return (
            f"Of {len(self.rungs)} students that were fitted and measured, those of {times or 'none'} switch best "
            f"together: damage {self.lineup.predicted:.3g} ({proof})."
        )

    def write(
        self,
        folder: Path,
        used: Collection[str],
        model: str,
        teacher: UNet2DConditionModel,
        refit: RefitChoice,
        command: str,
    ) -> None:
        """The ladder, and a recipe of each student that is `used`, below the folder of what they are members of."""
        content = {"command": command, **self.as_json()}
        (folder / FILE_NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / RECIPES).mkdir()
        for i, name in self.names.items():
            if name in used:
                recipe = _recipe(model, teacher, self.rungs[i], refit)
                (folder / RECIPES / f"{name}.yaml").write_text(dump_recipe(recipe), encoding="utf-8")


def make_students(
    timed: UNet2DConditionModel,
    measured: Measured,
    share: float,
    overhead: float,
    settings: PlanSettings,
    most: int,
    progress: Progress,
) -> Students:
    """The at most `most` students that switch best together in a share of the teacher's time, from what was measured.

    Of the teacher's time `overhead` is not its UNet's. A ladder of plans for shares of that time is fitted and
    measured, timed as cuts of `timed`; which of them are taken comes out of one integer program (see
    `assembly.ladder`). Raises AsdmError with exit code 3 where no students take so little.
    """
    of_unet = max((share - overhead) / (1 - overhead), 1e-3)
    limits = (Limit("latency", of_unet, relative=True),)
    search = Search(
        measured.teacher, measured.profile, measured.options, measured.damages, limits, measured.shape,
        measured.calibration, settings.refit, timed=timed,
    )  # fmt: skip
    with progress.bar("Fitting and measuring students of several sizes") as bar:
        # One of the budget itself could take all steps.
        rungs = climb(search, (*SHARES, FASTER * of_unet), (of_unet,), bar)
    with progress.stage("Solving for the students that switch best together"):
        weights = measured.calibration.band_weights
        lineup = line_up(rungs, weights, settings.sampling.steps, share, most, overhead)
        names = _names(rungs, (*lineup.students, *_single(rungs, of_unet)))
    with progress.stage("Fitting them to all prompts"):
        fitted = {i: search.fit(rungs[i].plan, measured.calibration) for i in names}
    return Students(rungs, lineup, names, fitted, tuple(weights))


def step_overhead(pipeline: StableDiffusionPipeline, prompts: Sequence[str], settings: PlanSettings) -> float:
    """The part of a sampling step's time that is not the UNet's: the scheduler's, guidance, Python."""
    texts = encode(pipeline, prompts, settings.sampling.guidance)
    times = time_options(pipeline, (FULL, SKIP), texts, settings.sampling, settings.profile.repeats)
    return min(times.seconds[SKIP] / times.teacher, 0.9)


def _single(rungs: Sequence[Rung], share: float) -> tuple[int, ...]:
    """The student of least damage that could take all steps, if there is one."""
    fast = [i for i, rung in enumerate(rungs) if rung.latency <= share * (1 + TIMING_TOLERANCE)]
    return tuple(sorted(fast, key=lambda i: rungs[i].damage.total)[:1])


def _names(rungs: Sequence[Rung], students: Sequence[int]) -> dict[int, str]:
    """Names that tell a student's share of the teacher's time in percent."""
    names: dict[int, str] = {}
    for i in dict.fromkeys(students):
        name = f"student-{100 * rungs[i].latency:.0f}"
        names[i] = name if name not in names.values() else f"{name}-{i}"
    return names


def _recipe(model: str, stored: UNet2DConditionModel, rung: Rung, refit: RefitChoice) -> Recipe:
    return Recipe(
        asdm_recipe=1,
        base=Base(model=model, architecture=architecture(stored)),
        edits=[EditEntry(site=o.site, edit=o.edit) for o in rung.solution.options],
        refit=refit,
        budget=[f"latency={rung.latency:.4f}x"],
        provenance={"versions": versions(), "weights": weights_hash(stored, in_fp32=True)},
    )
