"""What the stages have left in a folder: every file that a report can tell of, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from asdm_compress.assembly import frontier as frontier_file
from asdm_compress.assembly import record as assembly_file
from asdm_compress.assembly.frontier import Frontier, load_frontier
from asdm_compress.assembly.record import Assembly, load_assembly
from asdm_compress.core.edits import ConvSpec, conv_spec
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Recipe, load_recipe
from asdm_compress.distillation.journal import METRICS
from asdm_compress.evaluation import record as evaluation_file
from asdm_compress.evaluation.record import Evaluation, load_evaluation
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import load_schedule
from asdm_compress.models.folder import read_json
from asdm_compress.profiling.profile import Profile, load_profile

RECIPE: Final = "recipe.yaml"
PROFILE: Final = "profile.json"
SCHEDULE: Final = "inheritance.yaml"
SWITCHING: Final = "switching.yaml"
OPTIMIZED: Final = "optimize.json"
CALIBRATION: Final = "calibration.json"
RUN: Final = ".run"  # ends the name of a folder that a command is still at work in
FILES: Final = (
    RECIPE, PROFILE, assembly_file.FILE_NAME, frontier_file.FILE_NAME, evaluation_file.FILE_NAME, SCHEDULE, SWITCHING,
    OPTIMIZED, METRICS,
)  # fmt: skip
Facts = TypeVar("Facts", bound=BaseModel)
_BOUNDARIES: Final = ".slot.time_router.boundaries"


class _Loose(BaseModel):
    """A part of a file of which a report needs some keys only."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StepFacts(_Loose):
    """One step of a calibrated schedule: its error and its seconds, as predicted and as measured."""

    action: str
    predicted_error: float | None  # where the search has measured what the step inherits
    measured_error: float
    predicted_seconds: float
    measured_seconds: float


class ContestantFacts(_Loose):
    """A way that was tried in the same time."""

    role: str
    way: str
    share: float
    validation: dict[str, Any] = {}
    test: dict[str, Any] = {}


class TimeFacts(_Loose):
    """A run's time with the schedule, as a share of the full run's."""

    full_seconds: float
    predicted_share: float
    measured_share: float


class CalibrationFacts(_Loose):
    """What `calibration.json` says of the schedule beside it: predictions, measurements, rivals."""

    command: str = ""
    model: str = ""
    goal: dict[str, Any] = {}
    sampler: dict[str, Any] = {}
    measured_on: dict[str, Any] = {}
    prompts: dict[str, int] = {}
    time: TimeFacts
    contestants: list[ContestantFacts] = []
    confidence: str | None = None
    verdict: str = ""
    steps: list[StepFacts] = []


class ShareFacts(_Loose):
    """The time of a run, as a share of the full run's."""

    predicted_share: float
    measured_share: float


class EntrantFacts(_Loose):
    """A schedule of members, or what was tried in its time."""

    role: str
    way: str
    share: float
    latent_error: float | None = None
    test: dict[str, Any] = {}


class SwitchingFacts(_Loose):
    """What `calibration.json` says of the schedule of members beside it."""

    command: str = ""
    models: list[str] = []
    measured_on: dict[str, Any] = {}
    time: ShareFacts
    entrants: list[EntrantFacts] = []
    verdict: str = ""


class WorthFacts(_Loose):
    """What pictures are worth by themselves: the mean of what they show, and their distance as a set."""

    pictures: int
    shown: float
    shown_interval: float | None = None
    distance: float

    @property
    def text(self) -> str:
        """For tables."""
        interval = "" if self.shown_interval is None else f" ± {self.shown_interval:.3f}"
        return f"{self.shown:.3f}{interval}; {self.distance:.3g}"


class TriedFacts(_Loose):
    """A way that `optimize` tried."""

    role: str
    way: str
    steps: int
    share: float
    validation: dict[str, Any] = {}
    test: dict[str, Any] | None = None
    worth: WorthFacts | None = None
    test_worth: WorthFacts | None = None


class ReferenceFacts(_Loose):
    """The run that `optimize` compares with; seconds are those of a whole image."""

    scheduler: str
    steps: int
    seconds: float
    outside_the_unet_loop: float
    worth: WorthFacts | None = None
    test_worth: WorthFacts | None = None


