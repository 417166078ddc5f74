"""The distillation section of a recipe: losses, data, optimiser and length of a training, as people write them."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from asdm_compress.core.checked_yaml import Strict, as_yaml, read_checked
from asdm_compress.core.defaults import GUIDANCE, STEPS
from asdm_compress.core.errors import AsdmError

Features = Literal["blocks", "borders", "self-attention"]
Weighting = Literal["none", "min-snr", "truncated"]
Trains = Literal["auto", "all", "experts", "around-cuts", "lora"]
OnBad = Literal["refuse", "skip"]
OptimiserName = Literal["adamw", "adamw-fused", "adamw-8bit"]

SCENES: Final = "scenes"
DEFAULT_PRESET: Final = "asdm"
MINI_PRESET: Final = "mini-sd"
_FAR: Final = 0.5  # a damage from which on everything has to be learnt anew
_LEAST: Final = 0.02  # of a preset's learning rate


class Losses(Strict):
    """Weights of the terms of L = task + output + feature + trajectory; a term of weight 0 is not computed.

    `features` says where features are compared, `normalise` whether each is divided by the teacher's own energy there.
    `weighting` is over timesteps, for the first two: `min-snr` as in 2303.09556, `truncated` the weights of the clean
    latents' error plus one, cut off at `snr_gamma`. `caption_dropout` is the share of rows without their caption.
    `random_conditioning` gives noisy rows another row's caption (2504.02011), with probability exp(-rate (1 - t / T));
    0 is off. `trajectory_steps` is the length of the rollouts that the last term compares.
    """

    task: float = Field(default=1.0, ge=0)
    output: float = Field(default=1.0, ge=0)
    feature: float = Field(default=1.0, ge=0)
    trajectory: float = Field(default=0.0, ge=0)
    features: Features = "blocks"
    normalise: bool = False
    weighting: Weighting = "none"
    snr_gamma: float = Field(default=5.0, gt=0)
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    random_conditioning: float = Field(default=0.0, ge=0)
    trajectory_steps: int = Field(default=4, ge=1)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of weight above 0 asks the teacher."""
        return self.output > 0 or self.feature > 0 or self.trajectory > 0

    @model_validator(mode="after")
    def _has_a_target(self) -> Losses:
        if self.task == 0 and self.output == 0 and self.trajectory == 0:
            raise ValueError("one of task, output and trajectory must be above 0: features alone train no prediction")
        return self


class Optimiser(Strict):
    """AdamW and its schedule; `schedule` is one of diffusers' (constant, cosine, linear, …), after `warmup_steps`, or
    half of a phase where that is less."""

    name: OptimiserName = "adamw"
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    schedule: str = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    weight_decay: float = Field(default=1e-2, ge=0)
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)


class Data(Strict):
    """Where images and captions come from.

    `source` is `scenes` (the bundled world), a folder of captioned images, a text file of captions, whose latents the
    teacher then makes, with so many `sampling_steps` and this `guidance`, or one of the formats that
    `distillation.tables` reads. `size` bounds the number of items.
    """

    source: str = SCENES
    size: int | None = Field(default=None, ge=1)
    image_column: str = "image"
    caption_column: str = "text"
    on_bad: OnBad = "refuse"
    sampling_steps: int = Field(default=STEPS, ge=1)
    guidance: float = Field(default=GUIDANCE, ge=0)


class Pair(Strict):
    """Two modules whose outputs are compared, by their paths in student and teacher."""

    student: str
    teacher: str


class Expected(Strict):
    """What a training is expected to take: bytes on one device, and the MACs of all its steps."""

    memory_bytes: int
    macs: int
    trained_parameters: int


class Distillation(Strict):
    """A whole training; `batch` is images per step over all devices. `lora_rank` matters where LoRA trains.

    `experts_share` is the share of the steps that train the slots alone where `trains` is `auto` and there are slots.
    Every `probe_every` steps (0 is never) the averaged weights are measured on so many held-out prompts, the first of
    the text file `probe_captions` where there is one, and those of least damage are what is kept. `pairs` are features
    to compare in place of those that `losses.features` finds; `expected` is told, not used.
    """

    preset: str | None = None
    losses: Losses = Losses()
    optimiser: Optimiser = Optimiser()
    data: Data = Data()
    trains: Trains = "auto"
    experts_share: float = Field(default=0.2, ge=0, lt=1)
    lora_rank: int = Field(default=16, ge=1)
    steps: int = Field(default=10_000, ge=1)
    batch: int = Field(default=64, ge=1)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    probe_every: int = Field(default=250, ge=0)
    probe_prompts: int = Field(default=8, ge=2)
    probe_captions: str | None = None
    seed: int = 0
    pairs: list[Pair] | None = None
    expected: Expected | None = None


def distillation_presets() -> dict[str, Path]:
    """The trainings that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    # A wheel holds them inside the package, a source tree beside it.
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), None)
    return {path.stem: path for path in sorted((folder / "distillation").glob("*.yaml"))} if folder else {}


def load_preset(name: str) -> Distillation:
    """A training by the name of a bundled one or by its file.

    Raises AsdmError where there is neither, and, with the file and the line, for anything in it that is not right.
    """
    presets = distillation_presets()
    path = presets.get(name, Path(name))
    if name not in presets and path.suffix not in (".yaml", ".yml"):
        close = difflib.get_close_matches(name, presets)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise AsdmError(
            f"there is no distillation preset {name}", f"{hint}Known: {', '.join(presets)}; or give a file."
        )
    content = read_checked(path, Distillation, "distillation preset", "See recipes/distillation.").content
    return content.model_copy(update={"preset": content.preset or path.stem})


def changed(base: Distillation, changes: dict[str, Any]) -> Distillation:
    """A training with some values changed, by dotted names such as `losses.task`.

    Raises AsdmError for names and values that the schema does not take.
    """
    content = base.model_dump()
    for name, value in changes.items():
        *way, last = name.split(".")
        here: Any = content
        for part in way:
            here = here.get(part) if isinstance(here, dict) else None
        if not isinstance(here, dict):
            raise AsdmError(f"a training has no setting {name}", "Their names are those of recipes/distillation.")
        here[last] = value
    try:
        return Distillation.model_validate(content)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"])
        said = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
        said = "there is no such setting" if first.get("type") == "extra_forbidden" else said
        raise AsdmError(f"the training's {where or 'settings'}: {said}") from error


def rate_for(highest: float, damage: float) -> float:
    """A preset's learning rate, made right for a student of such a damage (‖ε_S − ε_T‖² / ‖ε_T‖²) before training.

    A student that starts near its teacher has a short way to go, and a rate for a long one would first take it away:
    the way goes as the root of the damage, and from half on the rate is the preset's. On `mini-sd`, 60 steps of 16 at
    2e-4 took a student of damage 0.0002 to 0.0006, at 5e-5 only to 0.00024, where one of 0.02 gained as much at 2e-4 as
    at 1e-4 and nothing at 5e-4, and BK-SDM's bare cut, of 0.9, needs that.
    """
    share = math.sqrt(max(damage, 0.0) / _FAR)
    return float(f"{highest * min(max(share, _LEAST), 1.0):.3g}")


def dump_distillation(content: Distillation) -> str:
    """As YAML text."""
    return as_yaml(content.model_dump(mode="json", exclude_none=True))
