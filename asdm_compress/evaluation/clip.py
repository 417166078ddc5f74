"""CLIP's image and text embeddings, for CLIP scores and CMMD, from a folder in transformers' layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from asdm_compress.core.errors import AsdmError


class Clip:
    """A CLIP model with its processors; embeddings have length 1, so that their products are cosines."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor, self.tokenizer, self.device = processor, tokenizer, device

    @property
    def input_size(self) -> int:
        """Pixels per side that the model sees."""
        return int(self.model.config.vision_config.image_size)

    @property
    def width(self) -> int:
        """Of its vision transformer, which tells CLIP models apart."""
        return int(self.model.config.vision_config.hidden_size)

    @torch.no_grad()
    def of_images(self, images: Sequence[Image]) -> Tensor:
        """Unit embeddings (N, D)."""
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        vision = self.model.vision_model(pixel_values=pixels.to(self.device))
        return F.normalize(self.model.visual_projection(vision.pooler_output).float(), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (N, D); what is too long for the model is cut off."""
        length = int(self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        text = self.model.text_model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        )
        return F.normalize(self.model.text_projection(text.pooler_output).float(), dim=1)


def load_clip(folder: Path, device: torch.device) -> Clip:
    """Open a local CLIP folder; raises AsdmError for one that is not complete."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise AsdmError(
                f"{folder} is no complete CLIP folder: {name} is not in it",
                "Give a folder of a CLIP model as transformers saves it: config.json, model.safetensors, "
                "preprocessor_config.json and the tokenizer's files.",
            )
    try:
        model, info = CLIPModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
        # With torchvision's resizing other pixels come out: the figures must not depend on what else is installed.
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AsdmError(f"{folder} cannot be opened as a CLIP model: {reason}", "Fetch the folder again.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise AsdmError(f"{folder} lacks the weights of {missing[0]}", "Fetch the folder again.")
    return Clip(model, processor, tokenizer, device)
