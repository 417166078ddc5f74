"""`asdm-compress distill`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output, end_with
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.processes import is_main_process, sharing_fate

_PRECISIONS = {"auto": None, "fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def distill(
    student: Annotated[
        str, typer.Argument(help="The folder that `assemble` or `apply` wrote, or with --recipe a published student.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the trained student.")] = Path("distilled"),
    teacher: Annotated[
        str | None, typer.Option(help="The model that it was made of; by default what its recipe names.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="asdm, mini-sd, bk-sdm-v1, bk-sdm-v2, segmind, laptop, koala, or a file; else the recipe's."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="What STUDENT was made by, where its folder does not say: of a published one such as bk-sdm-small-v1."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, a .txt of captions, a dataset on disk, .parquet, .tar, hf:NAME, or scenes."
        ),
    ] = None,
    data_size: Annotated[int | None, typer.Option(min=1, help="At most so many items.")] = None,
    image_column: Annotated[str | None, typer.Option(help="The images' column in a table.")] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="The captions' column in a table; text by default.")
    ] = None,
    on_bad: Annotated[
        str | None, typer.Option(help="Broken images and missing captions: refuse, or skip and count them.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the optimiser.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per step, over all devices.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="At most so many images at once on a device.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate of the schedule.")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, cosine, linear, … as diffusers has them.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps in which the learning rate rises.")] = None,
    optimiser: Annotated[str | None, typer.Option(help="adamw, adamw-fused or adamw-8bit.")] = None,
    clip: Annotated[float | None, typer.Option("--max-grad-norm", help="Largest norm of the gradient.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the averaged weights.")] = None,
    task: Annotated[
        float | None, typer.Option(help="Weight of the task loss, against the noise that was added.")
    ] = None,
    output_weight: Annotated[
        float | None, typer.Option("--output-weight", help="Weight of the loss against the teacher's prediction.")
    ] = None,
    feature: Annotated[float | None, typer.Option(help="Weight of the feature loss.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Where features are compared: blocks, borders or self-attention.")
    ] = None,
    normalise: Annotated[
        bool | None,
        typer.Option(
            "--normalise/--no-normalise", help="Divide each feature's loss by the energy of the teacher's feature."
        ),
    ] = None,
    weighting: Annotated[str | None, typer.Option(help="Weighting of timesteps: none, min-snr or truncated.")] = None,
    trajectory: Annotated[float | None, typer.Option(help="Weight of the loss of short rollouts.")] = None,
    trajectory_steps: Annotated[int | None, typer.Option(min=1, help="Steps of such a rollout.")] = None,
    caption_dropout: Annotated[float | None, typer.Option(help="Share of the rows without their caption.")] = None,
    random_conditioning: Annotated[
        float | None, typer.Option(help="Rate of swapped captions, 5 for example; 0 is none.")
    ] = None,
    trains: Annotated[
        str | None, typer.Option(help="all, experts (what is in the slots), around-cuts, lora, or auto.")
    ] = None,
    experts_share: Annotated[
        float | None, typer.Option(help="Share of the steps that trains the slots alone, before all trains (auto).")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of --trains lora.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Anything else of the training: losses.snr_gamma=3."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for about a third more time.")
    ] = False,
    compile_student: Annotated[bool, typer.Option("--compile", help="Compile the student with torch.compile.")] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread weights, gradients and states over the processes (FSDP).")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that stay.")] = 2,
    probe_every: Annotated[
        int | None, typer.Option(min=0, help="Steps between probes on held-out prompts; 0 is none.")
    ] = None,
    probe_prompts: Annotated[int | None, typer.Option(min=2, help="Prompts of a probe.")] = None,
    probe_captions: Annotated[
        str | None,
        typer.Option(help="A .txt of captions to probe on, that the data does not have; else such as the model knows."),
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.jsonl.")] = 10,
    tracker: Annotated[
        list[str] | None, typer.Option(help="Also tell tensorboard, wandb, … as accelerate knows them.")
    ] = None,
    sampling_steps: Annotated[
        int | None, typer.Option(min=1, help="The teacher's steps where it makes the latents.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="The teacher's guidance there, and that of the probes.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in OUT.run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print memory and duration, and stop.")] = False,
    device: o.Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16, mixed; auto is fp32 on a CPU, bf16 on a GPU, or the launcher's.")
    ] = "auto",
    threads: o.Threads = None,
    prediction_type: o.PredictionType = None,
    allow_pickle: o.AllowPickle = False,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Train a student to do what its teacher does; on many devices under `accelerate launch -m asdm_compress`.

    Everything is in the recipe's distillation section, or in a preset; the options here change single values of it.
    --dry-run prints memory and duration first. Checkpoints lie in OUT.run, and --resume goes on from the last one.
    """
    dtype = o.own_name(dtype)
    if dtype not in _PRECISIONS:
        raise AsdmError(f"unknown dtype {dtype!r}", f"Use {', '.join(_PRECISIONS)}.")
    first = is_main_process()
    output = Output(quiet or not first, as_json and first)
    given = _settings(setting or [])
    with output.stage("Starting torch"):
        load = o.load_options(device, "fp32", threads, allow_pickle, prediction_type=prediction_type)
        from asdm_compress.workflows.distill import run_distill
        from asdm_compress.workflows.training_run import DistillSettings

    from asdm_compress.distillation.trainer import LoopSettings

    precision = _PRECISIONS[dtype]
    if dtype == "auto" and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        precision = "no" if load.device.type == "cpu" else "bf16"
    changes = {
        "data.source": data,
        "data.size": data_size,
        "data.image_column": image_column,
        "data.caption_column": caption_column,
        "data.on_bad": on_bad,
        "steps": steps,
        "batch": batch,
        "optimiser.learning_rate": learning_rate,
        "optimiser.schedule": schedule,
        "optimiser.warmup_steps": warmup,
        "optimiser.name": optimiser,
        "optimiser.clip": clip,
        "ema_decay": ema,
        "losses.task": task,
        "losses.output": output_weight,
        "losses.feature": feature,
        "losses.features": features,
        "losses.normalise": normalise,
        "losses.weighting": weighting,
        "losses.trajectory": trajectory,
        "losses.caption_dropout": caption_dropout,
        "losses.random_conditioning": random_conditioning,
        "trains": trains,
        "losses.trajectory_steps": trajectory_steps,
        "experts_share": experts_share,
        "lora_rank": lora_rank,
        "probe_every": probe_every,
        "probe_prompts": probe_prompts,
        "probe_captions": probe_captions,
        "data.sampling_steps": sampling_steps,
        "data.guidance": guidance,
        "seed": seed,
    }
    changes = {name: value for name, value in changes.items() if value is not None} | given
    settings = DistillSettings(
        teacher,
        recipe,
        preset,
        changes,
        LoopSettings(micro_batch, gradient_checkpointing, compile_student, save_every, keep, log_every, shard),
        precision,
        tuple(tracker or ()),
        resume,
        dry_run,
        overwrite,
        o.command_line(),
    )
    with sharing_fate(end_with):
        result = run_distill(student, out, load, settings, output)
    for line in result.lines():
        output.show(line)
    output.result(result.as_json())


def _settings(given: list[str]) -> dict[str, Any]:
    """What `--set` gives, its values read as YAML."""
    import yaml

    found: dict[str, Any] = {}
    for one in given:
        name, is_there, value = one.partition("=")
        if not is_there:
            raise AsdmError(f"--set {one} sets nothing", "Write it as --set losses.snr_gamma=3.")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise AsdmError(f"--set {one}: its value cannot be read") from error
    return found
