"""`evaluate`: a model beside its teacher, at the same prompts and seeds, into `eval.json` with its protocol card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import cache_folder, check_output, output_file, output_folder
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.core.provenance import content_hash, package_version, processor_name, versions
from asdm_compress.evaluation.chunks import Chunks
from asdm_compress.evaluation.costs import (
    ROLES,
    Counted,
    Role,
    Seconds,
    count_costs,
    loop_arguments,
    peak_while_sampling,
    time_in_turns,
)
from asdm_compress.evaluation.distances import Array
from asdm_compress.evaluation.fidelity import compare_pairs, ms_ssim
from asdm_compress.evaluation.instruments import Instruments
from asdm_compress.evaluation.protocols import OWN, Rules, choose_rules, clip_departure
from asdm_compress.evaluation.record import (
    FILE_NAME,
    Evaluation,
    ImagePair,
    Machine,
    Measure,
    ModelFacts,
    Protocol,
    Reference,
)
from asdm_compress.evaluation.reference import rendered_scenes
from asdm_compress.evaluation.summary import (
    cmmd_measures,
    content_measures,
    cost_measures,
    distance_measures,
    pair_measures,
    speed_measures,
)
from asdm_compress.evaluation.viewing import Viewing
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.models.source import LoadOptions
from asdm_compress.reporting.measures import protocol_card
from asdm_compress.sampling.images import decode
from asdm_compress.sampling.schedulers import evaluations
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scenes.world import IMAGE_SIZE
from asdm_compress.workflows.evaluation_input import (
    EvaluateSettings,
    Opened,
    PromptSet,
    ReferenceSet,
    choose_prompt_set,
    find_all_weights,
    model_facts,
    open_models,
    open_reference,
)
from asdm_compress.workflows.generate import noting
from asdm_compress.workflows.progress import Progress

CARD: Final = "protocol.md"
_RUN: Final = ".run"
_SETTINGS: Final = "settings.json"
_SPEED: Final = "speed.json"
_IMAGES: Final = "images"
_REFERENCE_CHUNK: Final = 32
# To be raised when what a chunk holds changes its meaning.
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class _Costs:
    """What is counted, seconds in turns (none where nothing is timed), and the accelerator's peaks."""

    counted: dict[Role, Counted]
    seconds: Seconds
    peaks: dict[Role, int | None]


def run_evaluate(
    model: str,
    out: Path,
    options: LoadOptions,
    settings: EvaluateSettings,
    progress: Progress,
    overwrite: bool = False,
    processes: Processes = ALONE,
) -> Evaluation | None:
    """Evaluate and write `out`; until it is whole the run lives beside it, under the name with `.run`, and goes on.

    Of several processes the main one alone has a result; the others help it to sample and to measure. Raises AsdmError
    for input that cannot be used, weights that are missing, and a run under way that is of other settings.
    """
    check_output(out, overwrite)
    run = out.with_name(out.name + _RUN)
    rules, departures = choose_rules(settings.protocol, settings.changes)
    weights = find_all_weights(rules, settings)
    reference = open_reference(settings, weights)
    opened = open_models(model, options, settings, rules, departures, progress)
    chosen = choose_prompt_set(opened, settings)
    reads = bool(chosen.captions) and opened.side == IMAGE_SIZE
    with progress.stage("Opening what measures"):
        instruments = Instruments(weights, reads, options.device)
    if settings.protocol != OWN.name and instruments.clip:
        departures += clip_departure(instruments.clip.width)
    facts = model_facts(opened, settings)
    key = _key(opened, chosen, settings, facts, instruments, options)
    processes.on_main(lambda: _prepare(run, key, overwrite))
    costs = _costs(opened, chosen, settings, run, progress, processes)
    keep = min(settings.keep_images, len(chosen.prompts))
    chunks = Chunks(run / "chunks", len(chosen.prompts), settings.batch)
    processes.on_main(chunks.drop_damaged)
    with (
        inheriting(opened.pipelines["model"], settings.inherit) if settings.inherit else nullcontext(),
        noting(progress),
        progress.bar(f"Sampling {len(chosen.prompts)} pairs") as bar,
    ):
        chunks.compute(lambda rows: _chunk(opened, chosen, instruments, rows, run, keep), processes, bar)
    theirs = _reference_chunks(reference, instruments, rules.viewing, processes, progress)
    processes.part()
    if not processes.is_main:
        return None
    found = chunks.load()
    calls = evaluations(opened.pipelines["teacher"].scheduler, rules.steps)
    with progress.stage("Intervals"):
        measures, used = _measures(found, theirs, reference, opened, chosen, instruments)
        measures += [*speed_measures(costs.seconds, calls)] if costs.seconds else []
        measures += cost_measures(costs.counted, costs.peaks)
    evaluation = Evaluation(
        model=facts["model"],
        teacher=facts["teacher"],
        protocol=_protocol(opened, chosen, instruments, used, calls),
        machine=_machine(options, processes),
        command=settings.command,
        measures=measures,
        pairs=_pairs(found, chosen, rules, keep),
        timings=costs.seconds,
    )
    with progress.stage("Writing"), output_folder(out, overwrite) as aside:
        evaluation.save(aside / FILE_NAME)
        (aside / CARD).write_text(protocol_card(evaluation), encoding="utf-8")
        if keep:
            shutil.copytree(run / _IMAGES, aside / _IMAGES)
    shutil.rmtree(run)
    return evaluation


