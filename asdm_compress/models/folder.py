"""Diffusers folders: their JSON files and their parts, every weight of which must be there and fit."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

from asdm_compress.core.errors import AsdmError, is_out_of_memory
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.files import check_folder, first_line, variant_of
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.recognise import ONLY, check_numbers, what_is
from asdm_compress.models.source import LoadOptions

_UNET_CLASSES: Final = {c.__name__: c for c in (UNet2DConditionModel, AssembledUNet2DConditionModel)}
# Built upon this package, and found where diffusers finds it: by the name that the whole package exports.
_EXPORTED: Final = ("SwitchedUNet2DConditionModel",)
_OPTIONAL: Final = ("safety_checker", "feature_extractor", "image_encoder")
_OTHER_PIPELINES: Final = ("XL", "Flux", "StableDiffusion3", "Kandinsky", "UnCLIP", "Upscale")


def unet_class(folder: Path, config: Mapping[str, Any]) -> Any:
    """The class that a UNet's config names; raises AsdmError where that is no UNet."""
    name = config.get("_class_name")
    if name in _EXPORTED:
        return getattr(import_module(__name__.partition(".")[0]), str(name))
    if name not in _UNET_CLASSES:
        raise AsdmError(f"{folder} holds a {name}, not a UNet2DConditionModel", "Give the UNet's folder.")
    return _UNET_CLASSES[name]


def open_part(part_class: Any, folder: Path, dtype: torch.dtype, options: LoadOptions) -> Any:
    """A part of a pipeline, every weight read from its files; raises AsdmError for any that does not fit."""
    with readable(folder):
        check_folder(folder, options.allow_pickle)
        part, info = part_class.from_pretrained(
            folder, dtype=dtype, variant=variant_of(folder), output_loading_info=True, local_files_only=True
        )
    # Text encoders of old checkpoints carry position ids, which are no weights.
    check_numbers(folder, part.state_dict())
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    refuse_misfit(folder, info["missing_keys"], unexpected, info["mismatched_keys"])
    return part


def refuse_misfit(place: Path, missing: Collection[Any], unexpected: Collection[Any], mismatched: Any) -> None:
    """Raise AsdmError, naming the first, for names that are missing or too many, and for wrong shapes."""
    other = what_is([str(name) for name in unexpected]) if missing else None
    if other is not None:
        raise AsdmError(f"{place} is {other}", ONLY)
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if keys:
            raise AsdmError(
                f"the weights in {place} do not fit their config: {len(keys)} {kind}, the first is {next(iter(keys))}",
                "The files are damaged, or the config.json is not that of the weights.",
            )


def check_index(folder: Path) -> None:
    """Raise AsdmError, naming what it is, for a pipeline folder of another architecture."""
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if "unet" not in index or any(mark in name for mark in _OTHER_PIPELINES):
        raise AsdmError(f"{folder} is a {name}, which is not supported", ONLY)


def absent_parts(folder: Path, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the parts that a pipeline's index names, those that have no folder and that it can do without.

    Whoever opens a model without its safety checker has never fetched that. Raises AsdmError for any other part.
    """
    named = [name for name, what in index.items() if isinstance(what, (list, tuple)) and any(what)]
    absent = [name for name in named if not (folder / name).is_dir()]
    needed = next((name for name in absent if name not in _OPTIONAL), None)
    if needed is not None:
        raise AsdmError(
            f"{folder} has no {needed}, which its model_index.json names", "The folder is no whole diffusers folder."
        )
    return tuple(absent)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object of a diffusers folder; raises AsdmError, naming the file, where there is none."""
    if not path.is_file():
        raise AsdmError(f"{path} is missing", "The folder is no whole diffusers folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AsdmError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AsdmError(f"{path} is no valid JSON: {first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise AsdmError(f"{path} is no JSON object", "Fetch or copy the file again.")
    return content


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Turn the loaders' errors about files into one message; silence what they print besides."""
    try:
        with quiet_libraries():
            yield
    except AsdmError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise AsdmError(f"{place} cannot be read: {first_line(error)}", "Is every file there, and whole?") from error
