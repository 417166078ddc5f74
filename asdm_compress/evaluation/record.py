"""`eval.json`: what an evaluation measured, on which images, by which protocol, on which machine.

An evaluation compares a *model* with its *teacher* in one run. Its figures are `measures`, one row each: the teacher's
estimate, the model's, and the change from the one to the other, each with its n and its 95 % interval. What only
exists between the two, such as the PSNR of image pairs, has the model's estimate alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from asdm_compress.core.checked_json import read_record

SCHEMA_VERSION: Final = 1
FILE_NAME: Final = "eval.json"
# Sets of prompts that no search has seen.
WORLD_PROMPTS: Final = "the bundled world's captions"
GENERAL_PROMPTS: Final = "general prompts"
BUILT_IN: Final = (WORLD_PROMPTS, GENERAL_PROMPTS)

Group = Literal["pairs", "content", "distances", "speed", "memory", "size"]
Change = Literal["difference", "ratio"]
# How an interval was found. `exact` figures are counted and have none: low and high are the value itself.
IntervalMethod = Literal[
    "exact", "bootstrap-bca", "bootstrap-percentile", "bootstrap-centred", "wilson", "t", "order", "none"
]


class _Record(BaseModel):
    # NaN has no place in JSON, and no figure here may be one.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Record):
    """A figure with its 95 % interval from `n` images, pairs or repeats.

    `low` and `high` are None only where `method` is `none`: too few observations for an interval.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    method: IntervalMethod

    @model_validator(mode="after")
    def _interval_is_whole(self) -> Estimate:
        if (self.low is None) != (self.method == "none") or (self.high is None) != (self.method == "none"):
            raise ValueError("an interval has both ends, or its method is none")
        return self


class Measure(_Record):
    """One row of figures.

    `name` is the measure's stable name (see `NAMES`); `part` says of what part it is: an attribute, a number of
    objects, with or without the VAE. `extractor` and `reference` are set where features are compared: the network that
    they come from, and the set that both models' images are compared with (`teacher` for the teacher's own images).
    `better` says which direction is good. Values are in `unit`: `dB`, `s`, `B`, `1` for shares and plain numbers.
    """

    name: str
    group: Group
    unit: Literal["dB", "s", "B", "1", "MACs"]
    title: str
    better: Literal["higher", "lower"] | None
    part: str | None = None
    extractor: str | None = None
    reference: str | None = None
    teacher: Estimate | None = None
    model: Estimate | None = None
    change: Estimate | None = None
    change_kind: Change | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _change_has_a_kind(self) -> Measure:
        if (self.change is None) != (self.change_kind is None):
            raise ValueError("a change has a kind")
        return self


# Measures by group. A reader of the file must expect others to be added.
NAMES: Final[dict[Group, tuple[str, ...]]] = {
    "pairs": ("latent_mse", "psnr", "ssim", "ms_ssim", "lpips"),
    # part of prompt_accuracy: None, or `1 object`, `2 objects`, `3 objects`; of attribute_accuracy: shape, colour,
    # size, place, relation, background, count
    "content": ("prompt_accuracy", "attribute_accuracy", "clip_score", "inception_score"),
    "distances": ("frechet", "kernel", "precision", "recall", "cmmd"),
    # parts: `with VAE` (text encoder, loop, VAE), `without VAE` (the sampling loop alone)
    "speed": ("seconds_per_image", "seconds_per_step", "seconds_vae"),
    # parts: `weights`, `activations of one UNet pass`, `peak while sampling` (accelerators alone)
    "memory": ("bytes",),
    # parts of macs: `one UNet pass` (not of switched UNets, whose passes differ), `one image` (every pass of a run,
    # less what is inherited)
    "size": ("parameters", "macs"),
}


class OwnSampling(_Record):
    """How a model samples that does not sample as the protocol says: its sampler, steps, and calls of the UNet."""

    sampler: str
    steps: int
    unet_calls: int


class ModelFacts(_Record):
    """One of the two models: the name it was given by, the content hash of its UNet's weights, its UNet's class.

    `inherit` is the rule by which it inherits features, as given; the teacher has none. `sampling` is None where it
    samples as the teacher does.
    """

    name: str
    weights: str
    unet_class: str
    is_recipe_student: bool
    inherit: str | None = None
    sampling: OwnSampling | None = None


class Extractor(_Record):
    """A network that figures rest on: its name, the file or folder of its weights, and their SHA-256."""

    name: str
    weights: str
    sha256: str
    input_size: int


class Reference(_Record):
    """The set of images that distances are to: its path, or what was rendered; its size; a hash of its content."""

    name: str
    kind: Literal["rendered scenes", "image folder", "statistics"]
    count: int
    sha256: str


class Protocol(_Record):
    """How the figures were made: whoever repeats them needs all of it. `name` is `own` or a published protocol's.

    `measured_size` is the side in pixels of the images that extractors saw, after `resize_filter`, or None where they
    saw them as they were. `departures` are what differs from the published protocol.
    """

    name: str
    prompts: str
    prompt_count: int
    prompts_sha256: str
    steps: int
    sampler: str
    unet_calls: int
    guidance: float
    seed: int
    image_size: int
    measured_size: int | None
    resize_filter: str | None
    extractors: list[Extractor]
    reference: Reference | None
    departures: list[str]


class Machine(_Record):
    """Where it ran, with how many processes, and the versions of what can change a figure."""

    device: str
    dtype: str
    threads: int
    processes: int
    versions: dict[str, str]


class ImagePair(_Record):
    """A pair of images: prompt, seed, and the figures of this pair alone, by the names of `NAMES`.

    `teacher_image` and `model_image` are PNG files relative to `eval.json`, None where they were not kept. `objects` is
    the number of objects that the prompt names, `teacher_right` and `model_right` whether the image shows them all as
    asked; these are of the bundled world alone. `teacher_clip` and `model_clip` are CLIP scores.
    """

    index: int
    prompt: str
    seed: int
    teacher_image: str | None
    model_image: str | None
    latent_mse: float
    psnr: float
    ssim: float
    ms_ssim: float | None = None
    lpips: float | None = None
    objects: int | None = None
    teacher_right: bool | None = None
    model_right: bool | None = None
    teacher_clip: float | None = None
    model_clip: float | None = None


class Evaluation(_Record):
    """The whole of `eval.json`. `timings` are the raw seconds per repeat, by measure and part, taken in turns."""

    schema_version: Literal[1] = 1
    model: ModelFacts
    teacher: ModelFacts
    protocol: Protocol
    machine: Machine
    command: str
    measures: list[Measure]
    pairs: list[ImagePair]
    timings: dict[str, dict[Literal["teacher", "model"], list[float]]]

    def find(self, name: str, part: str | None = None, reference: str | None = None) -> Measure | None:
        """The measure of that name and part, and to that reference where one is given; None where there is none."""
        for measure in self.measures:
            if (measure.name, measure.part) == (name, part) and reference in (None, measure.reference):
                return measure
        return None

    def save(self, path: Path) -> None:
        """Write `eval.json`."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_evaluation(path: Path) -> Evaluation:
    """Read an `eval.json`; raises AsdmError for one that is damaged or of another schema version."""
    return read_record(path, Evaluation, SCHEMA_VERSION, "Evaluate again.")
