"""Captioned images in a folder: `metadata.jsonl`, `metadata.csv`, or one text file beside each image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.images import BROKEN_IMAGE, what_is_wrong
from asdm_compress.distillation.sources import BadItem, Item

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILE_COLUMN: Final = "file_name"  # as Hugging Face's image folders call it
_HINT: Final = "A folder of images wants metadata.jsonl or metadata.csv with file_name and text, or a .txt per image."


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Images with captions; `entries` are paths inside the folder, each with its caption, None where it has none."""

    folder: Path
    entries: tuple[tuple[str, str | None], ...]

    @staticmethod
    def open(folder: Path, caption_column: str = "text", size: int | None = None) -> ImageFolder:
        """List a folder without reading its images; raises AsdmError for tables that cannot be used."""
        for name, reader in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
            if (folder / name).is_file():
                entries = _from_table(folder / name, reader(folder / name), caption_column)
                break
        else:
            if caption_column != "text":
                raise AsdmError(
                    f"{folder} has no metadata.jsonl or metadata.csv, and so no columns of captions",
                    "Leave --caption-column out to take the .txt beside every image.",
                )
            entries = _from_text_files(folder)
        if not entries:
            raise AsdmError(f"{folder} holds no images", _HINT)
        return ImageFolder(folder, tuple(entries)[:size])

    def __len__(self) -> int:
        return len(self.entries)

    def identity(self) -> Mapping[str, Any]:
        """Names, captions, and the sizes and times of the files: reading them all only to hash them takes long."""
        files = []
        for name, caption in self.entries:
            path = self.folder / name
            stat = path.stat() if path.is_file() else None
            files.append([name, caption, stat.st_size if stat else None, stat.st_mtime_ns if stat else None])
        return {"kind": "image folder", "files": files}

    def read(self, start: int, stop: int, image_size: int) -> Iterator[Item | BadItem]:
        """Images resized by their shorter side and cropped in the middle."""
        for name, caption in self.entries[start:stop]:
            if not caption:
                yield BadItem(name, _without_caption(self.folder / name))
                continue
            image = read_image(self.folder / name, image_size)
            yield BadItem(name, image) if isinstance(image, str) else Item(name, caption, image)


def read_image(path: Path, size: int) -> Tensor | str:
    """An image file as (3, size, size) in [-1, 1], or what is wrong with it."""
    if not path.is_file():
        return "there is no such file"
    return read_pixels(path, size)


def read_pixels(file: Path | BinaryIO, size: int) -> Tensor | str:
    """An image's bytes as (3, size, size) in [-1, 1], or what is wrong with them."""
    try:
        with Image.open(file) as image:
            return to_pixels(image, size)
    except BROKEN_IMAGE as error:
        return f"it is no image that can be read: {what_is_wrong(error)}"


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """An image as (3, size, size) in [-1, 1]: upright, its shorter side resized, cropped in the middle."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    fitted = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def _from_table(path: Path, rows: Sequence[Mapping[str, Any]], caption_column: str) -> list[tuple[str, str | None]]:
    columns = sorted({key for row in rows for key in row})
    for wanted in (FILE_COLUMN, caption_column):
        if wanted not in columns:
            raise AsdmError(
                f"{path} has no column {wanted}; it has {', '.join(columns) or 'none'}",
                "Name the captions' column with --caption-column." if wanted == caption_column else _HINT,
            )
    return [(str(row.get(FILE_COLUMN) or ""), _caption(row.get(caption_column))) for row in rows]


def first_of(value: Any) -> Any:
    """The first of several captions, as COCO's images have them; any other value itself."""
    return next(iter(value), None) if isinstance(value, (list, tuple)) else value


def _caption(value: Any) -> str | None:
    value = first_of(value)
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    rows = []
    # JSON's strings may hold characters that other programs take for ends of lines.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise AsdmError(f"{path}:{number}: no valid JSON: {error.msg}") from error
        if not isinstance(row, Mapping):
            raise AsdmError(f"{path}:{number}: no JSON object")
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    rows: list[Mapping[str, Any]] = []
    try:
        for row in reader:
            if None in row:
                raise AsdmError(
                    f"{path}:{reader.line_num}: more values than columns", "Quote captions that have commas in them."
                )
            rows.append(row)
    except csv.Error as error:
        raise AsdmError(f"{path} is no CSV table: {error}") from error
    return rows


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # a quoted value keeps its ends of lines
            return file.read()
    except UnicodeDecodeError as error:
        raise AsdmError(f"{path} is no UTF-8 text") from error
    except OSError as error:
        raise AsdmError(f"{path} cannot be read: {error.strerror}") from error


def _caption_in(path: Path) -> str | None:
    """An image's caption in a file of its own; None where there is none that can be read."""
    try:
        return _caption(_text(path))
    except AsdmError:
        return None


def _without_caption(image: Path) -> str:
    """Why an image has no caption."""
    try:
        _text(image.with_suffix(".txt"))
    except AsdmError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            return "its caption is no UTF-8 text"
    return "it has no caption"


def _from_text_files(folder: Path) -> list[tuple[str, str | None]]:
    entries: list[tuple[str, str | None]] = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        text = path.with_suffix(".txt")
        caption = None
        if text.is_file():
            caption = _caption_in(text)
        entries.append((path.relative_to(folder).as_posix(), caption))
    if entries and all(caption is None for _, caption in entries):
        raise AsdmError(f"none of the {len(entries)} images in {folder} has a caption", _HINT)
    return entries
