"""From items to latents and text embeddings: by the VAE, or, of captions alone, by the teacher's sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.provenance import content_hash
from asdm_compress.distillation.sources import Item
from asdm_compress.models.families import latent_size_of
from asdm_compress.sampling.run import SamplingRun
from asdm_compress.sampling.settings import SamplingSettings, encode

ENCODED_AT_ONCE: Final = 16  # of 512 pixels a side; of larger ones as many fewer as they have more of them
_HALF: Final = 2  # bytes of a number in a shard


@dataclass(frozen=True)
class Encoder:
    """A pipeline as far as data need it. Images become the mean of the VAE's posterior, scaled as the UNet sees it.

    Without images, the pipeline samples: item i from seed `sampling.seed + i`.
    """

    pipeline: StableDiffusionPipeline
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    makes_images: bool = False

    @property
    def image_size(self) -> int:
        """Pixels per side."""
        size = self.sampling.image_size
        return size or latent_size_of(self.pipeline.unet) * int(self.pipeline.vae_scale_factor)

    @property
    def at_once(self) -> int:
        """How many images are held and encoded together."""
        return max(1, min(ENCODED_AT_ONCE, ENCODED_AT_ONCE * 512**2 // self.image_size**2))

    def identity(self) -> Mapping[str, Any]:
        """What decides the encoding, JSON-like."""
        p = self.pipeline
        found: dict[str, Any] = {
            "image_size": self.image_size,
            "vae": [weights_hash(p.vae), p.vae.config["scaling_factor"]],
            "text": [weights_hash(p.text_encoder), content_hash(_layers_of(p.text_encoder))],
            "tokens": [p.tokenizer.model_max_length, content_hash(p.tokenizer.get_vocab()), p.tokenizer.pad_token],
            "dtype": str(p.vae.dtype),
        }
        if self.makes_images:
            scheduler = {k: v for k, v in p.scheduler.config.items() if not k.startswith("_")}
            found["teacher"] = [weights_hash(p.unet), type(p.scheduler).__name__, scheduler, asdict(self.sampling)]
        return found

    def bytes_per_item(self) -> int:
        """What one item takes on the disk."""
        side = self.image_size // int(self.pipeline.vae_scale_factor)
        latent = int(self.pipeline.vae.config["latent_channels"]) * side * side
        text = int(self.pipeline.tokenizer.model_max_length) * int(self.pipeline.unet.config["cross_attention_dim"])
        return _HALF * (latent + text)

    @torch.no_grad()
    def latents(self, items: Sequence[Item], numbers: Sequence[int]) -> Tensor:
        """Latents (N, C, h, w); `numbers` are the items' places in the source."""
        parts = []
        for first in range(0, len(items), self.at_once):
            rows = slice(first, first + self.at_once)
            part = items[rows]
            parts.append(self._sampled(part, numbers[rows]) if self.makes_images else self._of(part))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings (N, tokens, width)."""
        parts = [
            encode(self.pipeline, captions[i : i + ENCODED_AT_ONCE], 1.0)[:, 0]
            for i in range(0, len(captions), ENCODED_AT_ONCE)
        ]
        return torch.cat(parts)

    def _of(self, items: Sequence[Item]) -> Tensor:
        vae = self.pipeline.vae
        images = torch.stack([item.image for item in items if item.image is not None])
        mean: Tensor = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
        return mean * float(vae.config["scaling_factor"])

    def _sampled(self, items: Sequence[Item], numbers: Sequence[int]) -> Tensor:
        settings = SamplingSettings(
            self.sampling.steps, self.sampling.guidance, self.sampling.seed + numbers[0], self.sampling.image_size
        )
        texts = encode(self.pipeline, [item.caption for item in items], settings.guidance)
        run = SamplingRun(self.pipeline, texts, settings)
        while not run.finished:
            run.advance()
        latents: Tensor = run.latents
        return latents


def _layers_of(text_encoder: Any) -> dict[str, Any]:
    """What of its config decides what the weights compute, and not how they were stored."""
    stored = ("dtype", "torch_dtype", "transformers_version", "architectures")
    config = text_encoder.config.to_dict()
    return {name: value for name, value in config.items() if not name.startswith("_") and name not in stored}
