"""Measurements kept on disk by content: the same teacher, prompts and sampler are never measured twice."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from asdm_compress.assembly.calibration import THOROUGH, Calibration, Effort
from asdm_compress.assembly.damage import CHUNK
from asdm_compress.core.files import CACHE_HINT, cache_folder, output_file
from asdm_compress.core.processes import ALONE, Processes
from asdm_compress.core.provenance import content_hash, package_version
from asdm_compress.sampling.run import GuidedInputs
from asdm_compress.sampling.settings import SamplingSettings

_ADAPTERS: Final = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
# To be raised when the meaning of a kept measurement changes.
STORE_VERSION = 18
TRIPLES: Final = "triples.pt"  # the recording's name in the folder of measurements


def weights_hash(module: nn.Module, in_fp32: bool = False) -> str:
    """A hash of every weight's name, shape, type and bytes; `in_fp32` that of the same weights opened in fp32."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        tensor = weight.float() if in_fp32 and weight.is_floating_point() else weight
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def switches_of(module: nn.Module) -> dict[str, Any]:
    """What changes a module's results beside its weights and its config: how adapters are set, and FreeU's factors."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        if hasattr(part, "lora_A"):  # one of peft's layers, which keep this out of their weights
            found[path] = [str(getattr(part, name, None)) for name in _ADAPTERS]
        factors = [getattr(part, name, None) for name in ("s1", "s2", "b1", "b2")]
        if any(factor is not None for factor in factors):
            found[path] = factors
    return found


def measurement_folder(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    settings: SamplingSettings,
    bands: int,
    effort: Effort = THOROUGH,
    channels_last: bool = False,
) -> Path:
    """The folder for everything measured with this teacher, prompts, sampler, device, precision and layout."""
    # What is usual is not named, as it was not before there was anything else.
    unusual: dict[str, Any] = {} if effort == THOROUGH else {"effort": asdict(effort)}
    unusual |= {"channels_last": True} if channels_last else {}
    if pipeline.device.type == "cuda" and pipeline.unet.dtype == torch.float32:
        unusual |= {"convolutions": "fp32"}  # which once were in TF32
    key = content_hash(
        {
            "store": STORE_VERSION,
            "weights": weights_hash(pipeline.unet),
            "text": weights_hash(pipeline.text_encoder),
            "switches": [switches_of(part) for part in (pipeline.unet, pipeline.text_encoder)],
            "configs": [_plain(pipeline.unet.config), _plain(pipeline.text_encoder.config.to_dict())],
            "tokens": [
                pipeline.tokenizer.model_max_length,
                pipeline.tokenizer.pad_token,
                sorted(pipeline.tokenizer.get_vocab().items()),
            ],
            "chunk": CHUNK,
            "scheduler": {"class": type(pipeline.scheduler).__name__, **_plain(pipeline.scheduler.config)},
            "prompts": list(prompts),
            "settings": asdict(settings),
            "bands": bands,
            **unusual,
            "device": pipeline.device.type,
            "dtype": str(pipeline.unet.dtype),
            "versions": [package_version(name) for name in ("torch", "diffusers")],
        }
    )
    return cache_folder() / "measurements" / key


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without its private entries, such as the path that it was read from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def recorded(path: Path, record: Callable[[], Calibration], processes: Processes = ALONE) -> Calibration:
    """The calibration kept at `path`, recorded now, by all processes, if it is not there."""
    kept = processes.on_main(lambda: _kept(path))
    if kept is not None:
        return kept
    calibration = record().to(torch.device("cpu"))
    if processes.is_main:
        _keep(calibration, path)
    return calibration


def _kept(path: Path) -> Calibration | None:
    if not path.exists():
        return None
    try:
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return None  # cut short, as by a loss of power: recorded anew
    return Calibration(
        GuidedInputs(**kept["inputs"]),
        kept["bands"],
        kept["prompts"],
        tuple(kept["band_weights"]),
        tuple(kept["boundaries"]),
    )


def _keep(calibration: Calibration, path: Path) -> None:
    inputs = calibration.inputs
    with output_file(path, CACHE_HINT) as aside:
        content = {
            "inputs": {name: getattr(inputs, name) for name in ("samples", "timesteps", "texts", "guidance")},
            "bands": calibration.bands,
            "prompts": calibration.prompts,
            "band_weights": calibration.band_weights,
            "boundaries": calibration.boundaries,
        }
        torch.save(content, aside)
