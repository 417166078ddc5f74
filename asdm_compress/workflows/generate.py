"""`generate`: images as PNG files and one labelled grid, with a teacher beside it where one is named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_apart, output_folder
from asdm_compress.evaluation.fidelity import Fidelity, compare
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.inheritance.remapping import CarriedOver
from asdm_compress.models.loading import open_pipeline
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.sampling.images import Samples, sample
from asdm_compress.sampling.own_steps import made_for, own_steps
from asdm_compress.sampling.schedulers import make_scheduler, sample_alike, scheduler_like
from asdm_compress.sampling.settings import SamplingSettings, check_size
from asdm_compress.workflows.progress import Progress

CALIBRATED: Final = "calibrated"
_SCHEDULE: Final = "inheritance.yaml"


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """`images_per_prompt` images of each prompt; image i of all has seed `sampling.seed + i`.

    `inherit` is a sampling mode, the path of a schedule, or `calibrated` for the schedule in the model's own folder; it
    is for the model and not for what it is compared with. `batch` images are sampled at once. With `own_steps` a
    model that was made for a number of steps, as an optimized one is, is sampled in these; with `own_guidance` and
    `own_size` all are sampled by the guidance and in the size that the model was made for. Raises AsdmError for a
    negative prompt without guidance.
    """

    sampling: SamplingSettings
    prompts: Sequence[str]
    images_per_prompt: int = 1
    scheduler: str | None = None
    compare: str | None = None
    inherit: str | None = None
    own_steps: bool = False
    own_guidance: bool = False
    own_size: bool = False
    negative_prompt: str | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        self._check(self.sampling)

    def _check(self, sampling: SamplingSettings) -> None:
        if self.negative_prompt is not None and sampling.guidance <= 1:
            raise AsdmError(
                "a negative prompt does nothing without guidance", "Use --guidance above 1, or leave it out."
            )

    def as_made_for(self, model: Source) -> SamplingSettings:
        """How all are sampled, but for the steps; raises AsdmError for a negative prompt without guidance."""
        made, found = made_for(model.path), self.sampling
        if made is not None and made.guidance is not None and self.own_guidance:
            found = replace(found, guidance=made.guidance)
        if made is not None and made.image_size is not None and self.own_size:
            found = replace(found, image_size=made.image_size)
        self._check(found)
        return found


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The files written, seconds per image by model, and the fidelity where there were two."""

    files: Sequence[str]
    seconds: dict[str, float]
    fidelity: Fidelity | None

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [f"{name}: {seconds:.3f} s per image" for name, seconds in self.seconds.items()]
        if self.fidelity:
            lines.append(f"PSNR {self.fidelity.psnr:.2f} dB, SSIM {self.fidelity.ssim:.4f} against the teacher")
        return lines

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        fidelity = None
        if self.fidelity:
            fidelity = {"psnr": self.fidelity.psnr, "ssim": self.fidelity.ssim, "latent_mse": self.fidelity.latent_mse}
        return {"files": list(self.files), "seconds_per_image": self.seconds, "fidelity": fidelity}


