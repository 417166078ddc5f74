"""Whole pipelines with random weights, to check what only real sizes show. Nothing of them is stored.

    python tools/make_fixtures.py sd15 --out ~/fixtures/sd15                  # a diffusers folder
    python tools/make_fixtures.py sd15 --out ~/fixtures/sd15.safetensors      # the same numbers in the LDM layout

Every part has Stable Diffusion's own shapes and names; their pictures mean nothing. The UNet is written one tensor at a
time, so that memory stays far below the size of the files. `--width 32` makes the same models narrow.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from asdm_compress.models.clip_tokenizer import VOCABULARY, clip_tokenizer
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.files import stored_dtype
from asdm_compress.models.ldm import text_encoder_to_ldm, unet_to_ldm, vae_to_ldm
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.saving import save_pipeline, save_unet
from asdm_compress.models.single_file import PIPELINES
from asdm_compress.models.source import PredictionType
from asdm_compress.models.streaming import Entry, reading, write_safetensors

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNET_WIDTH: Final = 320
VAE_WIDTHS: Final = (128, 256, 512, 512)
NARROW_VAE: Final = (32, 32, 64, 64)


@dataclass(frozen=True, slots=True)
class Fixture:
    """A published model: its family, the channels that its UNet takes, and what it predicts."""

    family: str
    channels: int = 4
    prediction: PredictionType = "epsilon"


FIXTURES: Final[Mapping[str, Fixture]] = {
    "sd15": Fixture("sd15"),
    "sd15-inpainting": Fixture("sd15", 9),
    "instruct-pix2pix": Fixture("sd15", 8),
    "sd21-base": Fixture("sd21-base"),
    "sd21": Fixture("sd21", 4, "v_prediction"),
    "sd2-inpainting": Fixture("sd21-base", 9),
    "sd2-depth": Fixture("sd21-base", 5),
}


def make(name: str, out: Path, dtype: torch.dtype, width: int = UNET_WIDTH) -> None:
    """Write one pipeline: a folder, or where `out` ends in .safetensors a single file.

    `width` is the UNet's on its highest level; the other levels, the VAE and the text encoder's depth follow it.
    """
    if out.suffix == ".safetensors":
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            make(name, Path(folder) / "model", dtype, width)
            pack(Path(folder) / "model", out)
        return
    fixture = FIXTURES[name]
    unet, vae, encoder = parts_of(fixture, width)
    entries = [
        Entry(key, tuple(tensor.shape), dtype, partial(random_tensor, key, tuple(tensor.shape), dtype))
        for key, tensor in unet.state_dict().items()
    ]
    save_unet(unet, entries, out / "unet")
    for part in (vae, encoder):
        weights = {k: random_tensor(k, tuple(t.shape), dtype) for k, t in part.state_dict().items()}
        part.load_state_dict(weights, assign=True)
    pipeline = _pipeline(fixture, unet, vae, encoder)
    pipeline.unet = None  # written already
    save_pipeline(pipeline, out)
    pipeline.register_modules(unet=unet)
    pipeline.save_config(out)


def parts_of(fixture: Fixture, width: int = UNET_WIDTH) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet, VAE and text encoder on the meta device."""
    config: dict[str, Any] = {**FAMILIES[fixture.family].unet_config, "in_channels": fixture.channels}
    widths = tuple(value * width // UNET_WIDTH for value in config["block_out_channels"])
    config["block_out_channels"] = widths
    if fixture.family != "sd15":  # heads of one width
        config["attention_head_dim"] = tuple(max(value // 64, 1) for value in widths)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        vae = AutoencoderKL(
            block_out_channels=VAE_WIDTHS if width == UNET_WIDTH else NARROW_VAE,
            down_block_types=("DownEncoderBlock2D",) * len(VAE_WIDTHS),
            up_block_types=("UpDecoderBlock2D",) * len(VAE_WIDTHS),
            layers_per_block=2,
            latent_channels=4,
        )
    with init_empty_weights(include_buffers=False):
        encoder = CLIPTextModel(_text_config(int(config["cross_attention_dim"]), width))
    return unet, vae, encoder


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers that depend on the name alone, scaled so that activations keep their size; norms near 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) < 2:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return torch.randn(shape, generator=generator).mul_(0.02).add_(centre).to(dtype)
    fan_in = 1 if "embedding" in name and "time" not in name else torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator).mul_(fan_in**-0.5).to(dtype)


def pack(folder: Path, out: Path) -> None:
    """A diffusers folder's UNet, VAE and text encoder as one file in the LDM layout."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    dtype = stored_dtype(folder / "unet")
    with quiet_libraries():
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype)
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    with reading(folder / "unet") as reader:
        entries = [
            Entry(theirs, tuple(tensor.shape), dtype, partial(reader.get, ours))
            for (ours, tensor), theirs in zip(unet.state_dict().items(), unet_to_ldm(unet), strict=True)
        ]
        rest = {**vae_to_ldm(vae), **text_encoder_to_ldm(encoder)}
        entries += [Entry(key, tuple(tensor.shape), dtype, partial(_same, tensor)) for key, tensor in rest.items()]
        write_safetensors(out, entries)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _text_config(width: int, unet_width: int) -> CLIPTextConfig:
    is_whole = unet_width == UNET_WIDTH
    layers = {768: 12, 1024: 23}[width] if is_whole else 2
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width if is_whole else width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act="quick_gelu" if width == 768 else "gelu",
        projection_dim=768 if width == 768 else 512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def _pipeline(fixture: Fixture, unet: nn.Module, vae: nn.Module, encoder: nn.Module) -> Any:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=fixture.prediction,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": clip_tokenizer("<|endoftext|>" if fixture.family == "sd15" else "!"),
        "unet": unet,
        "scheduler": scheduler,
        "feature_extractor": None,
    }
    name = PIPELINES[fixture.channels]
    if fixture.channels == 5:
        parts["depth_estimator"] = None
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    return getattr(diffusers, name)(**parts)


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(FIXTURES))
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a .safetensors file")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    parser.add_argument("--width", type=int, default=UNET_WIDTH, help="the UNet's on its highest level, by 32")
    arguments = parser.parse_args()
    make(arguments.model, arguments.out.expanduser(), DTYPES[arguments.dtype], arguments.width)


if __name__ == "__main__":
    main()
