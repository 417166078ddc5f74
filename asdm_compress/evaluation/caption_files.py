"""Captions from files as data sets publish them: COCO's JSON, tables, and plain lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from asdm_compress.core.errors import AsdmError
from asdm_compress.evaluation.prompts import read_prompts

_COLUMNS: Final = ("caption", "text", "prompt", "sentence")
_HINT: Final = (
    "Give one caption per line (.txt), a table with a column named caption or text (.csv, .tsv, .jsonl), or COCO's "
    "captions (.json)."
)


def read_captions(path: Path) -> list[str]:
    """The captions of a file, in its order; of COCO's several captions per image the first.

    Raises AsdmError for a file that cannot be read or holds none.
    """
    kind = path.suffix.lower()
    if kind not in (".json", ".jsonl", ".csv", ".tsv"):
        return read_prompts(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if kind == ".jsonl":  # whose strings may hold what other programs take for ends of lines
            found = _of_json([json.loads(line) for line in text.split("\n") if line.strip()])
        else:
            found = _of_json(json.loads(text)) if kind == ".json" else _of_table(text, path)
        captions = [" ".join(caption.split()) for caption in found]
    except OSError as error:
        raise AsdmError(f"the captions file {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, TypeError, KeyError, AttributeError) as error:
        raise AsdmError(f"the captions file {path} is damaged or of another kind: {error}", _HINT) from error
    captions = [caption for caption in captions if caption]
    if len(captions) < 2:
        raise AsdmError(f"the captions file {path} has {len(captions)} captions", "Give at least two.")
    return captions


def _of_json(content: Any) -> list[str]:
    if isinstance(content, dict):
        annotations: Sequence[Any] = content["annotations"]
        first: dict[Any, str] = {}
        for one in sorted(annotations, key=lambda a: a.get("id", 0)):
            first.setdefault(one["image_id"], one["caption"])
        order = [image["id"] for image in content.get("images", [])] or list(first)
        return [first[image] for image in order if image in first]
    return [one if isinstance(one, str) else one[_column_of(one)] for one in content]


def _column_of(record: Any) -> str:
    for name in _COLUMNS:
        if name in record:
            return name
    raise KeyError(f"a record without {' or '.join(_COLUMNS)}")


def _of_table(text: str, path: Path) -> list[str]:
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    if not rows:
        return []
    names = [name.strip().lower() for name in rows[0]]
    column = next((names.index(name) for name in _COLUMNS if name in names), None)
    if column is None:
        raise AsdmError(f"the captions file {path} has no column named {' or '.join(_COLUMNS)}", _HINT)
    return [row[column] for row in rows[1:] if len(row) > column]
