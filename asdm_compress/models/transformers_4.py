"""Makes the text parts of a pipeline that was written with transformers 5 readable for transformers 4 and its kin.

transformers 5 leaves a text encoder's outer name out of its tensors' names where the encoder was not opened from a
folder, and writes a tokenizer into `tokenizer.json` alone. Before it the names began with `text_model.`, and
`vocab.json` and `merges.txt` were needed; it reads both kinds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file

TEXT_MODEL: Final = "text_model."
_INNER: Final = ("embeddings.", "encoder.", "final_layer_norm.")  # of a CLIP text model, without the outer name
_MERGES_HEAD: Final = "#version: 0.2"


def with_text_model(key: str) -> str:
    """The name of a text encoder's tensor with the outer module's."""
    return key if key.startswith(TEXT_MODEL) else f"{TEXT_MODEL}{key}"


def write_for_transformers_4(folder: Path) -> None:
    """Rename the text encoder's tensors below a pipeline's folder, and write its tokenizer's two files."""
    encoder = folder / "text_encoder"
    for path in sorted(encoder.glob("*.safetensors")):
        tensors = load_file(path)
        if any(key.startswith(_INNER) for key in tensors):
            aside = path.with_suffix(".tmp")
            save_file({_named(key): tensor for key, tensor in tensors.items()}, aside, metadata={"format": "pt"})
            aside.replace(path)
    for path in sorted(encoder.glob("*.index*.json")):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {_named(key): file for key, file in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_vocabulary(folder / "tokenizer")


def _named(key: str) -> str:
    return with_text_model(key) if key.startswith(_INNER) else key


def _write_vocabulary(folder: Path) -> None:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.is_file() or (vocabulary.is_file() and merges.is_file()):
        return
    model: dict[str, Any] = json.loads(whole.read_text(encoding="utf-8")).get("model") or {}
    if model.get("type") != "BPE":
        return
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocabulary.write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges.write_text("\n".join([_MERGES_HEAD, *pairs]) + "\n", encoding="utf-8")
