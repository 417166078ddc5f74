"""`evaluate`: a model beside its teacher, at the same prompts and seeds, into `eval.json` with its protocol card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from asdm_compress.core.files import check_apart, check_output, output_folder
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.core.provenance import package_version, versions
from asdm_compress.evaluation.chunks import Chunks
from asdm_compress.evaluation.costs import Role
from asdm_compress.evaluation.distances import Array
from asdm_compress.evaluation.instruments import Instruments
from asdm_compress.evaluation.protocols import OWN, Rules, choose_rules, clip_departure
from asdm_compress.evaluation.record import (
    FILE_NAME,
    Evaluation,
    ImagePair,
    Machine,
    Measure,
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
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.reporting.measures import protocol_card
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
from asdm_compress.workflows.evaluation_run import (
    IMAGES,
    device_name,
    image_name,
    measure_costs,
    measure_pairs,
    prepare_run,
    reference_features,
    run_key,
)
from asdm_compress.workflows.generate import CALIBRATED, noting, rule_for
from asdm_compress.workflows.progress import Progress, Silent

CARD: Final = "protocol.md"
_RUN: Final = ".run"


def evaluate(model: str | Path, out: str | Path, settings: EvaluateSettings | None = None) -> Evaluation:
    """A model's figures beside its teacher's, on prompts that no search has seen; `eval.json` and images lie in `out`.

    The teacher is the one that the model's recipe names, unless the settings name another (`against`). On a GPU where
    there is one, in fp32. Raises AsdmError, see `run_evaluate`.
    """
    found = run_evaluate(str(model), Path(out), LoadOptions.here(), settings or EvaluateSettings(), Silent())
    assert found is not None  # of one process
    return found


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
    check_apart(out, overwrite, [model, *([settings.against] if settings.against else [])])
    check_output(out, overwrite, None, *settings.read())
    if settings.inherit == CALIBRATED:
        settings = replace(settings, inherit=str(rule_for(CALIBRATED, resolve(model, options, beside=True))))
    run = out.with_name(out.name + _RUN)
    rules, departures = choose_rules(settings.protocol, settings.changes)
    weights = find_all_weights(rules, settings)
    reference = open_reference(settings, weights)
    opened = open_models(model, options, settings, rules, departures, progress)
    rules = opened.rules
    chosen = choose_prompt_set(opened, settings)
    reads = bool(chosen.captions) and opened.side == IMAGE_SIZE
    with progress.stage("Opening what measures"):
        instruments = Instruments(weights, reads, options.device)
    if settings.protocol != OWN.name and instruments.clip:
        departures += clip_departure(instruments.clip.width)
    facts = model_facts(opened, settings)
    key = run_key(opened, chosen, settings, facts, instruments, options)
    processes.on_main(lambda: prepare_run(run, key, overwrite))
    costs = measure_costs(opened, chosen, settings, run, progress, processes)
    keep = min(settings.keep_images, len(chosen.prompts))
    chunks = Chunks(run / "chunks", len(chosen.prompts), settings.batch)
    processes.on_main(chunks.drop_damaged)
    with (
        inheriting(opened.pipelines["model"], settings.inherit) if settings.inherit else nullcontext(),
        noting(progress),
        progress.bar(f"Sampling {len(chosen.prompts)} pairs") as bar,
    ):
        chunks.compute(lambda rows: measure_pairs(opened, chosen, instruments, rows, run, keep), processes, bar)
    theirs = reference_features(reference, instruments, rules.viewing, processes, progress)
    processes.part()
    if not processes.is_main:
        return None
    found = chunks.load()
    with progress.stage("Intervals"):
        measures, used = _measures(found, theirs, reference, opened, chosen, instruments)
        measures += [*speed_measures(costs.seconds, opened.calls)] if costs.seconds else []
        measures += cost_measures(costs.counted, costs.peaks)
    evaluation = Evaluation(
        model=facts["model"],
        teacher=facts["teacher"],
        protocol=_protocol(opened, chosen, instruments, used),
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
            shutil.copytree(run / IMAGES, aside / IMAGES)
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
            teacher_image=image_name("teacher", i) if i < keep else None,
            model_image=image_name("model", i) if i < keep else None,
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


def _protocol(opened: Opened, chosen: PromptSet, instruments: Instruments, reference: Reference | None) -> Protocol:
    rules = opened.rules
    return Protocol(
        name=rules.name,
        prompts=chosen.origin,
        prompt_count=len(chosen.prompts),
        prompts_sha256=chosen.sha256,
        steps=rules.steps,
        sampler=type(opened.pipelines["teacher"].scheduler).__name__,
        unet_calls=opened.calls["teacher"],
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
        device=device_name(options.device),
        dtype=str(options.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=processes.count,
        versions={
            **versions(),
            "torchmetrics": package_version("torchmetrics") or "",
            "scipy": package_version("scipy") or "",
        },
    )


def _array(found: Mapping[str, Tensor], name: str) -> Array | None:
    return np.asarray(found[name].double().numpy(), dtype=np.float64) if name in found else None
