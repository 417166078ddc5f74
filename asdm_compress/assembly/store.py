"""Measurements kept on disk by content: the same teacher, prompts and sampler are never measured twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from asdm_compress.assembly.calibration import Calibration, SamplingSettings, Triples
from asdm_compress.core.files import cache_folder, output_file
from asdm_compress.core.provenance import content_hash, package_version

STORE_VERSION = 1


def weights_hash(unet: UNet2DConditionModel) -> str:
    """A hash of every weight's name, shape, type and bytes."""
    digest = hashlib.sha256()
    for name, tensor in unet.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def measurement_folder(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], settings: SamplingSettings, bands: int
) -> Path:
    """The folder for everything measured with this teacher, these prompts, this sampler, device and precision."""
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    key = content_hash(
        {
            "store": STORE_VERSION,
            "weights": weights_hash(pipeline.unet),
            "text": weights_hash(pipeline.text_encoder),
            "scheduler": {"class": type(pipeline.scheduler).__name__, **scheduler},
            "prompts": list(prompts),
            "settings": asdict(settings),
            "bands": bands,
            "device": pipeline.device.type,
            "dtype": str(pipeline.unet.dtype),
            "versions": [package_version(name) for name in ("torch", "diffusers")],
        }
    )
    return cache_folder() / "measurements" / key


def recorded(path: Path, record: Callable[[], Calibration]) -> Calibration:
    """The calibration kept at `path`, recorded now if it is not there."""
    if path.exists():
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return Calibration(Triples(**kept["triples"]), tuple(kept["band_weights"]))
    calibration = record()
    triples = calibration.triples
    tensors = {name: getattr(triples, name).cpu() for name in ("samples", "timesteps", "texts", "bands")}
    with output_file(path) as aside:
        content = {"triples": {**tensors, "guidance": triples.guidance}, "band_weights": calibration.band_weights}
        torch.save(content, aside)
    return Calibration(Triples(**tensors, guidance=triples.guidance), calibration.band_weights)
