"""Writes pipelines so that they open again without any option."""

from __future__ import annotations

import filecmp
import inspect
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.files import AGAIN, choose_weights, is_weights
from asdm_compress.models.folder import absent_parts
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.streaming import WEIGHTS, Entry, TensorReader, reading, write_sharded
from asdm_compress.models.transformers_4 import write_for_transformers_4

_WEIGHTS: Final = (".safetensors", ".bin")
_KEPT: Final = (".json", ".txt", ".model")  # configs, vocabularies and merges
# What was found for a model as it is.
_MEASURED: Final = (
    "assembly.json", "frontier.json", "eval.json", "report.json", "calibration.json", "optimize.json", "sampling.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileLayout:
    """How weight files are named and cut: the `variant` in their names, and the most bytes of one.

    A folder of a variant opens only where that is asked for. The default size is diffusers' own.
    """

    variant: str | None = None
    shard_bytes: int = 10 * 2**30


PLAIN: Final = FileLayout()


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path, layout: FileLayout = PLAIN) -> None:
    """Write a diffusers folder, every part in the precision that it has.

    Without a dtype, diffusers opens every part in fp32, but transformers takes what the text encoder's config says: of
    a pipeline saved in fp16, the two then do not fit together. The config is made to say fp32; a dtype that is asked
    for when the folder is opened goes before it.
    """
    with quiet_libraries():
        pipeline.save_pretrained(folder, variant=layout.variant, max_shard_size=layout.shard_bytes)
    leave_out_defaults(pipeline.scheduler, folder / "scheduler")
    open_in_fp32(folder)
    write_for_transformers_4(folder)


def leave_out_defaults(scheduler: SchedulerMixin, folder: Path) -> None:
    """Take out of a scheduler's saved config what nobody has chosen.

    diffusers writes its class's defaults down as if somebody had: made into another sampler, such as one that spaces
    timesteps differently, the saved one would then pass them on, where the original has that sampler's own.
    """
    path, chosen = folder / SCHEDULER_CONFIG_NAME, dict(scheduler.config)
    parameters = inspect.signature(type(scheduler).__init__).parameters
    unchosen = {
        name
        for name in chosen.get("_use_default_values", ())
        if name in parameters and chosen.get(name) == parameters[name].default
    }
    written = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in written.items() if name not in unchosen}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def link_equal_files(copy: Path, original: Path) -> None:
    """Make the weight files below a folder that are equal to those at the same place of another one file with them.

    Where the file system has no links they stay copies.
    """
    for path in copy.rglob("*"):
        twin = original / path.relative_to(copy)
        if path.suffix in _WEIGHTS and twin.is_file() and filecmp.cmp(path, twin, shallow=False):
            link = path.with_name(f".{path.name}")
            try:
                link.hardlink_to(twin)
            except OSError:
                return
            link.replace(path)


def save_unet(unet: UNet2DConditionModel, entries: Sequence[Entry], folder: Path, layout: FileLayout = PLAIN) -> None:
    """Write a UNet folder from a UNet on the meta device and the tensors that it is to have, one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        unet.save_config(folder)
    write_sharded(folder, entries, layout.shard_bytes, layout.variant)


def check_rest(source: Path, allow_pickle: bool = False) -> None:
    """Raise AsdmError where a pipeline folder's weights other than its UNet's are damaged, or are no numbers.

    They are read one at a time; whoever copies files does not look into them. So too where one of them is not there.
    """
    for part in sorted(_parts(source)):
        if choose_weights(path.name for path in part.iterdir())[0]:
            with reading(part, allow_pickle) as reader:
                for name in reader.names():
                    reader.get(name)  # which looks at its numbers


def copy_rest(
    source: Path,
    folder: Path,
    unet: UNet2DConditionModel,
    dtype: torch.dtype | None,
    layout: FileLayout = PLAIN,
    left: Collection[str] = (),
    allow_pickle: bool = False,
) -> None:
    """Copy everything of a pipeline folder but its UNet, with `unet`'s class named in the index.

    What was measured of the model in the folder does not hold for the new one, and is left behind, as the files called
    as in `left` are. Of weights that are there twice, only those are copied that would be read; with a `dtype` they are
    converted, one at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, parts = _index(source), _parts(source)
    index |= {name: [None, None] for name in absent_parts(source, index)}
    for part in sorted(source.iterdir()):
        if part in parts:
            _copy_part(part, folder / part.name, dtype, layout, allow_pickle)
        elif part.is_file() and part.suffix in _KEPT and part.name not in (*_MEASURED, *left):
            shutil.copyfile(part, folder / part.name)
    library = "diffusers" if type(unet) is UNet2DConditionModel else type(unet).__module__
    index["unet"] = [library, type(unet).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    open_in_fp32(folder)


def _index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return index


def _parts(source: Path) -> set[Path]:
    """The folders of a pipeline's parts but its UNet's; raises AsdmError where one that it needs is not there."""
    index = _index(source)
    absent = absent_parts(source, index)
    named = {name for name, what in index.items() if isinstance(what, list) and any(what) and name != "unet"}
    for name in ("vae", "text_encoder"):
        if name in named and not choose_weights(path.name for path in (source / name).iterdir())[0]:
            raise AsdmError(f"{source / name} holds no weights", AGAIN)
    return {source / name for name in named if name not in absent}


def _copy_part(source: Path, folder: Path, dtype: torch.dtype | None, layout: FileLayout, allow_pickle: bool) -> None:
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _KEPT and not is_weights(path.name):  # of shards the index is made anew
            shutil.copyfile(path, folder / path.name)
    names, _ = choose_weights(path.name for path in source.iterdir())
    if not names:
        return
    first = source / names[0]
    stem = WEIGHTS if first.name.startswith(WEIGHTS) else "model"  # diffusers' name, and transformers'
    if dtype is None and len(names) == 1 and first.stat().st_size <= layout.shard_bytes:
        stem = "pytorch_model" if first.name.startswith("pytorch_model") else stem
        mark = f".{layout.variant}" if layout.variant else ""
        shutil.copyfile(first, folder / f"{stem}{mark}{first.suffix}")
        return
    with reading(source, allow_pickle) as reader:
        write_sharded(folder, _entries(reader, dtype), layout.shard_bytes, layout.variant, stem)


def _entries(reader: TensorReader, dtype: torch.dtype | None) -> list[Entry]:
    return [
        Entry(name, reader.shapes[name], dtype if dtype and own.is_floating_point else own, partial(reader.get, name))
        for name, own in reader.dtypes.items()
    ]


def open_in_fp32(folder: Path) -> None:
    """Make the text encoder's config of a pipeline folder say fp32; see `save_pipeline`."""
    path = folder / "text_encoder" / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
