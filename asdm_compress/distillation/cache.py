"""Latents and text embeddings, computed once and kept by content: epochs touch neither the VAE nor the text encoder.

A cache is a folder of shards in safetensors, each of as many items, and an index that is written last. A shard that is
there is never made again, so a run that was killed goes on; several processes make different shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asdm_compress.core.distillation import OnBad
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.files import CACHE_HINT, cache_folder, check_space, output_file
from asdm_compress.core.provenance import content_hash
from asdm_compress.distillation.encoding import Encoder
from asdm_compress.distillation.sources import BadItem, Item, Source

CACHE_VERSION: Final = 1  # to be raised when the meaning of a shard changes
SHARD_ITEMS: Final = 512
INDEX: Final = "index.json"
_SHOWN: Final = 3  # bad items that a message names

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Share:
    """Which of several processes this is."""

    rank: int = 0
    processes: int = 1


class LatentCache:
    """Read side: rows of latents (C, h, w) and text embeddings (tokens, width), by item number from 0.

    `empty` is the empty prompt's embedding, `skipped` what was left out and why.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.folder = folder
        self.skipped: list[tuple[str, str]] = [(name, why) for name, why in index["skipped"]]
        self._starts: list[int] = []
        self._shards: list[Any] = []
        total = 0
        for name, rows in index["shards"]:
            if rows:
                self._starts.append(total)
                self._shards.append(safe_open(folder / name, framework="pt"))
                total += rows
        self._rows = total
        with safe_open(folder / "empty.safetensors", framework="pt") as file:
            self.empty: Tensor = file.get_tensor("texts")[0].float()
        self._boundaries = torch.tensor(self._starts)
        shape = self._shards[0].get_slice("latents").get_shape()
        self.latent_shape: tuple[int, int, int] = (shape[1], shape[2], shape[3])

    def __len__(self) -> int:
        return self._rows

    def latents(self, items: Tensor) -> Tensor:
        """(B,) item numbers to latents (B, C, h, w) in fp32."""
        return self._gather("latents", items)

    def texts(self, items: Tensor) -> Tensor:
        """(B,) item numbers to text embeddings (B, tokens, width) in fp32."""
        return self._gather("texts", items)

    def _gather(self, name: str, items: Tensor) -> Tensor:
        shards = torch.searchsorted(self._boundaries, items, right=True) - 1
        rows = []
        for item, shard in zip(items.tolist(), shards.tolist(), strict=True):
            row = item - self._starts[shard]
            rows.append(self._shards[shard].get_slice(name)[row : row + 1])
        return torch.cat(rows).float()


