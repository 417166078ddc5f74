"""From what a user writes, a name, a path or a hub id, to the files it means and what they hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.files import choose_weights, first_line
from asdm_compress.models.folder import check_index, read_json
from asdm_compress.models.names import HUB_NAMES, MINI_SD, MINI_SD_FOLDER, NAMES
from asdm_compress.models.prediction import check_asked
from asdm_compress.models.single_file import inspect_file
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.models.stale import true_config

FILE_SUFFIXES: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_ENTRIES: Final = ("model_index.json", "config.json")
# A student's, or a switched model's.
_OWN: Final = ("recipe.yaml", "inheritance.yaml", "inheritance.safetensors", "switching.yaml", "sampling.json")
_HUB_ID: Final = re.compile(r"^[\w.-]+/[\w.-]+$")


def resolve(reference: str, options: LoadOptions, beside: bool = False) -> Source:
    """Find what `reference` names, and what it is; of weights, names and shapes alone are read.

    A UNet alone that is opened `beside` another model leaves the prediction type that is asked for to that.
    Raises AsdmError for an unknown name (with the nearest known one), a missing path, a named model that is not on this
    machine, files that are damaged or of another kind of model, and a prediction type that is asked for and is not the
    model's.
    """
    source = _find(reference, options)
    if not (beside and source.kind == "unet folder"):
        check_asked(source, options.prediction_type)
    return source


def _find(reference: str, options: LoadOptions) -> Source:
    if options.random_weights and reference not in HUB_NAMES:
        raise AsdmError(
            f"random weights are made for {', '.join(HUB_NAMES)}, and {reference} has its own",
            "Leave --random-weights out.",
        )
    if reference == MINI_SD:
        return Source(MINI_SD, "pipeline folder", MINI_SD_FOLDER)
    if reference in HUB_NAMES:
        return _resolve_name(reference, options)
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        return _resolve_folder(reference, path, options)
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise AsdmError(f"{reference} is no checkpoint", f"Known file types: {', '.join(FILE_SUFFIXES)}.")
        return inspect_file(reference, path, options)
    if path.suffix in FILE_SUFFIXES or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise AsdmError(f"there is no file or folder {reference}", "Check the path.")
    if _HUB_ID.match(reference):
        return _resolve_hub_id(reference, options)
    near = difflib.get_close_matches(reference, NAMES, n=1, cutoff=0.3)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise AsdmError(
        f"unknown model {reference!r}", f"{guess}Known names: {', '.join(NAMES)}; or give a folder, a file or a hub id."
    )


def wanted_files(names: Sequence[str]) -> list[str]:
    """Of a repository's files, those of one diffusers pipeline or UNet: configs, words, recipes, and weights once.

    In every folder safetensors go before pickles, and weights without a variant before those with one. Single-file
    checkpoints and other programs' weights at the top of a repository are left alone.
    """
    wanted = [name for name in names if name.endswith((".json", ".txt", ".model")) and name.count("/") <= 1]
    wanted += [name for name in names if name in _OWN]
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, slash, file = name.rpartition("/")
        if "/" not in folder:
            folders.setdefault(folder + slash, []).append(file)
    return sorted(wanted + [folder + file for folder, files in folders.items() for file in choose_weights(files)[0]])


def _resolve_name(name: str, options: LoadOptions) -> Source:
    if options.random_weights:
        return Source(name, "random weights", None, FAMILIES[name])
    for repository in HUB_NAMES[name]:
        try:
            return _resolve_folder(name, _cached(repository), options)
        except (LocalEntryNotFoundError, OSError):
            continue
    here = f"To open the folder {name} that is here, write ./{name}. " if Path(name).is_dir() else ""
    raise AsdmError(
        f"the weights of {name} are not on this machine",
        f"{here}Fetch them with `hf download {HUB_NAMES[name][0]}`, give a folder or a file, "
        "or use --random-weights for costs alone.",
        ExitCode.ENVIRONMENT,
    )


def _resolve_hub_id(repository: str, options: LoadOptions) -> Source:
    try:
        try:
            wanted = wanted_files([file.filename for file in snapshot_download(repository, dry_run=True)])
        except DryRunError as error:  # no way to the hub, or a no from there
            try:
                folder = _cached(repository)
            except LocalEntryNotFoundError:
                if isinstance(error.__cause__, HfHubHTTPError):
                    raise error.__cause__ from error
                raise
        else:
            folder = Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AsdmError(
            f"{repository} is neither a folder here nor a model that the hub gave: {first_line(error)}",
            "Check the spelling and the network connection; private models need `hf auth login`.",
            ExitCode.ENVIRONMENT,
        ) from error
    return _resolve_folder(repository, folder, options)


def _cached(repository: str) -> Path:
    """A repository's folder in the local hub cache, whole or as much of it as another program has fetched."""
    return Path(snapshot_download(repository, allow_patterns=list(_ENTRIES), local_files_only=True))


def _resolve_folder(reference: str, folder: Path, options: LoadOptions) -> Source:
    if (folder / "model_index.json").is_file():
        check_index(folder)
        source = Source(reference, "pipeline folder", folder)
    elif (folder / "config.json").is_file():
        source = Source(reference, "unet folder", folder)
    else:
        raise AsdmError(
            f"{reference} is no diffusers folder: it has neither model_index.json nor config.json",
            "Give the folder that `save_pretrained` wrote.",
        )
    assert source.unet_folder is not None
    config: Mapping[str, Any] = read_json(source.unet_folder / "config.json")
    found = true_config(source.unet_folder, config, options.allow_pickle)
    if found is None:
        return source
    corrected, note = found
    return replace(source, unet_config=corrected, notes=(note,))
