"""Networks of the right shape with random weights, as files, for what users bring: Inception, CLIP, AlexNet."""

from __future__ import annotations

import shutil

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from asdm_compress.evaluation.inception import Inception
from asdm_compress.models.names import MINI_SD_FOLDER

ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def save_inception(path):
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    # As old files have it, without the counters of batch norms.
    state = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, path)
    return path


def save_alexnet(path):
    generator = torch.Generator().manual_seed(1)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for number, (channels, width, kernel) in ALEXNET.items():
        scale = (width * kernel**2 / 2) ** -0.5
        state[f"features.{number}.weight"] = scale * torch.randn(channels, width, kernel, kernel, generator=generator)
        state[f"features.{number}.bias"] = 0.1 * torch.randn(channels, generator=generator)
    torch.save(state, path)
    return path


def save_clip(folder):
    shutil.copytree(MINI_SD_FOLDER / "tokenizer", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 40, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(2)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
