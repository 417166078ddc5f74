"""A real training step of full-size Stable Diffusion 1.5: memory and time.

    python tools/bench_distill_full_size.py                    # writes tools/results/distill_full_size.json
    python tools/bench_distill_full_size.py --model mini-sd    # whether it runs; writes nothing

The weights are random and the latents noise, on which neither memory nor time depends. The student is a UNet of stock
depths (1, 1, 1, 2), 0.66 of the teacher's MACs. It is trained by the package's own trainer, teacher, averages and AdamW
included: in bf16 with gradient checkpointing, on a CPU one image at a time, on a GPU from one to as many as fit. What a
step would take without the cache is that with images and captions encoded anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from measuring import Bench, measured
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.distillation import changed, load_preset
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.distillation.batches import Batches
from asdm_compress.distillation.cache import INDEX, LatentCache
from asdm_compress.distillation.estimate import estimate_memory
from asdm_compress.distillation.losses import noise_scheduler
from asdm_compress.distillation.pairs import find_pairs
from asdm_compress.distillation.selection import phases_of
from asdm_compress.distillation.trainer import LoopSettings, Subjects, Trainer
from asdm_compress.models.loading import load_unet
from asdm_compress.models.source import LoadOptions

MODEL = "sd15"
RECIPE, TOKENS, ITEMS = "shallow-1-1-1-2-v1", 77, 64
STEPS = 3  # the first makes the optimiser's states, and is not timed
PATCH = 8  # pixels of a latent's side


def main() -> None:
    """Take the steps and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    model = parser.parse_args().model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model == MODEL:
        with measured("distill_full_size", __doc__, device) as bench:
            measure(bench, model)
    else:
        measure(Bench("distill_full_size", __doc__ or "", device), model)


def measure(bench: Bench, model: str) -> None:
    """Steps of the trainer; on a GPU, of the full size, with ever more images at once, until they do not fit."""
    once = bench.device.type == "cpu" or model != MODEL
    options = LoadOptions(dtype=torch.bfloat16, random_weights=model != "mini-sd")
    teacher = load_unet(model, options).eval().requires_grad_(False)
    plan = Plan(load_recipe(find_recipe(RECIPE)).as_edits())
    encoding = round(_encoding(teacher, bench.device), 3)
    bench.facts |= {
        "model": model, "student": RECIPE, "dtype": "bf16", "gradient_checkpointing": True,
        "encoding_seconds_per_image": encoding,
    }  # fmt: skip
    teacher.to(bench.device)
    for batch in (1,) if once else (2**power for power in itertools.count()):
        try:
            bench.add(_row(teacher, plan, batch, encoding))
        except torch.OutOfMemoryError:
            break


def _row(teacher: UNet2DConditionModel, plan: Plan, batch: int, encoding: float) -> dict[str, Any]:
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    student = assemble(teacher, plan).float()
    changes = {"steps": STEPS, "batch": batch, "probe_every": 0, "optimiser.warmup_steps": 0, "trains": "all"}
    training = changed(load_preset("asdm"), changes)
    loop = LoopSettings(gradient_checkpointing=True, save_every=10**9)
    noising = noise_scheduler(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config)
    pairs = find_pairs(student, teacher, plan, training.losses.features)
    places = tuple(p.student for p in pairs), tuple(p.teacher for p in pairs)
    ended: list[float] = []

    def report(done: int, total: int, text: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended.append(time.perf_counter())

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        cache = _noise(Path(folder), teacher)
        batches = Batches(cache, training, int(noising.config.num_train_timesteps))
        subjects = Subjects(student, teacher, noising, batches, phases_of(training, student, None), *places)
        Trainer(subjects, training, loop, Path(folder) / "run", accelerator, report=report).train()
    seconds = min(after - before for before, after in pairwise(ended))
    trained = sum(p.numel() for p in student.parameters())
    expected = estimate_memory(student, teacher, trained, batch, TOKENS, gradient_checkpointing=True, half=True)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident()
    return {
        "batch": batch,
        "seconds_per_step": round(seconds, 2),
        "images_per_second": round(batch / seconds, 4),
        "images_per_second_without_cache": round(batch / (seconds + batch * encoding), 4),
        "peak_gib": round(peak / 2**30, 2),
        "expected_gib": round(expected.total / 2**30, 2),
        "trained_parameters": trained,
    }


def _noise(folder: Path, teacher: UNet2DConditionModel) -> LatentCache:
    """A cache like that of real images."""
    size, width = int(teacher.config["sample_size"]), int(teacher.config["cross_attention_dim"])
    tensors = {"latents": torch.randn(ITEMS, 4, size, size).half(), "texts": torch.randn(ITEMS, TOKENS, width).half()}
    save_file(tensors, folder / "items-00000.safetensors")
    save_file({"texts": torch.randn(1, TOKENS, width).half()}, folder / "empty.safetensors")
    index = {"items": ITEMS, "shards": [["items-00000.safetensors", ITEMS]], "skipped": []}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return LatentCache(folder)


@torch.no_grad()
def _encoding(teacher: UNet2DConditionModel, device: torch.device) -> float:
    """Seconds in which VAE and text encoder of Stable Diffusion's size encode an image and its caption."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    vae, text = vae.to(device, torch.bfloat16).eval(), text.to(device, torch.bfloat16).eval()
    side = PATCH * int(teacher.config["sample_size"])
    image = torch.randn(1, 3, side, side, device=device, dtype=torch.bfloat16)
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        vae.encode(image)
        text(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _resident() -> int:
    """The most bytes that this process has held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
