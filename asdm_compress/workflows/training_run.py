"""What a training is asked to be, the devices that accelerate finds for it, and the folder that its run keeps."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch.distributed.fsdp import fully_shard

from asdm_compress.core.distillation import Distillation, dump_distillation
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.files import check_apart, check_output
from asdm_compress.core.processes import PATIENCE
from asdm_compress.core.provenance import content_hash
from asdm_compress.distillation.batches import check_share
from asdm_compress.distillation.journal import METRICS
from asdm_compress.distillation.optimisers import check_optimiser
from asdm_compress.distillation.trainer import LoopSettings
from asdm_compress.models.source import LoadOptions
from asdm_compress.workflows.card import PYTHON

_SETTINGS: Final = "settings.yaml"
_OF_EVALUATION: Final = "settings.json"  # lies in the same place beside the output of `evaluate`
_PARALLEL: Final = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
_MAY_CHANGE: Final = ("learning_rate:", "clip:")  # in a training that goes on


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """What a user asks for: `changes` are values of the training by dotted names, which go before preset and recipe.

    `recipe` is the file, folder or name of the one that the student was made by, where its folder has none.
    `mixed_precision` is accelerate's: no, bf16, fp16, or None for what the launcher says. `trackers` are accelerate's,
    by name.
    """

    teacher: str | None = None
    recipe: str | None = None
    preset: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    loop: LoopSettings = field(default_factory=LoopSettings)
    mixed_precision: str | None = None
    trackers: tuple[str, ...] = ()
    resume: bool = False
    dry_run: bool = False
    overwrite: bool = False
    command: str = PYTHON


def is_sharded(settings: DistillSettings) -> bool:
    """Whether each process is to hold a share of the student: on request, or launched with `--use_fsdp`.

    Raises AsdmError for what cannot be shared out.
    """
    # The sharding is done here (see `distillation.engine`): accelerate must take this for plain data parallelism.
    launched = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not (launched or settings.loop.sharded):
        return False
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise AsdmError("shards are not offloaded to the CPU", "Set fsdp_offload_params to false for the launcher.")
    if settings.loop.compile:
        raise AsdmError("a sharded student is not compiled", "Leave out --compile or --shard.")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise AsdmError("sharding takes torch 2.7 or a later one", "Install it, or leave out --shard.")
    if (settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        raise AsdmError("a sharded student is not trained in fp16, whose gradients are scaled", "Use --dtype bf16.")
    return True


def make_accelerator(options: LoadOptions, settings: DistillSettings, folder: Path) -> Accelerator:
    """accelerate's view of the devices, launched by it or not."""
    _check_trackers(settings.trackers)
    try:
        accelerator = Accelerator(
            cpu=options.device.type == "cpu",
            mixed_precision=settings.mixed_precision,
            log_with=list(settings.trackers) or None,
            project_dir=folder,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise AsdmError(f"accelerate cannot train so: {reason}", "See `accelerate config`.") from error
    kind = str(accelerator.distributed_type.value)
    if kind not in _PARALLEL:
        raise AsdmError(
            f"training with {kind} is not supported",
            "Launch with data parallelism (DDP), accelerate's plain multi-GPU or multi-CPU mode, or with FSDP.",
        )
    return accelerator


def _check_trackers(names: Sequence[str]) -> None:
    known, there = (
        {str(t.value) for t in found} for found in (LoggerType, [LoggerType.ALL, *get_available_trackers()])
    )
    for name in names:
        if name not in known:
            raise AsdmError(f"unknown tracker {name}", f"Known: {', '.join(sorted(known))}.")
        if name not in there:
            raise AsdmError(
                f"the tracker {name} is not installed",
                f"Install its package, for example with `pip install {name}`; {METRICS} is written always.",
                ExitCode.ENVIRONMENT,
            )


def run_folder(out: Path) -> Path:
    """The folder of a training's own, beside that of the student."""
    return out.with_name(out.name + ".run")


def check_places(out: Path, run: Path, student: str, settings: DistillSettings) -> None:
    """Raise AsdmError where something stands in the way of the student's folder or of the run's own."""
    check_apart(out, settings.overwrite, [name for name in (student, settings.teacher) if name is not None])
    if (run / _OF_EVALUATION).is_file() and not (run / _SETTINGS).is_file():
        raise AsdmError(f"{run} holds an evaluation, which nothing else replaces", "Choose another --out.")
    if run.exists() and not (settings.resume or settings.overwrite):
        raise AsdmError(
            f"{run} holds a training that was begun",
            "Go on with it with --resume, or begin anew with --overwrite.",
        )
    if settings.resume and not run.exists():
        raise AsdmError(f"there is no training to go on with: {run} is not there", "Leave --resume out.")


def check_training(out: Path, training: Distillation, settings: DistillSettings, processes: int) -> None:
    """Raise AsdmError for a training that cannot be done here, or whose data its folders would replace."""
    if not settings.dry_run:
        named = (training.data.source, training.probe_captions, settings.preset, settings.recipe)
        read = [_fixed(Path(name).expanduser()) for name in named if name is not None]
        check_output(out, settings.overwrite, None, *read)
        if not settings.resume:
            check_output(run_folder(out), True, None, *read)
    check_optimiser(training.optimiser)
    if settings.loop.sharded and training.optimiser.name == "adamw-8bit":
        raise AsdmError("8-bit optimiser states cannot be sharded", "Use --optimiser adamw, or leave out --shard.")
    check_share(training.batch, processes)


def _fixed(path: Path) -> Path:
    """The part of a pattern such as data/*.parquet that names no files yet; of a path all of it."""
    return next((p for p in (path, *path.parents) if not any(sign in str(p) for sign in "*?[")), path)


def prepare_run(
    run: Path,
    training: Distillation,
    hashes: tuple[str, str],
    data: Mapping[str, Any],
    probed: Sequence[str],
    settings: DistillSettings,
) -> None:
    """Make the run's folder, or see that the one to go on with is of the same training, `probed` on the same.

    `data` are all that decides every item: files that have changed would change the order of all of them.
    """
    text = "# student {}, teacher {}\n".format(*hashes)
    text += f"# data {content_hash(data)}\n"
    if training.probe_captions is not None:
        text += f"# captions of the probe {content_hash({'probed': list(probed)})}\n"
    text += dump_distillation(training)
    path = run / _SETTINGS
    if run.exists() and not settings.resume:
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    before, now = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
    for old, new in zip_longest(before, now, fillvalue="nothing"):
        if old != new and not old.strip().startswith(_MAY_CHANGE):
            raise AsdmError(
                f"{run} holds another training: it has `{old.strip('# ')}`, this one `{new.strip('# ')}`",
                "Go on with the same student, teacher and settings; the learning rate and the clipping alone may be "
                "others. Or begin anew with --overwrite.",
            )
    path.write_text(text, encoding="utf-8")