class OptimizedFacts(_Loose):
    """What `optimize.json` says."""

    command: str = ""
    models: list[str] = []
    share: float
    criterion: str = "fidelity"
    judged_by: list[str] = []  # what pictures show, and the distance
    reference: ReferenceFacts
    measured_on: dict[str, Any] = {}
    best: TriedFacts
    tried: list[TriedFacts] = []

    @property
    def by_quality(self) -> bool:
        """Whether it was the pictures by themselves that counted."""
        return self.criterion == "quality"


@dataclass(frozen=True, slots=True)
class Routes:
    """The timestep router of a convolution: boundaries (E - 1,) as shares of the time axis, and its sharpness."""

    site: str
    spec: ConvSpec
    boundaries: tuple[float, ...]
    sharpness: float

    def shares(self, timesteps: np.ndarray, train_timesteps: float = 1000.0) -> np.ndarray:
        """The experts' shares (T, E) at timesteps (T,), as the layer itself mixes them, without its features' part."""
        steps = self.sharpness * (np.asarray(self.boundaries)[None, :] - timesteps[:, None] / train_timesteps)
        logits = np.concatenate([np.zeros((len(timesteps), 1)), np.cumsum(steps, axis=1)], axis=1)
        if self.spec.mixing == "sigmoid":
            return np.asarray(1 / (1 + np.exp(-np.clip(logits, -60, 60))))
        logits = logits / self.spec.temperature
        grown = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(grown / grown.sum(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Training:
    """Lines of `metrics.jsonl`: means of losses, and probes on held-out prompts, each with its step."""

    losses: tuple[Mapping[str, Any], ...]
    probes: tuple[Mapping[str, Any], ...]

    @property
    def kept(self) -> Mapping[str, Any]:
        """The probe whose weights the trainer keeps: the first of least damage."""
        return min(self.probes, key=lambda probe: probe.get("damage", probe["latent_error"]))


@dataclass(frozen=True, slots=True)
class Stages:
    """Everything that was found, None where a stage has left nothing. `found` has the files by their names.

    `place` is what commands call the folder.
    """

    folder: Path
    name: str
    place: str
    recipe: Recipe | None = None
    profile: Profile | None = None
    assembly: Assembly | None = None
    frontier: Frontier | None = None
    evaluation: Evaluation | None = None
    schedule: Schedule | None = None
    calibration: CalibrationFacts | None = None
    switching: Schedule | None = None
    switched: SwitchingFacts | None = None
    optimized: OptimizedFacts | None = None
    training: Training | None = None
    routes: tuple[Routes, ...] = ()
    found: Mapping[str, Path] = field(default_factory=dict)

    @property
    def is_model(self) -> bool:
        """Whether the folder is one that commands open as a model."""
        return any((self.folder / name).exists() for name in ("model_index.json", "unet", "config.json", RECIPE))

    @property
    def is_trained(self) -> bool:
        """Whether the student was trained after the cut, so that the recipe's evidence is of what it was before."""
        distilled = self.recipe is not None and "distilled" in self.recipe.provenance
        return self.training is not None or distilled

    def beside(self, name: str) -> Path:
        """The folder of a stage's file, to which the names of images in it are relative."""
        return self.found[name].parent


def read_stages(folder: Path, name: str | None = None) -> Stages:
    """Read what lies in a folder, or, for what is not there, in one of its folders; `name` is what to call it.

    Raises AsdmError where there is no such folder, nothing in it to tell of, or a file that is damaged.
    """
    if not folder.is_dir():
        raise AsdmError(f"there is no folder {folder}", "Give the folder that `asdm-compress assemble` wrote.")
    found = {file: path for file in FILES if (path := _find(folder, file)) is not None}
    if not found:
        raise AsdmError(
            f"{folder} holds nothing to report: none of {', '.join(FILES)}",
            "Give a folder that `asdm-compress assemble`, `apply`, `calibrate`, `switch`, `optimize`, `distill` or "
            "`evaluate` wrote.",
        )
    schedule, switching = (load_schedule(found[file]) if file in found else None for file in (SCHEDULE, SWITCHING))
    if switching is None and schedule is not None and any(a.member is not None for a in schedule.actions):
        schedule, switching = None, schedule  # of a switched model, whose members it names
    calibration = _facts_beside(found, SCHEDULE, CalibrationFacts, "contestants")
    switched = _facts_beside(found, SWITCHING, SwitchingFacts, "entrants")
    recipe = load_recipe(found[RECIPE]) if RECIPE in found else None
    training = _training(found[METRICS]) if METRICS in found else None
    if training is None:
        found.pop(METRICS, None)
    return Stages(
        folder=folder,
        name=name or folder.resolve().name,
        place=folder.name if folder.is_absolute() else str(folder),  # a page is sent to others
        recipe=recipe,
        profile=load_profile(found[PROFILE]) if PROFILE in found else None,
        assembly=load_assembly(path) if (path := found.get(assembly_file.FILE_NAME)) else None,
        frontier=load_frontier(path) if (path := found.get(frontier_file.FILE_NAME)) else None,
        evaluation=load_evaluation(path) if (path := found.get(evaluation_file.FILE_NAME)) else None,
        schedule=schedule,
        calibration=calibration,
        switching=switching,
        switched=switched,
        optimized=_facts(found[OPTIMIZED], OptimizedFacts) if OPTIMIZED in found else None,
        training=training,
        routes=tuple(_routes(folder)),
        found=found,
    )


def _find(folder: Path, file: str) -> Path | None:
    """A stage's file in the folder itself or, where it has a folder of its own, one below.

    Raises AsdmError for several: a report is of one student.
    """
    if (folder / file).is_file():
        return folder / file
    if file == METRICS:
        return None  # below it is of a training that begins with this student
    found = [path for path in sorted(folder.glob(f"*/{file}")) if not path.parent.name.startswith(".")]
    found = [path for path in found if path.parent.suffix != RUN]
    if len(found) > 1:
        places = ", ".join(path.parent.name for path in found)
        raise AsdmError(f"{folder} has several {file}: {places}", "A report is of one: move the others elsewhere.")
    return found[0] if found else None


def _facts_beside(found: dict[str, Path], schedule: str, kind: type[Facts], mark: str) -> Facts | None:
    """What the `calibration.json` beside a schedule says, if it is of its kind, which has a part called `mark`; it is
    added to what was found."""
    path = found[schedule].parent / CALIBRATION if schedule in found else None
    if path is None or not path.is_file() or f'"{mark}"' not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    found[f"{CALIBRATION} of {schedule}"] = path
    return _facts(path, kind)


def _facts(path: Path, kind: type[Facts]) -> Facts:
    """What a report needs of a file; raises AsdmError for one that is damaged."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise AsdmError(f"{path} cannot be read: {reason}", "Make it again.") from error


def _training(path: Path) -> Training | None:
    """The lines of a training's journal; one that a kill left half-written is skipped. None without any."""
    losses, probes = [], []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            continue
        if isinstance(line.get("loss"), float):
            losses.append(line)
        elif isinstance(line.get("latent_error"), float):
            probes.append(line)
    return Training(tuple(losses), tuple(probes)) if losses or probes else None


def _routes(folder: Path) -> Iterator[Routes]:
    """The timestep routers in a student's weights, with what its own config says of their convolutions."""
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    config = place / "config.json"
    edits: dict[str, str] = (read_json(config).get("edits") or {}) if config.is_file() else {}
    for file in sorted(place.glob("*.safetensors")) if edits else ():
        try:
            with safe_open(file, "pt") as tensors:  # numpy has no bfloat16
                for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                    site = key.removesuffix(_BOUNDARIES)
                    spec = conv_spec(edits[site]) if key.endswith(_BOUNDARIES) and site in edits else None
                    if spec is not None:
                        boundaries = tensors.get_tensor(key).float().ravel().tolist()
                        sharpness = tensors.get_tensor(f"{site}.slot.time_router.sharpness")
                        yield Routes(site, spec, tuple(boundaries), float(sharpness))
        except (OSError, SafetensorError, TypeError) as error:
            raise AsdmError(f"{file} cannot be read: {error}", "The student's weights are damaged.") from error
