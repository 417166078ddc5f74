"""Whole full-size pipelines with random weights, to check what only real sizes show. Nothing of them is stored.

    python tools/make_fixtures.py sd15 --out ~/fixtures/sd15

The VAE and the text encoder have Stable Diffusion's own shapes, the tokenizer is the bundled model's: their pictures
mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from asdm_compress.models.families import FAMILIES, random_unet
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.models.saving import save_pipeline

TEXT = {
    768: CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    1024: CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make(name: str, out: Path, dtype: torch.dtype) -> None:
    """Write one pipeline."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    unet = random_unet(family, dtype, torch.device("cpu"))
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=4,
    ).to(dtype)
    encoder = CLIPTextModel(TEXT[int(family.unet_config["cross_attention_dim"])]).to(dtype)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(MINI_SD_FOLDER / "tokenizer", model_max_length=77),
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear",
                                beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    save_pipeline(pipeline, out)


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    arguments = parser.parse_args()
    make(arguments.model, arguments.out.expanduser(), DTYPES[arguments.dtype])


if __name__ == "__main__":
    main()
