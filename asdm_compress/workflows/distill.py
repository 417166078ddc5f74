"""`distill`: a student trained by its teacher, into a folder like the student's own."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.core.distillation import Distillation
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_space, output_file, output_folder
from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.core.recipe import dump_recipe
from asdm_compress.core.units import format_seconds
from asdm_compress.distillation.batches import Batches
from asdm_compress.distillation.cache import LatentCache, Share, cached
from asdm_compress.distillation.data import open_source
from asdm_compress.distillation.encoding import Encoder
from asdm_compress.distillation.experts import idle_experts
from asdm_compress.distillation.image_folder import ImageFolder
from asdm_compress.distillation.journal import METRICS
from asdm_compress.distillation.losses import noise_scheduler
from asdm_compress.distillation.pairs import FeaturePair, find_pairs, given_pairs
from asdm_compress.distillation.probe import Probe
from asdm_compress.distillation.rehearsal import Forecast, rehearse
from asdm_compress.distillation.selection import add_lora, fold_lora, phases_of, units_around_cuts
from asdm_compress.distillation.sources import CaptionSource, Source
from asdm_compress.distillation.trainer import Outcome, Subjects, Trainer
from asdm_compress.evaluation.prompts import probe_prompts, read_prompts, understands_scenes
from asdm_compress.models.families import architecture
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.saving import copy_rest
from asdm_compress.models.source import LoadOptions
from asdm_compress.models.tree import meta_copy
from asdm_compress.reporting.grid import labelled_grid
from asdm_compress.sampling.images import decode
from asdm_compress.sampling.schedulers import choose_scheduler
from asdm_compress.sampling.settings import SamplingSettings, check_text_to_image
from asdm_compress.workflows.card import Origin, write_card
from asdm_compress.workflows.progress import Progress, Silent
from asdm_compress.workflows.student import RECIPE, StudentAndTeacher, open_student
from asdm_compress.workflows.training_run import (
    DistillSettings,
    check_places,
    check_training,
    is_sharded,
    make_accelerator,
    prepare_run,
    run_folder,
)
from asdm_compress.workflows.training_section import choose_training, damage_before

_PROBE_STEPS: Final = 10
_SAMPLES: Final = "samples"
_SHOWN: Final = 4
_HALF: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class DistillResult:
    """What a training came to; of a dry run there is the forecast alone."""

    out: Path
    training: Distillation
    pairs: tuple[FeaturePair, ...]
    forecast: Forecast
    outcome: Outcome | None = None
    items: int = 0
    skipped: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """For the terminal."""
        if self.outcome is None:
            return [f"{self.items:,} items of data. {self.forecast.text()}"]
        found = self.outcome
        lines: list[str] = []
        if found.first and found.last and found.best:
            probes = {f"after {found.steps} steps": found.last}
            if found.best_step != found.steps:
                probes = {f"at step {found.best_step}": found.best, **probes} if found.best_step else probes
            told = ", ".join(f"{p.latent_error:.4g} (damage {p.damage:.4g}) {when}" for when, p in probes.items())
            first = f"{found.first.latent_error:.4g} (damage {found.first.damage:.4g}) before"
            lines.append(f"Latent error on the probe's prompts: {first}, {told}.")
        if found.best_step == 0:
            lines.append("The weights are those from before the training: no probe has seen better ones.")
        elif found.best_step is not None:
            lines.append(f"The weights are those of step {found.best_step}, the best that a probe has seen.")
        lines.append(
            f"Wrote {self.out} after {format_seconds(found.seconds)}: the student, {RECIPE}, {METRICS}; "
            f"checkpoints are in {run_folder(self.out)}."
        )
        return lines

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "training": self.training.model_dump(mode="json"),
            "pairs": [[pair.student, pair.teacher] for pair in self.pairs],
            "forecast": self.forecast.as_json(),
            "items": self.items,
            "skipped": [list(pair) for pair in self.skipped],
            "outcome": None if self.outcome is None else asdict(self.outcome),
        }


def distill(student: str | Path, out: str | Path, settings: DistillSettings | None = None) -> DistillResult:
    """Train the student in a folder as its recipe says, unless `settings` change that, and write it to `out`.

    On a GPU where there is one, in fp32 unless `settings` name another precision. Raises AsdmError, see `run_distill`.
    """
    return run_distill(str(student), Path(out), LoadOptions.here(), settings or DistillSettings(), Silent())


def run_distill(
    student: str, out: Path, options: LoadOptions, settings: DistillSettings, progress: Progress
) -> DistillResult:
    """Train `student` and write it to `out`; the run's own folder stays beside it, under the name with `.run`.

    Raises AsdmError for bad input, for data that cannot be used, and for a training that diverges. `out` appears whole
    or not at all; a run that was killed goes on with `resume`.
    """
    out = out if out.name else out.absolute()  # `.` has no name to put the run's folder beside
    run = run_folder(out)
    if not settings.dry_run:
        check_places(out, run, student, settings)
    settings = replace(settings, loop=replace(settings.loop, sharded=is_sharded(settings)))
    accelerator = make_accelerator(options, settings, run)
    if accelerator.num_processes == 1 and settings.loop.sharded:
        progress.note("one process has nothing to share out, so the student is whole")
        settings = replace(settings, loop=replace(settings.loop, sharded=False))
    accelerator.wait_for_everyone()  # nobody makes anything before all have looked
    opened, exact = _open(student, settings, options, accelerator, progress)
    training = choose_training(opened.recipe, opened.teacher, settings.preset, settings.changes)
    teacher = opened.teacher.unet
    check_training(out, training, settings, accelerator.num_processes)
    source = open_source(training.data, understands_scenes(opened.teacher))
    probed = _probed(opened.teacher, training, source, progress)
    pairs = _pairs(opened, training, progress)
    phases = phases_of(training, opened.student, damage_before(opened.recipe))
    around = units_around_cuts(opened.student, teacher, opened.plan)
    if training.trains == "lora":
        add_lora(opened.student, training.lora_rank, training.seed)
    noising = noise_scheduler(opened.teacher.scheduler.config)
    _choose_scheduler(opened.teacher, training, progress)
    places = ([p.student for p in pairs], [p.teacher for p in pairs])
    with progress.stage("Estimating memory and time"):
        forecast = rehearse(
            opened.student, opened.teacher, training, phases, around, places, settings.loop, accelerator
        )
    if not settings.dry_run:  # which shows it as its result
        progress.note(forecast.text())
    result = DistillResult(out, training, pairs, forecast, items=len(source))
    if settings.dry_run:
        return result
    if accelerator.is_main_process:
        best = 4 * opened.student.num_parameters() if training.probe_every else 0  # beside every checkpoint
        _check_space(run, (forecast.checkpoint_bytes + best) * (settings.loop.keep + 1))
        prepare_run(run, training, opened.hashes, source.identity(), probed, settings)
    cache = _data(source, opened, training, accelerator, progress)
    share = Share(accelerator.process_index, accelerator.num_processes)
    batches = Batches(cache, training, int(noising.config.num_train_timesteps), share, settings.loop.micro_batch)
    subjects = Subjects(
        opened.student, teacher if training.losses.needs_teacher else None, noising, batches, phases,
        tuple(places[0]), tuple(places[1]), around,
    )  # fmt: skip
    probe = _probe(opened.teacher, exact, probed, training, accelerator, progress)
    del exact  # which is for that alone
    outcome, trained = _train(subjects, opened, training, probe, run, accelerator, settings, progress)
    opened = replace(opened, student=trained)
    result = replace(result, outcome=outcome, items=len(cache), skipped=tuple(cache.skipped))
    if accelerator.is_main_process:
        if training.trains == "lora":
            fold_lora(opened.student)
        with progress.stage("Writing"), output_folder(out, settings.overwrite) as aside:
            _write(aside, opened, result, run, settings, accelerator)
    accelerator.wait_for_everyone()
    return result


def _choose_scheduler(teacher: StableDiffusionPipeline, training: Distillation, progress: Progress) -> None:
    """One for latents made from captions, and for probes."""
    if notice := choose_scheduler(teacher, None, _PROBE_STEPS, training.data.sampling_steps):
        progress.note(notice)


def _check_space(run: Path, wanted: int) -> None:
    """Raise AsdmError where a run has no room for so many bytes, of which it has some where it goes on."""
    check_space(run, wanted - sum(path.stat().st_size for path in run.rglob("*") if path.is_file()))


def _open(
    student: str, settings: DistillSettings, options: LoadOptions, accelerator: Accelerator, progress: Progress
) -> tuple[StudentAndTeacher, UNet2DConditionModel | None]:
    """Student and teacher, the teacher on this process's device and in the precision that it runs in.

    And the teacher's UNet as it was before, in the host's memory, where it runs in half precision.
    """
    exact: UNet2DConditionModel | None = None
    with progress.stage("Opening student and teacher"):
        opened = open_student(student, settings.teacher, options, settings.recipe)
        is_half = str(accelerator.mixed_precision) in _HALF
        if is_half and accelerator.is_main_process and not settings.dry_run:
            exact = copy.deepcopy(opened.teacher.unet).cpu()
        opened.teacher.to(accelerator.device)
        if is_half:
            with quiet_libraries():
                opened.teacher.unet.to(_HALF[str(accelerator.mixed_precision)])
    for note in opened.notes():
        progress.note(note)
    check_text_to_image(opened.teacher)
    return opened, exact


def _pairs(opened: StudentAndTeacher, training: Distillation, progress: Progress) -> tuple[FeaturePair, ...]:
    if not training.losses.feature:
        return ()
    if training.pairs is not None and not training.pairs:
        raise AsdmError("the training compares features, and its pairs name no place", "Leave pairs out, or feature.")
    student, teacher = opened.student, opened.teacher.unet
    pairs = (
        find_pairs(student, teacher, opened.plan, training.losses.features)
        if training.pairs is None
        else given_pairs(student, teacher, training.pairs)
    )
    progress.note(f"features are compared at {len(pairs)} places: {', '.join(map(str, pairs))}")
    return pairs


def _probe(
    teacher: StableDiffusionPipeline,
    exact: UNet2DConditionModel | None,
    prompts: Sequence[str],
    training: Distillation,
    accelerator: Accelerator,
    progress: Progress,
) -> Probe | None:
    """What probes the student, in the main process, where that is asked for."""
    if not training.probe_every or not accelerator.is_main_process:
        return None
    with progress.stage("Sampling the teacher for the probe"):
        exact = None if exact is None else exact.to(accelerator.device)
        return Probe(teacher, prompts, SamplingSettings(_PROBE_STEPS, training.data.guidance), exact=exact)


def _train(
    subjects: Subjects,
    opened: StudentAndTeacher,
    training: Distillation,
    probe: Probe | None,
    run: Path,
    accelerator: Accelerator,
    settings: DistillSettings,
    progress: Progress,
) -> tuple[Outcome, UNet2DConditionModel]:
    paint: Callable[[int], None] = _paint_nothing if probe is None else partial(_paint, opened.teacher, probe, run)
    if settings.trackers:
        accelerator.init_trackers("distill")
    with progress.meter("Training") as meter:
        trainer = Trainer(subjects, training, settings.loop, run, accelerator, probe, meter, paint)
        outcome = trainer.train()
    for expert in idle_experts(outcome.expert_use):
        progress.note(f"the expert {expert} is hardly used")
    if settings.trackers:
        # Not `end_training`, which ends the process group too, that still has to wait for the student's folder.
        for tracker in accelerator.trackers:
            tracker.finish()
    return outcome, trainer.student


def _data(
    source: Source,
    opened: StudentAndTeacher,
    training: Distillation,
    accelerator: Accelerator,
    progress: Progress,
) -> LatentCache:
    sampling = SamplingSettings(training.data.sampling_steps, training.data.guidance)
    encoder = Encoder(opened.teacher, sampling, makes_images=isinstance(source, CaptionSource))
    share = Share(accelerator.process_index, accelerator.num_processes)
    with progress.bar("Encoding images and captions") as bar:
        cache = cached(source, encoder, training.data.on_bad, share, accelerator.wait_for_everyone, bar)
    if cache.skipped:
        name, reason = cache.skipped[0]
        progress.note(f"{len(cache.skipped)} of {len(source)} items are left out; the first is {name}: {reason}")
    return cache


def _probed(
    teacher: StableDiffusionPipeline, training: Distillation, source: Source, progress: Progress
) -> tuple[str, ...]:
    """The prompts of the probe, which choose the weights that are kept and so must not be trained on."""
    path = training.probe_captions
    if path is None or not training.probe_every:
        return probe_prompts(teacher, training.probe_prompts)
    prompts = probe_prompts(teacher, training.probe_prompts, read_prompts(Path(path).expanduser()))
    if isinstance(source, CaptionSource):
        trained: set[str | None] = set(source.captions)
    elif isinstance(source, ImageFolder):
        trained = {caption for _, caption in source.entries}
    else:
        trained = set()
        progress.note(f"of such data it is not known here whether they have captions of {path}: they must not")
    if both := trained.intersection(prompts):
        raise AsdmError(
            f"{len(both)} of the captions of {path} are trained on, the first is `{min(filter(None, both))}`",
            "Give --probe-captions a file of others.",
        )
    return prompts


def _paint_nothing(step: int) -> None:
    """Without probes there are no pictures."""


def _paint(teacher: StableDiffusionPipeline, probe: Probe, run: Path, step: int) -> None:
    """The probe's first pictures of teacher and student, side by side; they cost the decoding alone."""
    rows = [
        (name, decode(teacher, latents[:_SHOWN].to(teacher.device, teacher.vae.dtype)))
        for name, latents in (("teacher", probe.wanted), (f"student\nstep {step}", probe.found))
    ]
    with output_file(_picture(run, step)) as aside:
        labelled_grid(rows, probe.prompts[:_SHOWN]).save(aside)


