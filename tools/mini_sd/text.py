"""Stage `text`: the text encoder learns to say what a caption claims, and is frozen afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from asdm_compress.scenes.captions import Caption, caption_of
from asdm_compress.scenes.world import BACKGROUNDS, COLOURS, MAX_OBJECTS, RELATIONS, SHAPES, SIZES, sample_scene
from mini_sd.architecture import TEXT_TOKENS, TEXT_WIDTH, make_text_encoder, make_tokenizer
from mini_sd.progress import TrainingRun

LEARNING_RATE: Final = 1e-3
BATCH: Final = 128
# Classes per question; one more for "not said".
KIND_QUESTIONS: Final = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1)
OBJECT_QUESTIONS: Final = (*KIND_QUESTIONS, 4, 4, len(RELATIONS) + 1)
SCENE_QUESTIONS: Final = OBJECT_QUESTIONS * MAX_OBJECTS + (len(BACKGROUNDS) + 1,)


class CaptionReader(nn.Module):
    """Linear heads: a noun's token must tell its own kind, every token from the end of the text on the whole scene."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Linear(TEXT_WIDTH, sum(KIND_QUESTIONS))
        self.scene = nn.Linear(TEXT_WIDTH, sum(SCENE_QUESTIONS))


def train_text(folder: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Train or go on training; the checkpoint is `text.pt` in `folder`."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(folder)
    nouns = {tokenizer(shape)["input_ids"][1] for shape in SHAPES}
    encoder, reader = make_text_encoder(tokenizer).to(device), CaptionReader().to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=LEARNING_RATE, weight_decay=1e-2)
    run = TrainingRun(folder, "text", minutes, {"model": encoder, "reader": reader, "optimizer": optimizer}, seed)
    rng = np.random.default_rng([seed, run.step])
    for _ in run.steps(optimizer, LEARNING_RATE):
        captions = [caption_of(sample_scene(rng, held_out=False), rng) for _ in range(BATCH)]
        tokens = tokenize(tokenizer, [c.text for c in captions])
        hidden = encoder(tokens.to(device)).last_hidden_state
        is_noun = torch.isin(tokens, torch.tensor(sorted(nouns)))
        kinds = torch.cat([_kind_answers(c) for c in captions])
        kind_loss, kind_right = _ask(reader.kind(hidden[is_noun]), kinds.to(device), KIND_QUESTIONS)
        ended = tokens == tokenizer.eos_token_id
        scenes = torch.stack([_scene_answers(c) for c in captions])
        which = ended.nonzero()[:, 0]
        scene_loss, scene_right = _ask(reader.scene(hidden[ended]), scenes[which].to(device), SCENE_QUESTIONS)
        loss = kind_loss + scene_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        run.log(loss=loss.item(), kinds_right=kind_right, scenes_right=scene_right)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (B, 40), padded as the pipeline pads them."""
    padded = tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    return padded["input_ids"]


def load_text_encoder(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the trained, frozen encoder."""
    tokenizer = _tokenizer(folder)
    encoder = make_text_encoder(tokenizer).eval().requires_grad_(False)
    encoder.load_state_dict(torch.load(folder / "text.pt", map_location="cpu", weights_only=True)["model"])
    return tokenizer, encoder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that belongs to the text encoder; made once.

    Words that are equally frequent are numbered in an order that differs from process to process, so that another one
    would hand other words to a trained encoder.
    """
    path = folder / "tokenizer"
    if not path.exists():
        make_tokenizer().save_pretrained(path)
    tokenizer = CLIPTokenizer.from_pretrained(path)
    for where_from in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(where_from, None)
    return tokenizer


def _ask(logits: Tensor, answers: Tensor, questions: tuple[int, ...]) -> tuple[Tensor, float]:
    """Mean cross-entropy over the questions, and the share of rows with every answer right."""
    losses, right = [], torch.ones(len(answers), dtype=torch.bool, device=answers.device)
    for part, answer in zip(logits.split(questions, dim=1), answers.T, strict=True):
        losses.append(F.cross_entropy(part, answer))
        right &= part.argmax(1) == answer
    return torch.stack(losses).mean(), right.float().mean().item()


def _kind_answers(caption: Caption) -> Tensor:
    return torch.tensor(
        [
            (SHAPES.index(o.shape) + 1, COLOURS.index(o.colour) + 1, SIZES.index(o.size) + 1 if o.size else 0)
            for o in caption.objects
        ]
    )


def _scene_answers(caption: Caption) -> Tensor:
    kinds = _kind_answers(caption)
    answers = torch.zeros(MAX_OBJECTS, len(OBJECT_QUESTIONS), dtype=torch.long)
    answers[: len(kinds), : kinds.shape[1]] = kinds
    for i, claim in enumerate(caption.objects):
        if claim.cell is not None:
            answers[i, 3], answers[i, 4] = claim.cell[0] + 1, claim.cell[1] + 1
    for _, relation, later in caption.relations:
        answers[later, 5] = RELATIONS.index(relation) + 1
    background = BACKGROUNDS.index(caption.background) + 1 if caption.background else 0
    return torch.cat([answers.flatten(), torch.tensor([background])])
