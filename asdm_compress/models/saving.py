"""Writes pipelines so that they open again without any option."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.models.files import choose_weights, variant_of
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.streaming import Entry, TensorReader, reading, write_safetensors, write_sharded

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
    open_in_fp32(folder)


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

    They are read one at a time; whoever copies files does not look into them.
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
) -> None:
    """Copy everything of a pipeline folder but its UNet, with `unet`'s class named in the index.

    What was measured of the model in the folder does not hold for the new one, and is left behind. Of weights that are
    there twice, only those are copied that would be read; with a `dtype` they are converted, one at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, parts = _index(source), _parts(source)
    for part in sorted(source.iterdir()):
        if part in parts:
            _copy_part(part, folder / part.name, dtype, layout.variant)
        elif part.is_file() and part.suffix in _KEPT and part.name not in _MEASURED:
            shutil.copyfile(part, folder / part.name)
    library = "diffusers" if type(unet) is UNet2DConditionModel else type(unet).__module__
    index["unet"] = [library, type(unet).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    open_in_fp32(folder)


def _index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return index


def _parts(source: Path) -> set[Path]:
    """The folders of a pipeline's parts but its UNet's."""
    index = _index(source)
    named = {source / name for name, what in index.items() if isinstance(what, list) and name != "unet"}
    return {folder for folder in named if folder.is_dir()}


def _copy_part(source: Path, folder: Path, dtype: torch.dtype | None, named: str | None) -> None:
    folder.mkdir()
    variant = variant_of(source)
    safe = any(path.suffix == ".safetensors" for path in source.iterdir())
    for path in sorted(source.iterdir()):
        if not path.is_file() or (path.suffix not in (*_KEPT, *_WEIGHTS)):
            continue
        is_weights = path.suffix in _WEIGHTS
        if is_weights and (path.suffix == ".safetensors") != safe:
            continue
        if ".fp16" in path.name and variant is None:
            continue
        if not is_weights:
            shutil.copyfile(path, folder / path.name.replace(".fp16", ""))
        elif dtype is None:
            shutil.copyfile(path, folder / _named(path, named, path.suffix))
        else:
            with reading(path) as reader:
                write_safetensors(folder / _named(path, named, ".safetensors"), _converted(reader, dtype))


def _named(path: Path, variant: str | None, suffix: str) -> str:
    """The name that diffusers or transformers look for, of a weight file of a variant, as pickle or safetensors."""
    stem = path.name.replace(".fp16", "").removesuffix(path.suffix)
    if suffix == ".safetensors" and stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")  # transformers' own name of a pickle
    return f"{stem}.{variant}{suffix}" if variant else f"{stem}{suffix}"


def _converted(reader: TensorReader, dtype: torch.dtype) -> list[Entry]:
    entries = []
    for name in reader.names():
        tensor = reader.get(name)
        to = dtype if tensor.is_floating_point() else tensor.dtype
        # The shape has to be known before anything is written; the tensor itself is read again then.
        entries.append(Entry(name, tuple(tensor.shape), to, partial(reader.get, name)))
    return entries


def open_in_fp32(folder: Path) -> None:
    """Make the text encoder's config of a pipeline folder say fp32; see `save_pipeline`."""
    path = folder / "text_encoder" / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
