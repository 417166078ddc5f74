"""Stages `package` and `unpack`: the trained parts as the package's diffusers pipeline in fp16, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.models.saving import save_pipeline
from asdm_compress.scenes.reader import WEIGHTS
from mini_sd.architecture import NOISE_SCHEDULE
from mini_sd.reader import load_trained_reader
from mini_sd.text import load_text_encoder
from mini_sd.unet import load_unet
from mini_sd.vae import load_vae


def package(folder: Path) -> None:
    """Replace the bundled pipeline and reader by what stands in `folder`."""
    tokenizer, text_encoder = load_text_encoder(folder)
    unet, _, _ = load_unet(folder)
    scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, steps_offset=1, timestep_spacing="linspace")
    pipeline = StableDiffusionPipeline(
        vae=load_vae(folder),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline.to(dtype=torch.float16), MINI_SD_FOLDER)
    stages = [stage for stage in ("vae", "decoder", "text", "unet", "reader") if (folder / f"{stage}.pt").exists()]
    history = {stage: _history(folder, stage) for stage in stages}
    (MINI_SD_FOLDER / "training.json").write_text(json.dumps(history, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in load_trained_reader(folder).state_dict().items()}, WEIGHTS)
    for path in MINI_SD_FOLDER.rglob("*.safetensors"):
        path.chmod(0o644)
    size = sum(f.stat().st_size for f in MINI_SD_FOLDER.rglob("*") if f.is_file()) + WEIGHTS.stat().st_size
    print(f"{size / 1e6:.1f} MB in {MINI_SD_FOLDER} and {WEIGHTS.name}")


def unpack(folder: Path) -> None:
    """Write checkpoints of the bundled parts into an empty `folder`, for going on where its own ones are lost.

    Their weights are rounded to fp16 and the optimizers' states are not kept: those begin anew.
    """
    kept = [path.name for path in folder.glob("*.pt")]
    if kept:
        raise SystemExit(f"{folder} has checkpoints of its own ({', '.join(sorted(kept))}): go on with those")
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(MINI_SD_FOLDER, torch_dtype=torch.float32, safety_checker=None)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    reader = {"model": load_file(WEIGHTS)}
    vae, text, unet = ({"model": part.state_dict()} for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet))
    unet["ema"] = EMAModel(pipeline.unet.parameters()).state_dict()
    stages = {"vae": vae, "decoder": vae, "text": text, "unet": unet, "reader": reader}
    for stage, record in json.loads((MINI_SD_FOLDER / "training.json").read_text()).items():
        history = {"step": record["steps"], "seconds": 60 * record["minutes"], "calls": record["calls"]}
        torch.save(stages[stage] | history | {"metrics": record["last"]}, folder / f"{stage}.pt")


def _history(folder: Path, stage: str) -> dict[str, Any]:
    """Steps, minutes, seeds, machines and last metrics of a stage, as its checkpoint has them."""
    state = torch.load(folder / f"{stage}.pt", map_location="cpu", weights_only=True)
    minutes = round(state["seconds"] / 60, 1)
    return {"steps": state["step"], "minutes": minutes, "calls": state["calls"], "last": state["metrics"]}
