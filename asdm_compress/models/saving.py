"""Writes pipelines so that they open again without any option."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import StableDiffusionPipeline

from asdm_compress.models.quiet import quiet_libraries


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a diffusers folder, every part in the precision that it has.

    Without a dtype, diffusers opens every part in fp32, but transformers takes what the text encoder's config says: of
    a pipeline saved in fp16, the two then do not fit together. The config is made to say fp32; a dtype that is asked
    for when the folder is opened goes before it.
    """
    with quiet_libraries():
        pipeline.save_pretrained(folder)
    path = folder / "text_encoder" / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
