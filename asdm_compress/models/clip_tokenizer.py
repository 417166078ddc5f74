"""CLIP's tokenizer from the vocabulary that the package brings along, so that a single file needs no network.

The vocabulary is OpenAI's byte-pair encoding; OpenCLIP, and so Stable Diffusion 2.x, uses the same one. Its ids follow
from the merges alone: the bytes, the bytes that end a word, one id per merge, and the two marks of a text's ends.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Final

from transformers import CLIPTokenizer

_MERGES: Final = Path(__file__).with_name("clip") / "merges.txt.gz"
_WORD_END: Final = "</w>"
_TEXT_START: Final = "<|startoftext|>"
_TEXT_END: Final = "<|endoftext|>"
TOKENS: Final = 77
VOCABULARY: Final = 49_408


def clip_tokenizer(pad_token: str = _TEXT_END) -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion 1.x, or, padding with "!", that of 2.x."""
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    pairs = [tuple(line.split()) for line in merges]
    characters = _byte_characters()
    tokens = [*characters, *(c + _WORD_END for c in characters), *("".join(pair) for pair in pairs)]
    vocabulary = {token: i for i, token in enumerate([*tokens, _TEXT_START, _TEXT_END])}
    assert len(vocabulary) == VOCABULARY
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=pairs,
        unk_token=_TEXT_END,
        bos_token=_TEXT_START,
        eos_token=_TEXT_END,
        pad_token=pad_token,
        model_max_length=TOKENS,
    )


def _byte_characters() -> list[str]:
    """The visible character that stands for each byte (GPT-2's table): printable ones for themselves, first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
