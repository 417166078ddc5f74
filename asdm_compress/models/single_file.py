"""Single checkpoint files (.safetensors, .ckpt) in the LDM layout or diffusers' naming: what they hold, and opening it.

No network is needed: what the weights do not tell comes from the configs that the package ships. Everything else, the
widths, depths and the mid block, is read off the shapes, so that fine-tunes, inpainting variants and lighter students
open as what they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.clip_tokenizer import clip_tokenizer
from asdm_compress.models.folder import readable, refuse_misfit
from asdm_compress.models.layout import Layout, Shapes, config_of, known_text_widths, read_layout
from asdm_compress.models.ldm import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from asdm_compress.models.prediction import Prediction, find_prediction
from asdm_compress.models.recognise import ONLY, check_numbers, foreign_kind, what_is
from asdm_compress.models.saving import PLAIN, FileLayout, leave_out_defaults, open_in_fp32
from asdm_compress.models.source import LoadOptions, Part, Source
from asdm_compress.models.streaming import TensorReader, reading
from asdm_compress.models.transformers_4 import write_for_transformers_4

_CONFIGS: Final = Path(__file__).with_name("configs")
_FAMILY_FILES: Final[Mapping[int, str]] = {768: "sd1.json", 1024: "sd2.json"}  # by the text's width
# The pipeline by the channels that a UNet takes beside the four of the noisy latent: none, a depth map, an image to
# edit, or a mask and a masked image.
PIPELINES: Final[Mapping[int, str]] = {
    4: "StableDiffusionPipeline",
    5: "StableDiffusionDepth2ImgPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    9: "StableDiffusionInpaintPipeline",
}
_VAE_SCALE: Final = 8
_TEXT_HEAD_WIDTH: Final = 64
_OPEN_CLIP_LAYERS: Final = 24  # Stable Diffusion 2.x takes the last but one's output: transformers' model has 23


def inspect_file(reference: str, path: Path, options: LoadOptions) -> Source:
    """What a checkpoint file holds, from its names and shapes; no weights are read from safetensors.

    Raises AsdmError for damaged files and for everything that is no UNet of Stable Diffusion 1.x or 2.x, naming what it
    is where that is known.
    """
    with reading(path, options.allow_pickle) as reader:
        shapes = reader.shapes
    layout = _layout_of(path, unet_shapes(shapes), shapes)
    family = _family(layout.text_width)
    metadata = _metadata(path)
    prediction = find_prediction(path, metadata, shapes, layout, family["prediction_type"], options.prediction_type)
    config = {**family["unet"], **config_of(layout), "sample_size": _image_size(family, prediction) // _VAE_SCALE}
    parts = _parts_in(shapes)
    notes = [f"{path.name} is a {'checkpoint' if len(parts) > 1 else 'UNet'} of {family['name']}: {layout.describe()}"]
    if prediction.reason and "vae" in parts:
        notes.append(prediction.reason)
    if layout.in_channels == 5 and any(name.startswith("depth_model.") for name in shapes):
        notes.append("its depth estimator is left out: diffusers opens the folder with depth_estimator=None")
    return Source(
        reference,
        "single file",
        path,
        parts=frozenset(parts),
        unet_config=config,
        prediction_type=prediction.kind,
        notes=tuple(notes),
    )


def unet_prefix(names: Mapping[str, Any]) -> str:
    """What stands before the UNet's names in a file: that of whole checkpoints, or nothing."""
    return UNET_PREFIX if any(name.startswith(UNET_PREFIX) for name in names) else ""


def unet_shapes(shapes: Shapes) -> Shapes:
    """The UNet's own tensors of a file, by their names without the prefix."""
    prefix = unet_prefix(shapes)
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def open_vae(source: Source, options: LoadOptions) -> AutoencoderKL:
    """The VAE of a single file; raises AsdmError for missing or misfitting weights."""
    assert source.path is not None
    with reading(source.path, options.allow_pickle) as reader:
        stored = _take(reader, VAE_PREFIX)
        config = {**_family_of(source)["vae"], **_vae_facts(source.path, stored)}
        with torch.device("meta"):
            vae = AutoencoderKL(**config)
        with readable(source.path):
            found = convert_ldm_vae_checkpoint(stored, dict(vae.config))
        return _filled(vae, found, source.path, options)


