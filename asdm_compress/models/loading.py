"""Opens models: a name, a diffusers folder, a single checkpoint file, or a hub id, into a UNet or a whole pipeline."""

from __future__ import annotations

import difflib
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.families import FAMILIES, Family, check_supported, random_unet
from asdm_compress.models.names import HUB_NAMES, MINI_SD, MINI_SD_FOLDER, NAMES
from asdm_compress.models.quiet import quiet_libraries

PICKLE_SUFFIXES: Final = (".ckpt", ".pt", ".pth", ".bin")
FILE_SUFFIXES: Final = (".safetensors", *PICKLE_SUFFIXES)
CLIP_TOKENS: Final = 77
_LDM_PREFIX: Final = "model.diffusion_model."
_HUB_ID: Final = re.compile(r"^[\w.-]+/[\w.-]+$")

SourceKind = Literal["pipeline folder", "unet folder", "single file", "random weights"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is to be opened. `allow_pickle` lets a file run code while it is read, so it is off."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    random_weights: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's bytes are; `family` is set for random weights only."""

    name: str
    kind: SourceKind
    path: Path | None
    family: Family | None = None


def resolve(reference: str, options: LoadOptions) -> Source:
    """Find what `reference` names, without reading weights.

    Raises AsdmError for an unknown name (with the nearest known one), a missing path, and a named model that is not on
    this machine.
    """
    if reference == MINI_SD:
        return Source(MINI_SD, "pipeline folder", MINI_SD_FOLDER)
    if reference in HUB_NAMES:
        return _resolve_name(reference, options)
    path = Path(reference).expanduser()
    if path.is_dir():
        return _resolve_folder(reference, path)
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise AsdmError(f"{reference} is no checkpoint", f"Known file types: {', '.join(FILE_SUFFIXES)}.")
        return Source(reference, "single file", path)
    if path.suffix in FILE_SUFFIXES or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise AsdmError(f"there is no file or folder {reference}", "Check the path.")
    if _HUB_ID.match(reference):
        return _resolve_hub_id(reference)
    near = difflib.get_close_matches(reference, NAMES, n=1, cutoff=0.3)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise AsdmError(
        f"unknown model {reference!r}", f"{guess}Known names: {', '.join(NAMES)}; or give a folder, a file or a hub id."
    )


def load_unet(reference: str, options: LoadOptions) -> UNet2DConditionModel:
    """Open a UNet of the Stable Diffusion 1.x/2.x kind, in evaluation mode, every weight read from the file.

    Raises AsdmError for everything that is wrong with the reference or the files.
    """
    source = resolve(reference, options)
    if source.family is not None:
        return random_unet(source.family, options.dtype, options.device)
    assert source.path is not None
    if source.kind == "single file":
        unet = _unet_from_file(source.path, options)
    else:
        folder = source.path / "unet" if source.kind == "pipeline folder" else source.path
        unet = _unet_from_folder(folder, options)
    check_supported(unet)
    return unet.to(options.device).eval().requires_grad_(False)


def text_tokens_of(source: Source) -> int:
    """The number of text tokens that the model's pipeline pads to; 77, CLIP's own, where there is no tokenizer."""
    config = source.path / "tokenizer" / "tokenizer_config.json" if source.path else None
    if config is None or not config.is_file():
        return CLIP_TOKENS
    return int(json.loads(config.read_text(encoding="utf-8")).get("model_max_length", CLIP_TOKENS))


def load_pipeline(reference: str, options: LoadOptions | None = None) -> StableDiffusionPipeline:
    """Open a whole text-to-image pipeline; raises AsdmError where there is only a UNet."""
    options = options or LoadOptions()
    source = resolve(reference, options)
    if source.kind != "pipeline folder":
        raise AsdmError(
            f"{reference} is a {source.kind.replace('random', 'UNet with random')}, and this command samples images: "
            "it needs a whole pipeline",
            "Give a diffusers folder with a model_index.json, or mini-sd.",
        )
    assert source.path is not None
    unet = load_unet(reference, options)
    with _readable(source.path):
        _check_weight_files(source.path, options)
        pipeline = StableDiffusionPipeline.from_pretrained(
            source.path, unet=unet, dtype=options.dtype, local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(options.device)


def _resolve_name(name: str, options: LoadOptions) -> Source:
    if options.random_weights:
        return Source(name, "random weights", None, FAMILIES[name])
    repository = HUB_NAMES[name]
    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError) as error:
        raise AsdmError(
            f"the weights of {name} are not on this machine",
            f"Fetch them with `hf download {repository}`, give a folder or a file, "
            "or use --random-weights for costs alone.",
            ExitCode.ENVIRONMENT,
        ) from error
    return Source(name, "pipeline folder", folder)


def _resolve_hub_id(repository: str) -> Source:
    try:
        folder = Path(snapshot_download(repository, ignore_patterns=["*.ckpt", "*.onnx*", "*.msgpack", "*.h5"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AsdmError(
            f"{repository} is neither a folder here nor a model that the hub gave: {_first_line(error)}",
            "Check the spelling and the network connection; private models need `hf auth login`.",
            ExitCode.ENVIRONMENT,
        ) from error
    return _resolve_folder(repository, folder)


def _resolve_folder(reference: str, folder: Path) -> Source:
    if (folder / "model_index.json").is_file():
        return Source(reference, "pipeline folder", folder)
    if (folder / "config.json").is_file():
        return Source(reference, "unet folder", folder)
    raise AsdmError(
        f"{reference} is no diffusers folder: it has neither model_index.json nor config.json",
        "Give the folder that `save_pretrained` wrote.",
    )


def _unet_from_folder(folder: Path, options: LoadOptions) -> UNet2DConditionModel:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise AsdmError(f"{config_path} is missing", "The folder is no diffusers UNet.")
    try:
        name = json.loads(config_path.read_text(encoding="utf-8")).get("_class_name")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AsdmError(f"{config_path} is no valid JSON: {_first_line(error)}") from error
    classes = {c.__name__: c for c in (UNet2DConditionModel, AssembledUNet2DConditionModel)}
    if name not in classes:
        raise AsdmError(f"{folder} holds a {name}, not a UNet2DConditionModel", "Give the UNet's folder.")
    with _readable(folder):
        _check_weight_files(folder, options)
        unet, info = classes[name].from_pretrained(
            folder, dtype=options.dtype, output_loading_info=True, local_files_only=True
        )
    _refuse_misfit(folder, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return unet


def _refuse_misfit(place: Path, missing: Any, unexpected: Any, mismatched: Any) -> None:
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if keys:
            raise AsdmError(
                f"the weights in {place} do not fit their config: {len(keys)} {kind}, the first is {next(iter(keys))}",
                "The folder is damaged, or its config.json is not that of its weights.",
            )


def _check_weight_files(folder: Path, options: LoadOptions) -> None:
    """Read the headers of all weight files, so that a damaged one is named; refuse pickles that would run code."""
    for path in sorted(folder.rglob("*.safetensors")):
        _check_safetensors(path)
    safe = {path.parent for path in folder.rglob("*.safetensors")}
    for path in sorted(folder.rglob("*.bin")):
        if path.parent not in safe:
            _read_pickle(path, options)


def _check_safetensors(path: Path) -> None:
    if path.stat().st_size == 0:
        raise AsdmError(f"{path} is empty", "Fetch or copy the file again.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise AsdmError(
            f"{path} is truncated or no safetensors file: {_first_line(error)}", "Fetch or copy the file again."
        ) from error


def _unet_from_file(path: Path, options: LoadOptions) -> UNet2DConditionModel:
    if path.suffix == ".safetensors":
        _check_safetensors(path)
        weights: Mapping[str, Tensor] = load_file(path)
    else:
        weights = _read_pickle(path, options)
    is_ldm = any(key.startswith(_LDM_PREFIX) for key in weights)
    prefix = _LDM_PREFIX if is_ldm else ""
    family = _family_of(path, weights, prefix)
    first = "input_blocks.0.0.weight" if is_ldm else "conv_in.weight"
    config = {**family.unet_config, "in_channels": weights[prefix + first].shape[1]}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    if is_ldm:
        plain = {key: value for key, value in weights.items() if key.startswith(prefix)}
        weights = convert_ldm_unet_checkpoint(plain, {"layers_per_block": 2, **unet.config})
    expected = unet.state_dict()
    mismatched = [k for k, v in expected.items() if k in weights and weights[k].shape != v.shape]
    _refuse_misfit(path, expected.keys() - weights.keys(), weights.keys() - expected.keys(), mismatched)
    unet.load_state_dict({key: value.to(options.dtype) for key, value in weights.items()}, assign=True)
    return unet


def _family_of(path: Path, weights: Mapping[str, Tensor], prefix: str) -> Family:
    """SD 1.x or 2.x by the width of its text input; sizes that weights do not tell (2.1 at 768) do not matter here."""
    keys = (
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    )
    found = next((weights[key] for key in keys if key in weights), None)
    widths = {int(family.unet_config["cross_attention_dim"]): family for family in reversed(FAMILIES.values())}
    if found is None or found.shape[1] not in widths:
        hint = "an SDXL file is recognised by its text width of 2048" if found is not None else "no UNet is in it"
        raise AsdmError(
            f"{path} is no checkpoint of Stable Diffusion 1.x or 2.x ({hint})",
            "Give a UNet or a whole checkpoint of these families.",
        )
    return widths[found.shape[1]]


def _read_pickle(path: Path, options: LoadOptions) -> Mapping[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error) and "Unsupported" not in str(error):
            raise AsdmError(f"{path} is truncated or no checkpoint: {_first_line(error)}") from error
        if not options.allow_pickle:
            raise AsdmError(
                f"{path} is a pickle that would run code while it is read, and is refused",
                "Ask for a safetensors file; if you trust the file's author, add --allow-pickle.",
            ) from error
        loaded = torch.load(path, map_location="cpu", weights_only=False)
    except (EOFError, RuntimeError, ValueError) as error:
        raise AsdmError(
            f"{path} is truncated or no checkpoint: {_first_line(error)}", "Fetch or copy the file again."
        ) from error
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    weights = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not weights:
        raise AsdmError(f"{path} holds no weights")
    return weights


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Turn the loaders' errors about files into one message."""
    try:
        with quiet_libraries():
            yield
    except AsdmError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise AsdmError(
            f"{place} cannot be read: {_first_line(error)}", "Is every file of the folder there?"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