def cached(
    source: Source,
    encoder: Encoder,
    on_bad: OnBad,
    share: Share = Share(),
    barrier: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> LatentCache:
    """The cache of a source's items as an encoder makes them, made now as far as it is not there.

    Every process calls this with its `share`; `barrier` waits for all of them. Raises AsdmError for items that cannot
    be used (with `on_bad` "refuse"), for a source without any that can, and for a disk that is too small.
    """
    content = {"version": CACHE_VERSION, "shard": SHARD_ITEMS, **encoder.identity(), "source": dict(source.identity())}
    folder = cache_folder() / "latents" / content_hash(content)
    complete = _is_complete(folder)
    barrier()  # all have looked before anything is written
    if not complete:
        _check_disk(folder, source, encoder)
        _write_shards(folder, source, encoder, on_bad, share, progress)
    barrier()
    if share.rank == 0 and not complete:
        _write_index(folder, source)
    barrier()
    cache_index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if on_bad == "refuse" and cache_index["skipped"]:
        raise _bad(cache_index["skipped"], len(source))
    if not any(rows for _, rows in cache_index["shards"]):
        raise AsdmError("no item of the data can be used", _first(cache_index["skipped"]))
    return LatentCache(folder)


def _write_shards(
    folder: Path, source: Source, encoder: Encoder, on_bad: OnBad, share: Share, progress: Progress | None
) -> None:
    names = _names(source)
    if share.rank == 0 and not _is_whole(folder / "empty.safetensors"):
        _save(folder / "empty.safetensors", {"texts": encoder.texts([""]).half().cpu()}, [])
    for number, name in enumerate(names):
        if number % share.processes == share.rank and not _is_whole(folder / name):
            tensors, bad = _encode(source, encoder, number * SHARD_ITEMS, on_bad)
            _save(folder / name, tensors, bad)
        if progress:
            progress(number + 1, len(names))


def _names(source: Source) -> list[str]:
    return [f"items-{number:05d}.safetensors" for number in range(-(-len(source) // SHARD_ITEMS))]


def _encode(
    source: Source, encoder: Encoder, start: int, on_bad: OnBad
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    good: list[tuple[int, Item]] = []
    bad: list[tuple[str, str]] = []
    parts: list[tuple[Tensor, Tensor]] = []

    def encode() -> None:
        latents = encoder.latents([item for _, item in good], [number for number, _ in good])
        parts.append((latents.half().cpu(), encoder.texts([item.caption for _, item in good]).half().cpu()))
        good.clear()  # images are large: no more of them are held than are encoded at once

    items = source.read(start, start + SHARD_ITEMS, encoder.image_size)
    for number, item in enumerate(items, start=start):
        if isinstance(item, BadItem):
            bad.append((item.name, item.reason))
            if on_bad == "refuse":
                raise _bad(bad, len(source))
            continue
        good.append((number, item))
        if len(good) == encoder.at_once:
            encode()
    if good:
        encode()
    if not parts:
        return {}, bad
    latents, texts = zip(*parts, strict=True)
    return {"latents": torch.cat(latents), "texts": torch.cat(texts)}, bad


def _save(path: Path, tensors: Mapping[str, Tensor], bad: Sequence[tuple[str, str]]) -> None:
    with output_file(path, CACHE_HINT) as aside:
        save_file({name: t.contiguous() for name, t in tensors.items()}, aside, {"bad": json.dumps(list(bad))})


def _is_whole(path: Path) -> bool:
    """Whether a shard is there and can be read; shards appear whole, so what is cut short is no work of ours."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("bad") is not None
    except SafetensorError:
        return False


def _is_complete(folder: Path) -> bool:
    """Whether the index is there, and every file that it names: some program may have cleared away a few."""
    try:
        shards = [name for name, _ in json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(_is_whole(folder / name) for name in ("empty.safetensors", *shards))


def _write_index(folder: Path, source: Source) -> None:
    shards: list[tuple[str, int]] = []
    skipped: list[list[str]] = []
    for name in _names(source):
        with safe_open(folder / name, framework="pt") as file:
            there = "latents" in file.keys()  # noqa: SIM118 - no mapping
            shards.append((name, file.get_slice("latents").get_shape()[0] if there else 0))
            skipped += json.loads(file.metadata()["bad"])
    with output_file(folder / INDEX, CACHE_HINT) as aside:
        aside.write_text(json.dumps({"items": len(source), "shards": shards, "skipped": skipped}), encoding="utf-8")


def _check_disk(folder: Path, source: Source, encoder: Encoder) -> None:
    there = sum(p.stat().st_size for p in folder.glob("*.safetensors")) if folder.is_dir() else 0
    try:
        check_space(folder, max(0, len(source) * encoder.bytes_per_item() - there))
    except AsdmError as error:
        raise AsdmError(error.message, CACHE_HINT, ExitCode.USER) from error


def _bad(bad: Sequence[Sequence[str]], total: int) -> AsdmError:
    return AsdmError(
        f"the data cannot be used as they are: {_first(bad)}",
        f"Mend the data, or leave such items out with --on-bad skip, which counts them ({total} items in all).",
    )


def _first(bad: Sequence[Sequence[str]]) -> str:
    named = "; ".join(f"{name}: {reason}" for name, reason in bad[:_SHOWN])
    return named + (f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