def _measures(
    found: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    reference: ReferenceSet,
    opened: Opened,
    chosen: PromptSet,
    instruments: Instruments,
) -> tuple[list[Measure], Reference | None]:
    """The figures that rest on images, and the reference that they are to: the user's, else the bundled world's."""
    measures = [*pair_measures(found, opened.side), *content_measures(found)]
    used = reference.record
    if instruments.reader is not None:
        scenes, drawn = rendered_scenes([len(caption.objects) for caption in chosen.captions])
        measures += distance_measures(found, "scene", "scene-reader", scenes, drawn.name)
        used = used or drawn
    name = "" if reference.record is None else reference.record.name
    features = _array(theirs, "inception")
    measures += distance_measures(found, "inception", "inception", features, name, reference.moments)
    measures += cmmd_measures(found, _array(theirs, "cmmd"), name)
    return measures, used


def _key(
    opened: Opened,
    chosen: PromptSet,
    settings: EvaluateSettings,
    facts: Mapping[Role, ModelFacts],
    instruments: Instruments,
    options: LoadOptions,
) -> dict[str, Any]:
    """All that what is kept of a run depends on, as JSON can hold it."""
    schedule = settings.inherit
    if schedule and Path(schedule).is_file():
        schedule = hashlib.sha256(Path(schedule).read_bytes()).hexdigest()
    rest = [
        weights_hash(part)
        for role in ROLES
        for part in (opened.pipelines[role].vae, opened.pipelines[role].text_encoder)
    ]
    key = {
        "version": _VERSION,
        "models": {role: facts[role].model_dump() for role in ROLES},
        "other parts": content_hash({"hashes": rest}),
        "inherited by": schedule,
        "sampler": [type(p.scheduler).__name__ for p in opened.pipelines.values()],
        "settings": asdict(replace(opened.rules, images=len(chosen.prompts))),
        "prompts": chosen.sha256,
        "batch": settings.batch,
        "images kept": settings.keep_images,
        "measuring networks": [record.model_dump() for record in instruments.records],
        "precision": str(options.dtype),
        "device": options.device.type,
    }
    return dict(json.loads(json.dumps(key)))


def _prepare(run: Path, key: Mapping[str, Any], overwrite: bool) -> None:
    """Make the run's folder, or see that the one that is there is of the same evaluation."""
    path = run / _SETTINGS
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            before = {}
        other = [name for name in key if before.get(name) != key[name]]
        if not other:
            return
        if not overwrite:
            raise AsdmError(
                f"{run} holds an evaluation that was begun with other {other[0]}",
                "Finish it with the same settings, or begin anew with --overwrite.",
            )
    shutil.rmtree(run, ignore_errors=True)
    with output_file(path) as aside:
        aside.write_text(json.dumps(key, indent=1), encoding="utf-8")


def _costs(
    opened: Opened,
    chosen: PromptSet,
    settings: EvaluateSettings,
    run: Path,
    progress: Progress,
    processes: Processes,
) -> _Costs:
    """What is counted, the seconds in turns, and the peaks: by the main process alone, while the others are still."""
    pipelines, sampling = opened.pipelines, opened.sampling
    path, prompt = run / _SPEED, chosen.prompts[0]
    key = {
        "device": _device_name(pipelines["teacher"].device),
        "threads": torch.get_num_threads(),
        "repeats": settings.repeats,
    }

    def count_and_time() -> _Costs:
        with progress.stage("Counting"):
            rules: dict[Role, str | None] = {"teacher": None, "model": settings.inherit}
            counted = {role: count_costs(pipelines[role], sampling, rules[role]) for role in ROLES}
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["key"] == key:
                return _Costs(counted, before["seconds"], before["peaks"])
        seconds: Seconds = {}
        with (
            inheriting(pipelines["model"], settings.inherit) if settings.inherit else nullcontext(),
            noting(progress),
            progress.bar("Timing in turns") as bar,
        ):
            if settings.repeats:
                seconds = time_in_turns(pipelines, prompt, sampling, settings.repeats, bar)
            peaks = {role: peak_while_sampling(pipelines[role], prompt, sampling) for role in ROLES}
        with output_file(path) as aside:
            aside.write_text(json.dumps({"key": key, "seconds": seconds, "peaks": peaks}), encoding="utf-8")
        return _Costs(counted, seconds, peaks)

    processes.wait()  # until the others are still
    return processes.on_main(count_and_time)


