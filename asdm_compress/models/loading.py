"""Opens models: a name, a diffusers folder, a single checkpoint file, or a hub id, into a UNet or a whole pipeline."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.families import FAMILIES, Family, check_supported, random_unet
from asdm_compress.models.files import (
    check_folder,
    check_safetensors,
    first_line,
    read_pickle,
    stored_dtype,
    variant_of,
)
from asdm_compress.models.ldm import unet_to_ldm
from asdm_compress.models.names import HUB_NAMES, MINI_SD, MINI_SD_FOLDER, NAMES
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.recognise import check_numbers, what_is
from asdm_compress.models.streaming import TensorReader, reading

FILE_SUFFIXES: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
CLIP_TOKENS: Final = 77
_LDM_PREFIX: Final = "model.diffusion_model."
_TELLING: Final = ".transformer_blocks.0.attn2.to_k.weight"  # of these, the first tells the family
_HUB_ID: Final = re.compile(r"^[\w.-]+/[\w.-]+$")
_UNET_CLASSES: Final = {c.__name__: c for c in (UNet2DConditionModel, AssembledUNet2DConditionModel)}
# The other parts of a pipeline whose weights are checked as strictly as the UNet's.
_CHECKED_PARTS: Final = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}

SourceKind = Literal["pipeline folder", "unet folder", "single file", "random weights"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is to be opened; `dtype` None takes the weights' own.

    `allow_pickle` lets a file run code while it is read, so it is off.
    """

    dtype: torch.dtype | None = torch.float32
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

    @property
    def unet_folder(self) -> Path | None:
        """The folder of the UNet, where there is one."""
        if self.path is None or self.kind == "single file":
            return None
        return self.path / "unet" if self.kind == "pipeline folder" else self.path


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
    return open_unet(resolve(reference, options), options)


