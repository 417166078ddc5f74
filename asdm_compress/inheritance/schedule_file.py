"""`inheritance.yaml`: a schedule as a file that people read and edit, its fitted corrections beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, field_validator

from asdm_compress.core.checked_yaml import Strict, as_yaml, read_checked
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import output_file
from asdm_compress.core.provenance import content_hash
from asdm_compress.inheritance.actions import FULL, Action, Inherit
from asdm_compress.inheritance.corrections_file import fitted_along, load_corrections, save_corrections
from asdm_compress.inheritance.forecast import Forecast, parse_forecast
from asdm_compress.inheritance.modes import MODE_GRAMMAR, parse_mode
from asdm_compress.inheritance.places import Thing
from asdm_compress.inheritance.schedule import Rule, Schedule
from asdm_compress.inheritance.validity import ModelMark, Validity

_HINT: Final = "Give the inheritance.yaml that `asdm-compress calibrate` wrote, or a mode such as uniform:3."
_SUFFIXES: Final = (".yaml", ".yml")


def _forecast(name: str) -> Forecast:
    try:
        return parse_forecast(name)
    except AsdmError as error:
        raise ValueError(f"{error}; {error.hint}") from error


class InheritEntry(Strict):
    """One inherited place; see `actions.Inherit`."""

    place: str = Field(min_length=1)
    thing: Thing = "output"
    forecast: str = "hold"
    corrected: bool = False

    @field_validator("forecast")
    @classmethod
    def _is_forecast(cls, value: str) -> str:
        return _forecast(value).name


class ActionEntry(Strict):
    """What a step does: the places that it inherits, and, where the unconditional branch is left out, how the
    difference to it is forecast; of a switched UNet, which member computes."""

    inherit: list[InheritEntry] = Field(default_factory=list)
    guidance: str | None = None
    member: str | None = None

    @field_validator("guidance")
    @classmethod
    def _is_forecast(cls, value: str | None) -> str | None:
        return None if value is None else _forecast(value).name

    def as_action(self) -> Action:
        """As the run time has it."""
        entries = tuple(Inherit(e.place, e.thing, parse_forecast(e.forecast), e.corrected) for e in self.inherit)
        return Action(entries, None if self.guidance is None else parse_forecast(self.guidance), self.member)


class MadeFor(Strict):
    """What the schedule is valid for; see `validity.Validity`."""

    model: str
    architecture: str
    weights: list[float]
    scheduler: str
    evaluations: int = Field(ge=1)
    sigmas: list[float]
    guidance: float
    latent_size: tuple[int, int]
    solver: str = ""  # of older files nothing is known of it


class ScheduleFile(Strict):
    """A whole `inheritance.yaml`: named actions, and the name of each step's.

    `corrections` is the name of a safetensors file in the same folder.
    """

    asdm_inheritance: Literal[1]
    made_for: MadeFor | None = None
    corrections: str | None = None
    actions: dict[str, ActionEntry] = Field(default_factory=dict)
    steps: list[str] = Field(min_length=1)


def load_schedule(path: Path) -> Schedule:
    """Read and check a schedule.

    Raises AsdmError with file and line for anything that is not right, such as a step whose action is not there, a
    first step that does not compute everything, and a file of corrections that is missing.
    """
    read = read_checked(path, ScheduleFile, "schedule", _HINT)
    content = read.content
    known = {name: entry.as_action() for name, entry in content.actions.items()}
    known.setdefault("full", FULL)
    for i, name in enumerate(content.steps):
        if name not in known:
            raise AsdmError(f"{read.line('steps', i)}: no action is called {name!r}", f"There are {', '.join(known)}.")
    actions = tuple(known[name] for name in content.steps)
    if not actions[0].is_whole:
        raise AsdmError(f"{read.line('steps', 0)}: the first step has nothing to inherit, so it has to compute all")
    made = content.made_for
    if made is not None and made.evaluations != len(actions):
        raise AsdmError(f"{read.line('steps')}: {len(actions)} steps are named for {made.evaluations} evaluations")
    if made is not None and (any(s <= 0 for s in made.sigmas) or len(made.sigmas) not in (0, made.evaluations)):
        raise AsdmError(f"{read.line('made_for')}: sigmas has one number above 0 for each evaluation, or none at all")
    corrections = {}
    if content.corrections is not None:
        if Path(content.corrections).name != content.corrections:
            raise AsdmError(f"{read.line('corrections')}: the corrections are a file in the same folder")
        beside = path.parent / content.corrections
        corrections = load_corrections(beside)
        if fitted_along(beside) not in ("", _fingerprint(actions)):
            warnings.warn(
                f"{path.name} has other steps than those that its corrections were fitted along, which are left out",
                stacklevel=2,
            )
            corrections = {}
    return Schedule(actions, corrections, None if made is None else _validity(made))


def _fingerprint(actions: Sequence[Action]) -> str:
    """The same for schedules that do the same at every step."""
    return content_hash({"actions": [repr(action) for action in actions]})


def save_schedule(schedule: Schedule, path: Path) -> None:
    """Write a schedule, and its corrections beside it as a safetensors file of the same name."""
    names = dict.fromkeys(action.name for action in schedule.actions)
    entries = {
        action.name: ActionEntry(
            inherit=[
                InheritEntry(place=e.place, thing=e.thing, forecast=e.forecast.name, corrected=e.corrected)
                for e in action.inherits
            ],
            guidance=None if action.guidance is None else action.guidance.name,
            member=action.member,
        )
        for action in dict.fromkeys(schedule.actions)
    }
    beside = path.with_suffix(".safetensors")
    content = ScheduleFile(
        asdm_inheritance=1,
        made_for=None if schedule.validity is None else _made_for(schedule.validity),
        corrections=beside.name if schedule.corrections else None,
        actions={name: entries[name] for name in names},
        steps=[action.name for action in schedule.actions],
    )
    if schedule.corrections:
        save_corrections(schedule.corrections, beside, fitted_along=_fingerprint(schedule.actions))
    with output_file(path) as aside:
        aside.write_text(as_yaml(content.model_dump(mode="json", exclude_none=True)), encoding="utf-8")


def read_rule(rule: Rule | str | Path) -> Rule:
    """A rule as it is, or from its written form: a path that ends in .yaml, or a mode such as `uniform:3`."""
    if not isinstance(rule, (str, Path)):
        return rule
    if Path(rule).suffix in _SUFFIXES:
        return load_schedule(Path(rule))
    if isinstance(rule, Path) or (":" not in rule and Path(rule).exists()):
        raise AsdmError(f"{rule} is no schedule: its name does not end in .yaml", _HINT)
    try:
        return parse_mode(rule)
    except AsdmError as error:
        raise AsdmError(error.message, error.hint or f"Modes are written like {MODE_GRAMMAR}.") from error


def _validity(made: MadeFor) -> Validity:
    mark = ModelMark(made.architecture, tuple(made.weights))
    return Validity(
        made.model, mark, made.scheduler, made.evaluations, tuple(made.sigmas), made.guidance, made.latent_size,
        made.solver,
    )  # fmt: skip


def _made_for(validity: Validity) -> MadeFor:
    return MadeFor(
        model=validity.model,
        architecture=validity.mark.architecture,
        weights=list(validity.mark.weights),
        scheduler=validity.scheduler,
        evaluations=validity.evaluations,
        sigmas=list(validity.sigmas),
        guidance=validity.guidance,
        latent_size=validity.latent_size,
        solver=validity.solver,
    )