def run_generate(
    model: str,
    out: Path,
    options: LoadOptions,
    settings: GenerateSettings,
    progress: Progress,
    overwrite: bool = False,
) -> GenerateResult:
    """Sample and write; raises AsdmError for models, schedulers or sizes that cannot be used."""
    names = [model] if settings.compare is None else [settings.compare, model]
    if settings.compare == model and settings.inherit is None:
        raise AsdmError(f"{model} is compared with itself", "Name another model with --compare, or give --inherit.")
    given = tuple(names)
    check_apart(out, overwrite, names)
    prompts = [prompt for prompt in settings.prompts for _ in range(settings.images_per_prompt)]
    common = settings.as_made_for(resolve(model, options))
    if common != settings.sampling:
        progress.note(f"{model} is made for guidance {common.guidance:g}{_size(common)}, which is taken")
    runs: list[Samples] = []
    samplers: list[Any] = []
    for number, name in enumerate(names):
        with progress.stage(f"Opening {name}"):
            source = resolve(name, options)
            pipeline = open_pipeline(source, options)
            if settings.scheduler:
                pipeline.scheduler = make_scheduler(settings.scheduler, pipeline)
            if settings.scheduler and samplers and not is_schedule(settings.inherit):
                pipeline.scheduler = scheduler_like(samplers[0], pipeline.scheduler)
        samplers.append(pipeline.scheduler)
        steps = own_steps(source.path, pipeline.scheduler) if settings.own_steps else None
        sampling = common if steps is None else replace(common, steps=steps)
        if sampling.steps != common.steps:
            progress.note(f"{name} is made for {sampling.steps} steps")
        for note in source.notes:
            progress.note(note)
        check_size(pipeline, sampling)
        with progress.bar(f"Sampling {name}") as bar:
            # The teacher that is compared with computes everything.
            rule = rule_for(settings.inherit, source) if number == len(names) - 1 else None
            with inheriting(pipeline, rule) if rule else nullcontext(), noting(progress):
                negative = settings.negative_prompt
                runs.append(sample(pipeline, prompts, sampling, settings.batch, bar, negative))
    if not sample_alike(samplers[0], samplers[-1]):
        kinds = " and ".join(type(sampler).__name__ for sampler in samplers)
        progress.note(f"the two are sampled by their own samplers, {kinds}; --scheduler gives both one")
    if len({run.latents.shape for run in runs}) > 1:
        raise AsdmError("the two models make images of different sizes", "Give both one --image-size.")
    if settings.inherit:
        names[-1] += f" inheriting {Path(settings.inherit).name if is_schedule(settings.inherit) else settings.inherit}"
    shown = [f"{Path(model).name or model}{name.removeprefix(model)}" for model, name in zip(given, names, strict=True)]
    labels = [f"{name}\n{run.seconds:.2f} s/image" for name, run in zip(shown, runs, strict=True)]
    captions = [f"{prompt} [seed {settings.sampling.seed + i}]" for i, prompt in enumerate(prompts)]
    grid = labelled_grid(list(zip(labels, [run.images for run in runs], strict=True)), captions)
    files = []
    with output_folder(out, overwrite) as aside:
        for role, run in zip(("teacher", "student") if len(runs) == 2 else ("image",), runs, strict=True):
            for i, image in enumerate(run.images):
                name = f"{role}-{settings.sampling.seed + i:04d}-{_slug(prompts[i])}.png"
                image.save(aside / name)
                files.append(name)
        grid.save(aside / "grid.png")
    seconds = {name: run.seconds for name, run in zip(names, runs, strict=True)}
    return GenerateResult([*files, "grid.png"], seconds, compare(runs[1], runs[0]) if len(runs) == 2 else None)


def _size(sampling: SamplingSettings) -> str:
    return "" if sampling.image_size is None else f" and images of {sampling.image_size} pixels"


def is_schedule(inherit: str | None) -> bool:
    """Whether this is a schedule's file, which is for one sampler, and no mode."""
    return inherit is not None and Path(inherit).suffix in (".yaml", ".yml")


def rule_for(inherit: str | None, source: Source) -> str | Path | None:
    """What a pipeline is to inherit by; raises AsdmError where the schedule of the model's folder is not there."""
    if inherit != CALIBRATED:
        return inherit
    # In the folder itself, or, where a calibration was written into it, in a folder of its own there.
    folder = source.path
    found: list[Path] = []
    if folder is not None:
        found = [folder / _SCHEDULE] if (folder / _SCHEDULE).is_file() else sorted(folder.glob(f"*/{_SCHEDULE}"))
    if not found:
        raise AsdmError(
            "this model has no calibrated schedule in its folder",
            "Make one with `asdm-compress assemble --inherit latency=0.6x`, or with `asdm-compress calibrate` and give "
            "the path of its inheritance.yaml.",
        )
    if len(found) > 1:
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in found)
        raise AsdmError(f"this model has several calibrated schedules: {names}", "Give the path of one of them.")
    return found[0]


@contextmanager
def noting(progress: Progress) -> Iterator[None]:
    """Say as a note what feature inheritance has to say; other warnings go on as they are."""
    with warnings.catch_warnings(record=True) as told:
        yield
    for one in told:
        if issubclass(one.category, CarriedOver):
            progress.note(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"