def open_unet(source: Source, options: LoadOptions) -> UNet2DConditionModel:
    """As `load_unet`, for a source that is already resolved."""
    if source.family is not None:
        return random_unet(source.family, options.dtype or torch.float32, options.device)
    assert source.path is not None
    folder = source.unet_folder
    unet = _unet_from_file(source.path, options) if folder is None else _unet_from_folder(folder, options)
    check_supported(unet)
    return unet.to(options.device).eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class LazyUNet:
    """A UNet on the meta device, and how to get each of its tensors from the files, one at a time.

    `stored` are the names that the tensors have there.
    """

    unet: UNet2DConditionModel
    reader: TensorReader
    stored: Mapping[str, str]
    shapes: Mapping[str, torch.Size]

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a tensor is stored."""
        return self.reader.dtypes[self.stored[name]]

    def get(self, name: str) -> Tensor:
        """A tensor by its name in the UNet; raises AsdmError where it is missing or does not fit."""
        tensor = self.reader.get(self.stored[name])
        expected = self.shapes[name]
        if tensor.shape != expected:
            raise AsdmError(
                f"{self.stored[name]} in {self.reader.place} has the shape {tuple(tensor.shape)}, and its config says "
                f"{tuple(expected)}",
                "The files are damaged, or the config.json is not that of the weights.",
            )
        return tensor


@contextmanager
def lazy_unet(source: Source, options: LoadOptions) -> Iterator[LazyUNet]:
    """Open a UNet without reading its weights. Raises AsdmError for everything that is wrong with the files."""
    assert source.path is not None
    folder = source.unet_folder
    place = source.path if folder is None else folder
    with reading(place, options.allow_pickle) as reader:
        names = reader.names()
        prefix, stored = "", {}
        if folder is None:
            prefix = _LDM_PREFIX if any(name.startswith(_LDM_PREFIX) for name in names) else ""
            first = next((n for n in (f"{prefix}input_blocks.0.0.weight", "conv_in.weight") if n in reader), None)
            telling = {n: reader.get(n) for n in names if n.endswith(_TELLING)}
            family = _family_of(place, telling or dict.fromkeys(names, torch.empty(0)), prefix)
            channels = reader.get(first).shape[1] if first else 4
            config = {**family.unet_config, "in_channels": channels}
            unet_class: Any = UNet2DConditionModel
        else:
            found = _read_json(folder / "config.json")
            unet_class = _unet_class(folder, found)
            config = {k: v for k, v in found.items() if not k.startswith("_")}
        with _readable(place), torch.device("meta"):
            unet = unet_class(**config) if folder is None else unet_class.from_config(config)
        check_supported(unet)
        shapes = {key: tensor.shape for key, tensor in unet.state_dict().items()}
        keys = list(shapes)
        if folder is None and f"{prefix}input_blocks.0.0.weight" in reader:
            renamed = [prefix + name.removeprefix(_LDM_PREFIX) for name in unet_to_ldm(unet)]
            stored = dict(zip(keys, renamed, strict=True))
        else:
            stored = {key: key for key in keys}
        theirs = {name for name in names if folder is not None or not prefix or name.startswith(prefix)}
        _refuse_misfit(place, [k for k in keys if stored[k] not in reader], theirs - set(stored.values()), [])
        yield LazyUNet(unet, reader, stored, shapes)


def load_pipeline(reference: str, options: LoadOptions | None = None) -> StableDiffusionPipeline:
    """Open a whole text-to-image pipeline; raises AsdmError where there is only a UNet."""
    options = options or LoadOptions()
    return open_pipeline(resolve(reference, options), options)


def open_pipeline(source: Source, options: LoadOptions) -> StableDiffusionPipeline:
    """As `load_pipeline`, for a source that is already resolved."""
    if source.kind != "pipeline folder":
        raise AsdmError(
            f"{source.name} is a {source.kind.replace('random', 'UNet with random')}, and this command samples images: "
            "it needs a whole pipeline",
            "Give a diffusers folder with a model_index.json, or mini-sd.",
        )
    assert source.path is not None
    assert source.unet_folder is not None
    dtype = options.dtype or stored_dtype(source.unet_folder)
    parts: dict[str, Any] = {"unet": open_unet(source, options)}
    index = _read_json(source.path / "model_index.json")
    for name, part_class in _CHECKED_PARTS.items():
        if index.get(name, [None, None])[1] == part_class.__name__:
            parts[name] = _open_part(part_class, source.path / name, dtype, options)
    with _readable(source.path):
        check_folder(source.path, options.allow_pickle)
        pipeline = StableDiffusionPipeline.from_pretrained(
            source.path, **parts, dtype=dtype, variant=variant_of(source.unet_folder), local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    with quiet_libraries():  # half precision on a CPU is only how weights are read and written here
        return pipeline.to(options.device)


def text_tokens_of(source: Source) -> int:
    """The number of text tokens that the model's pipeline pads to; 77, CLIP's own, where there is no tokenizer."""
    config = source.path / "tokenizer" / "tokenizer_config.json" if source.path else None
    if config is None or not config.is_file():
        return CLIP_TOKENS
    return int(_read_json(config).get("model_max_length", CLIP_TOKENS))


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
    wanted = ["*.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AsdmError(
            f"{repository} is neither a folder here nor a model that the hub gave: {first_line(error)}",
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
    unet_class = _unet_class(folder, _read_json(folder / "config.json"))
    return _open_part(unet_class, folder, options.dtype or stored_dtype(folder), options)


def _unet_class(folder: Path, config: Mapping[str, Any]) -> Any:
    name = config.get("_class_name")
    if name not in _UNET_CLASSES:
        raise AsdmError(f"{folder} holds a {name}, not a UNet2DConditionModel", "Give the UNet's folder.")
    return _UNET_CLASSES[name]


def _open_part(part_class: Any, folder: Path, dtype: torch.dtype, options: LoadOptions) -> Any:
    """A part of a pipeline, every weight read from its files."""
    with _readable(folder):
        check_folder(folder, options.allow_pickle)
        part, info = part_class.from_pretrained(
            folder, dtype=dtype, variant=variant_of(folder), output_loading_info=True, local_files_only=True
        )
    # Text encoders of old checkpoints carry position ids, which are no weights.
    check_numbers(folder, part.state_dict())
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    _refuse_misfit(folder, info["missing_keys"], unexpected, info["mismatched_keys"])
    return part


def _refuse_misfit(place: Path, missing: Any, unexpected: Any, mismatched: Any) -> None:
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if keys:
            raise AsdmError(
                f"the weights in {place} do not fit their config: {len(keys)} {kind}, the first is {next(iter(keys))}",
                "The files are damaged, or the config.json is not that of the weights.",
            )


def _unet_from_file(path: Path, options: LoadOptions) -> UNet2DConditionModel:
    if path.suffix == ".safetensors":
        check_safetensors(path)
        weights: Mapping[str, Tensor] = load_file(path)
    else:
        weights = read_pickle(path, options.allow_pickle)
    prefix = _LDM_PREFIX if any(key.startswith(_LDM_PREFIX) for key in weights) else ""
    is_ldm = f"{prefix}input_blocks.0.0.weight" in weights
    family = _family_of(path, weights, prefix)
    first = f"{prefix}input_blocks.0.0.weight" if is_ldm else "conv_in.weight"
    channels = weights[first].shape[1] if first in weights else family.unet_config.get("in_channels", 4)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**family.unet_config, "in_channels": channels})
    if is_ldm:
        plain = {_LDM_PREFIX + k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        with _readable(path):
            weights = convert_ldm_unet_checkpoint(plain, dict(unet.config))
    expected = unet.state_dict()
    mismatched = [k for k, v in expected.items() if k in weights and weights[k].shape != v.shape]
    check_numbers(path, weights)
    _refuse_misfit(path, expected.keys() - weights.keys(), weights.keys() - expected.keys(), mismatched)
    dtype = options.dtype or next(iter(weights.values())).dtype
    unet.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    return unet


def _family_of(path: Path, weights: Mapping[str, Tensor], prefix: str) -> Family:
    """SD 1.x or 2.x by the width of its text input; sizes that weights do not tell (2.1 at 768) do not matter here."""
    keys = (
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    )
    found = next((weights[key] for key in keys if key in weights), None)
    widths = {int(family.unet_config["cross_attention_dim"]): family for family in reversed(FAMILIES.values())}
    other = what_is(weights)
    if found is None and other is not None:
        raise AsdmError(f"{path} is {other}", "Give a UNet or a whole checkpoint of Stable Diffusion 1.x or 2.x.")
    if found is None or found.shape[1] not in widths:
        hint = f"its text width is {found.shape[1]}" if found is not None else "no UNet is in it"
        raise AsdmError(
            f"{path} is no checkpoint of Stable Diffusion 1.x or 2.x ({hint})",
            "Give a UNet or a whole checkpoint of these families.",
        )
    return widths[found.shape[1]]


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise AsdmError(f"{path} is missing", "The folder is no whole diffusers folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AsdmError(f"{path} is no valid JSON: {first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise AsdmError(f"{path} is no JSON object", "Fetch or copy the file again.")
    return content


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Turn the loaders' errors about files into one message; silence what they print besides."""
    try:
        with quiet_libraries():
            yield
    except AsdmError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        raise AsdmError(f"{place} cannot be read: {first_line(error)}", "Is every file there, and whole?") from error