def _picture(run: Path, step: int) -> Path:
    return run / _SAMPLES / f"step-{step:08d}.png"


def _write(
    folder: Path,
    opened: StudentAndTeacher,
    result: DistillResult,
    run: Path,
    settings: DistillSettings,
    accelerator: Accelerator,
) -> None:
    """The student's folder anew, with the trained UNet, and what it was trained by."""
    source, student = opened.source, opened.student
    assert source.path is not None
    with quiet_libraries():  # which remark on every change of precision
        student.to(torch.device("cpu"), opened.stored)
    if source.kind == "pipeline folder":
        copy_rest(source.path, folder, student, None)
    with quiet_libraries():
        student.save_pretrained(folder / "unet" if source.kind == "pipeline folder" else folder)
    assert result.outcome is not None
    report = {
        **asdict(result.outcome),
        "command": settings.command,
        "teacher_weights": opened.hashes[1],
        "items": result.items,
        "skipped_items": len(result.skipped),
        "mixed_precision": str(accelerator.mixed_precision),
        "processes": accelerator.num_processes,
        "device": processor_name() if accelerator.device.type == "cpu" else torch.cuda.get_device_name(),
        "versions": versions(),
    }
    teacher = Origin(opened.teacher_source).reference  # which need not be the one that the recipe was made for
    base = opened.recipe.base.model_copy(update={"model": teacher, "architecture": architecture(opened.teacher.unet)})
    recipe = opened.recipe.model_copy(
        update={
            "base": base,
            "distillation": result.training,
            "inheritance": None,  # a schedule is calibrated to weights, and these are others
            "provenance": {**opened.recipe.provenance, "weights": opened.hashes[1], "distilled": report},
        }
    )
    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    # Pictures of the weights that are here, not of the last ones.
    grid = _picture(run, result.outcome.best_step or 0)
    if grid.is_file():
        shutil.copyfile(grid, folder / "grid.png")
    if (run / METRICS).is_file():
        shutil.copyfile(run / METRICS, folder / METRICS)
    origin = Origin(opened.teacher_source, settings.command)
    # The recipe's evidence is of the student before it was trained.
    told = recipe.model_copy(update={"evidence": None})
    # The teacher may have run in another precision, which bytes of activations go by.
    teacher = meta_copy(opened.teacher.unet).to(student.dtype)
    write_card(folder, result.out.name, origin, told, teacher, student)