def open_text_encoder(source: Source, options: LoadOptions) -> CLIPTextModel:
    """The text encoder of a single file: CLIP's in 1.x, OpenCLIP's in 2.x.

    Raises AsdmError for missing or misfitting weights.
    """
    assert source.path is not None
    with reading(source.path, options.allow_pickle) as reader:
        stored = {**_take(reader, CLIP_PREFIX), **_take(reader, OPEN_CLIP_PREFIX)}
        is_open_clip = any(name.startswith(OPEN_CLIP_PREFIX) for name in stored)
        config = CLIPTextConfig(**_family_of(source)["text_encoder"], **_text_facts(source.path, stored))
        with init_empty_weights(include_buffers=False):
            encoder = CLIPTextModel(config)
        with readable(source.path):
            if is_open_clip:
                found = convert_open_clip_checkpoint(encoder, stored, prefix=OPEN_CLIP_PREFIX)
            else:
                found = convert_ldm_clip_checkpoint(stored)
        plain = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
        names = {name.removeprefix("text_model."): name for name in encoder.state_dict()}
        return _filled(encoder, {names[n]: t for n, t in plain.items() if n in names}, source.path, options)


def check_whole(source: Source) -> None:
    """Raise AsdmError unless a single file is a whole pipeline of which it is known what it predicts."""
    missing = sorted({"vae", "text_encoder"} - source.parts)
    if missing:
        raise AsdmError(
            f"{source.name} holds a UNet, but no {' and no '.join(missing).replace('_', ' ')}, and this command needs "
            "a whole pipeline",
            "Give a whole checkpoint, or a diffusers folder with a model_index.json.",
        )
    if source.prediction_type is None:
        raise AsdmError(
            f"{source.name} does not say whether it predicts ε (as the 512 base models do) or v (as the 768 models "
            "do), and its weights look the same either way",
            "Say it with --prediction-type epsilon or --prediction-type v_prediction.",
        )


def _scheduler_of(source: Source) -> SchedulerMixin:
    """The family's scheduler with the file's prediction type."""
    config = dict(_family_of(source)["scheduler"][source.prediction_type])
    scheduler_class = getattr(diffusers, config.pop("_class_name"))
    scheduler: SchedulerMixin = scheduler_class(**config, prediction_type=source.prediction_type)
    return scheduler


def make_pipeline(source: Source, unet: nn.Module, options: LoadOptions) -> Any:
    """The whole pipeline of a single file around `unet`, of the kind that its channels tell.

    Raises AsdmError for what `check_whole` refuses, and for parts that are damaged.
    """
    assert source.unet_config is not None
    check_whole(source)
    name = PIPELINES[source.unet_config["in_channels"]]
    parts: dict[str, Any] = {
        "vae": open_vae(source, options),
        "text_encoder": open_text_encoder(source, options),
        "tokenizer": clip_tokenizer(_family_of(source)["pad_token"]),
        "unet": unet,
        "scheduler": _scheduler_of(source),
        "feature_extractor": None,
    }
    if name == "StableDiffusionDepth2ImgPipeline":
        parts["depth_estimator"] = None
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with readable(source.path or Path()):
        return getattr(diffusers, name)(**parts)


def write_rest(source: Source, folder: Path, unet: nn.Module, options: LoadOptions, layout: FileLayout = PLAIN) -> None:
    """Write everything of a single file's pipeline but its UNet as a diffusers folder, with `unet`'s class named."""
    pipeline = make_pipeline(source, unet, options)
    folder.mkdir(parents=True, exist_ok=True)
    with readable(folder):
        pipeline.save_config(folder)
        for name in ("tokenizer", "scheduler"):
            getattr(pipeline, name).save_pretrained(folder / name)
        leave_out_defaults(pipeline.scheduler, folder / "scheduler")
        for name in ("vae", "text_encoder"):
            part = getattr(pipeline, name)
            part.save_pretrained(folder / name, variant=layout.variant, max_shard_size=layout.shard_bytes)
    open_in_fp32(folder)
    write_for_transformers_4(folder)


