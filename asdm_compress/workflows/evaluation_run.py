"""An evaluation under way: its folder, what identifies it, the costs, and the pairs that are sampled and measured.

Everything that is known already lies in the run's folder, so that a run that was cut off goes on there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import cache_folder, output_file
from asdm_compress.core.processes import Processes
from asdm_compress.core.provenance import content_hash, processor_name
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
from asdm_compress.evaluation.fidelity import compare_pairs, ms_ssim
from asdm_compress.evaluation.instruments import Instruments
from asdm_compress.evaluation.record import ModelFacts
from asdm_compress.evaluation.viewing import Viewing
from asdm_compress.evaluation.weights import sha256_of
from asdm_compress.inheritance.attach import inheriting
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.images import decode
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.workflows.evaluation_input import EvaluateSettings, Opened, PromptSet, ReferenceSet
from asdm_compress.workflows.generate import noting
from asdm_compress.workflows.progress import Progress

_SETTINGS: Final = "settings.json"
_OF_TRAINING: Final = "settings.yaml"  # lies in the same place beside the output of `distill`
_SPEED: Final = "speed.json"
IMAGES: Final = "images"
_REFERENCE_CHUNK: Final = 32
# To be raised when what a chunk holds changes its meaning.
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Costs:
    """What is counted, seconds in turns (none where nothing is timed), and the accelerator's peaks."""

    counted: dict[Role, Counted]
    seconds: Seconds
    peaks: dict[Role, int | None]


def run_key(
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
        corrections = Path(schedule).with_suffix(".safetensors")
        files = [Path(schedule), *([corrections] if corrections.is_file() else [])]
        schedule = " ".join(sha256_of(file) for file in files)
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
        "sampler": [
            {
                "class": type(p.scheduler).__name__,
                # diffusers' own remarks in it are in another order in every process.
                "config": {name: value for name, value in p.scheduler.config.items() if not name.startswith("_")},
            }
            for p in opened.pipelines.values()
        ],
        "switching": [opened.pipelines[role].unet.config.get("switching") for role in ROLES],
        "settings": asdict(replace(opened.rules, images=len(chosen.prompts))),
        "prompts": chosen.sha256,
        "batch": settings.batch,
        "images kept": settings.keep_images,
        "measuring networks": [record.model_dump() for record in instruments.records],
        "precision": str(options.dtype),
        "device": options.device.type,
    }
    return dict(json.loads(json.dumps(key, default=str)))


def prepare_run(run: Path, key: Mapping[str, Any], overwrite: bool) -> None:
    """Make the run's folder, or see that the one that is there is of the same evaluation.

    Raises AsdmError for one of another, unless it may be replaced, and always for one of a training.
    """
    path = run / _SETTINGS
    if (run / _OF_TRAINING).is_file():
        raise AsdmError(f"{run} holds a training, which nothing else replaces", "Choose another --out.")
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
    elif run.is_dir() and any(run.iterdir()) and not overwrite:
        raise AsdmError(
            f"{run} is there, and is of no evaluation", "Choose another --out, or replace it with --overwrite."
        )
    shutil.rmtree(run, ignore_errors=True)
    with output_file(path) as aside:
        aside.write_text(json.dumps(key, indent=1), encoding="utf-8")


def measure_costs(
    opened: Opened,
    chosen: PromptSet,
    settings: EvaluateSettings,
    run: Path,
    progress: Progress,
    processes: Processes,
) -> Costs:
    """What is counted, the seconds in turns, and the peaks: by the main process alone, while the others are still."""
    pipelines, sampling = opened.pipelines, opened.sampling
    path, prompt = run / _SPEED, chosen.prompts[0]
    key = {
        "device": device_name(pipelines["teacher"].device),
        "threads": torch.get_num_threads(),
        "repeats": settings.repeats,
    }

    def count_and_time() -> Costs:
        with noting(progress), progress.stage("Counting"):
            rules: dict[Role, str | None] = {"teacher": None, "model": settings.inherit}
            counted = {role: count_costs(pipelines[role], sampling[role], rules[role]) for role in ROLES}
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
                if before["key"] == key:
                    return Costs(counted, before["seconds"], before["peaks"])
            except (ValueError, KeyError, TypeError):
                pass  # cut short by a crash: it is timed again
        seconds: Seconds = {}
        with (
            inheriting(pipelines["model"], settings.inherit) if settings.inherit else nullcontext(),
            noting(progress),
            progress.bar("Timing in turns") as bar,
        ):
            if settings.repeats:
                seconds = time_in_turns(pipelines, prompt, sampling, settings.repeats, bar)
            peaks = {role: peak_while_sampling(pipelines[role], prompt, sampling[role]) for role in ROLES}
        with output_file(path) as aside:
            aside.write_text(json.dumps({"key": key, "seconds": seconds, "peaks": peaks}), encoding="utf-8")
        return Costs(counted, seconds, peaks)

    processes.wait()  # until the others are still
    return processes.on_main(count_and_time)


def measure_pairs(
    opened: Opened, chosen: PromptSet, instruments: Instruments, rows: range, run: Path, keep: int
) -> dict[str, Tensor]:
    """Sample some prompts with both, and measure: everything that is kept of these images."""
    prompts = [chosen.prompts[i] for i in rows]
    viewing = opened.rules.viewing
    found: dict[str, Tensor] = {}
    latents: list[Tensor] = []
    images: list[list[Image]] = []
    for role in ROLES:
        pipeline = opened.pipelines[role]
        sampling = replace(opened.sampling[role], seed=opened.rules.seed + rows.start)
        drawn, pictures = _sample(pipeline, prompts, sampling)
        if not bool(drawn.isfinite().all()):
            raise AsdmError(
                f"the {role}'s latents are no finite numbers: nothing can be measured on them",
                "Does it overflow in this dtype? Try --dtype fp32 or bf16.",
            )
        latents.append(drawn)
        images.append(pictures)
        measured = instruments.of_prompted(viewing.all_of(pictures), prompts)
        if instruments.reader is not None:
            measured |= instruments.of_scenes(pictures, [chosen.captions[i] for i in rows])
        found |= {f"{role}.{name}": tensor for name, tensor in measured.items()}
        for i, picture in zip(rows, pictures, strict=True):
            if i < keep:
                with output_file(run / image_name(role, i)) as aside:
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


def image_name(role: Role, index: int) -> str:
    """Where the image of a pair lies, from the run's folder or the evaluation's."""
    return f"{IMAGES}/{role}/{index:06d}.png"


def reference_features(
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


def device_name(device: torch.device) -> str:
    """The processor's or the accelerator's own name."""
    return processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