def _chunk(
    opened: Opened, chosen: PromptSet, instruments: Instruments, rows: range, run: Path, keep: int
) -> dict[str, Tensor]:
    """Sample some prompts with both, and measure: everything that is kept of these images."""
    prompts = [chosen.prompts[i] for i in rows]
    sampling = replace(opened.sampling, seed=opened.rules.seed + rows.start)
    viewing = opened.rules.viewing
    found: dict[str, Tensor] = {}
    latents: list[Tensor] = []
    images: list[list[Image]] = []
    for role in ROLES:
        pipeline = opened.pipelines[role]
        drawn, pictures = _sample(pipeline, prompts, sampling)
        latents.append(drawn)
        images.append(pictures)
        measured = instruments.of_prompted(viewing.all_of(pictures), prompts)
        if instruments.reader is not None:
            measured |= instruments.of_scenes(pictures, [chosen.captions[i] for i in rows])
        found |= {f"{role}.{name}": tensor for name, tensor in measured.items()}
        for i, picture in zip(rows, pictures, strict=True):
            if i < keep:
                with output_file(run / _image_name(role, i)) as aside:
                    picture.save(aside)
    psnr, ssim = compare_pairs(images[1], images[0])
    found |= {
        "latent_mse": (latents[1].float() - latents[0].float()).square().flatten(1).mean(1),
        "psnr": torch.tensor(psnr),
        "ssim": torch.tensor(ssim),
    }
    scaled = ms_ssim(images[1], images[0])
    if scaled is not None:
        found["ms_ssim"] = torch.tensor(scaled)
    return found | instruments.of_pairs(images[0], images[1])


@torch.no_grad()
def _sample(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], sampling: SamplingSettings
) -> tuple[Tensor, list[Image]]:
    texts = encode(pipeline, prompts, sampling.guidance)
    latents: Tensor = pipeline(**loop_arguments(pipeline, texts, sampling)).images
    return latents, decode(pipeline, latents)


def _image_name(role: Role, index: int) -> str:
    return f"{_IMAGES}/{role}/{index:06d}.png"


def _reference_chunks(
    reference: ReferenceSet, instruments: Instruments, viewing: Viewing, processes: Processes, progress: Progress
) -> Mapping[str, Tensor]:
    """The features of a reference's images; they stay in the cache, for every evaluation with the same networks."""
    folder, record = reference.folder, reference.record
    if folder is None or record is None:
        return {}
    networks = [r.model_dump() for r in instruments.records if r.name in ("inception", "cmmd-clip")]
    key = content_hash({"version": _VERSION, "images": record.sha256, "seen": asdict(viewing), "networks": networks})
    chunks = Chunks(cache_folder() / "references" / key, len(folder), _REFERENCE_CHUNK)
    processes.on_main(chunks.drop_damaged)
    with progress.bar(f"Measuring {len(folder)} images of the reference") as bar:
        chunks.compute(lambda rows: instruments.of_images(folder.read(rows, viewing)), processes, bar)
    return chunks.load() if processes.is_main else {}


def _pairs(found: Mapping[str, Tensor], chosen: PromptSet, rules: Rules, keep: int) -> list[ImagePair]:
    def value(name: str, row: int) -> float | None:
        return float(found[name][row]) if name in found else None

    def right(role: Role, row: int) -> bool | None:
        return bool(found[f"{role}.verdict"][row, 0]) if f"{role}.verdict" in found else None

    return [
        ImagePair(
            index=i,
            prompt=prompt,
            seed=rules.seed + i,
            teacher_image=_image_name("teacher", i) if i < keep else None,
            model_image=_image_name("model", i) if i < keep else None,
            latent_mse=float(found["latent_mse"][i]),
            psnr=float(found["psnr"][i]),
            ssim=float(found["ssim"][i]),
            ms_ssim=value("ms_ssim", i),
            lpips=value("lpips", i),
            objects=len(chosen.captions[i].objects) if chosen.captions else None,
            teacher_right=right("teacher", i),
            model_right=right("model", i),
            teacher_clip=value("teacher.clip_score", i),
            model_clip=value("model.clip_score", i),
        )
        for i, prompt in enumerate(chosen.prompts)
    ]


def _protocol(
    opened: Opened, chosen: PromptSet, instruments: Instruments, reference: Reference | None, calls: int
) -> Protocol:
    rules = opened.rules
    return Protocol(
        name=rules.name,
        prompts=chosen.origin,
        prompt_count=len(chosen.prompts),
        prompts_sha256=chosen.sha256,
        steps=rules.steps,
        sampler=type(opened.pipelines["teacher"].scheduler).__name__,
        unet_calls=calls,
        guidance=rules.guidance,
        seed=rules.seed,
        image_size=opened.side,
        measured_size=rules.view_size,
        resize_filter=rules.viewing.filter,
        extractors=instruments.records,
        reference=reference,
        departures=opened.departures,
    )


def _machine(options: LoadOptions, processes: Processes) -> Machine:
    return Machine(
        device=_device_name(options.device),
        dtype=str(options.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=processes.count,
        versions={
            **versions(),
            "torchmetrics": package_version("torchmetrics") or "",
            "scipy": package_version("scipy") or "",
        },
    )


def _device_name(device: torch.device) -> str:
    return processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def _array(found: Mapping[str, Tensor], name: str) -> Array | None:
    return np.asarray(found[name].double().numpy(), dtype=np.float64) if name in found else None