def _layout_of(path: Path, unet: Shapes, shapes: Shapes) -> Layout:
    """The UNet's structure, or an AsdmError that says what the file is instead."""
    layout = read_layout(unet)
    other = foreign_kind(shapes) or (what_is(shapes) if layout is None else None)
    if other is not None:
        raise AsdmError(f"{path} is {other}", ONLY)
    if layout is None or layout.text_width not in known_text_widths():
        hint = "no UNet is in it" if layout is None else f"its text width is {layout.text_width}"
        raise AsdmError(f"{path} is no checkpoint of Stable Diffusion 1.x or 2.x ({hint})", ONLY)
    if layout.in_channels not in PIPELINES:
        raise AsdmError(
            f"{path} holds a UNet that takes {layout.in_channels} channels, which no variant of Stable Diffusion does",
            f"Known are {', '.join(map(str, PIPELINES))}.",
        )
    return layout


def _parts_in(shapes: Shapes) -> set[Part]:
    parts: set[Part] = {"unet"}
    if f"{VAE_PREFIX}decoder.conv_in.weight" in shapes:
        parts.add("vae")
    if any("token_embedding" in n and n.startswith((CLIP_PREFIX, OPEN_CLIP_PREFIX)) for n in shapes):
        parts.add("text_encoder")
    return parts


def _take(reader: TensorReader, prefix: str) -> dict[str, Tensor]:
    return {name: reader.getters[name]() for name in reader.names() if name.startswith(prefix)}


def _filled(module: Any, found: Mapping[str, Tensor], path: Path, options: LoadOptions) -> Any:
    """A module on the meta device with its weights: all of them, and in their shapes."""
    expected = module.state_dict()
    # The LDM layout has linear layers of the VAE's attention as 1 x 1 convolutions.
    shaped = {
        name: tensor.reshape(expected[name].shape) if tensor.numel() == expected[name].numel() else tensor
        for name, tensor in found.items()
        if name in expected
    }
    mismatched = [name for name, tensor in shaped.items() if tensor.shape != expected[name].shape]
    refuse_misfit(path, [name for name in expected if name not in shaped], [], mismatched)
    check_numbers(path, shaped)
    dtype = options.dtype or next(iter(shaped.values())).dtype
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in shaped.items()}, assign=True)
    return module.to(options.device).eval().requires_grad_(False)


def _vae_facts(path: Path, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """Widths and depth of a VAE, read off its encoder."""
    widths: list[int] = []
    while (first := f"{VAE_PREFIX}encoder.down.{len(widths)}.block.0.conv1.weight") in stored:
        widths.append(stored[first].shape[0])
    count = sum(
        name.startswith(f"{VAE_PREFIX}encoder.down.0.block.") and name.endswith("conv1.weight") for name in stored
    )
    if not widths:
        raise AsdmError(f"{path} lacks the VAE's encoder", "Give a whole checkpoint.")
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": count,
        "latent_channels": stored[f"{VAE_PREFIX}decoder.conv_in.weight"].shape[1],
    }


def _text_facts(path: Path, stored: Mapping[str, Tensor]) -> dict[str, int]:
    """Widths and depth of a CLIP text encoder."""

    def shape_of(*ends: str) -> tuple[int, ...]:
        found = next((stored[name].shape for name in stored if name.endswith(ends)), None)
        if found is None:
            raise AsdmError(f"{path} lacks the text encoder's {ends[0]}", "Give a whole checkpoint.")
        return tuple(found)

    vocabulary, width = shape_of("token_embedding.weight")
    inside = shape_of("layers.0.mlp.fc1.weight", "resblocks.0.mlp.c_fc.weight")[0]
    numbers = {
        int(rest.split(".")[0])
        for mark in (".layers.", ".resblocks.")
        for _, found, rest in (name.partition(mark) for name in stored)
        if found
    }
    is_open_clip = any(".resblocks." in name for name in stored)
    layers = len(numbers) - (1 if is_open_clip and len(numbers) == _OPEN_CLIP_LAYERS else 0)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // _TEXT_HEAD_WIDTH, 1),
    }


def _family(text_width: int | None) -> Mapping[str, Any]:
    """The shipped config of the family with this text width."""
    assert text_width is not None
    content: Mapping[str, Any] = json.loads((_CONFIGS / _FAMILY_FILES[text_width]).read_text(encoding="utf-8"))
    return content


def _family_of(source: Source) -> Mapping[str, Any]:
    assert source.unet_config is not None
    return _family(source.unet_config["cross_attention_dim"])


def _image_size(family: Mapping[str, Any], prediction: Prediction) -> int:
    return prediction.image_size or int(family["image_size"])


def _metadata(path: Path) -> Mapping[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
