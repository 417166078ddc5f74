"""Captioned images in tables, by Hugging Face `datasets`: saved to disk, parquet, webdataset shards, or streamed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from PIL import Image
from torch import Tensor

from asdm_compress.core.distillation import Data
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.distillation.image_folder import first_of, read_image, read_pixels, to_pixels
from asdm_compress.distillation.sources import BadItem, Item

HUB: Final = "hf:"
_DISK_MARKS: Final = ("dataset_info.json", "dataset_dict.json", "state.json")
_IMAGE_COLUMNS: Final = ("image", "jpg", "png", "jpeg", "webp")  # the latter four are webdataset's
_CAPTION_COLUMNS: Final = ("text", "caption", "txt")


@dataclass(frozen=True)
class TableSource:
    """Rows with an image and a caption; `rows` is a `datasets.Dataset`, or a stream of at most `count` rows.

    Images that are named by their paths lie relative to `folder`, the table's own, or else to the current one.
    """

    name: str
    rows: Any
    image_column: str
    caption_column: str
    count: int
    streamed: bool
    files: Sequence[tuple[str, int, int]] = field(default_factory=tuple)
    folder: Path = Path()
    _stream: _Stream = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stream", _Stream(self.rows))

    def __len__(self) -> int:
        return self.count

    def identity(self) -> Mapping[str, Any]:
        """The files by name, size and time, or the name on the hub."""
        columns = [self.image_column, self.caption_column]
        return {"kind": "table", "name": self.name, "files": list(self.files), "columns": columns, "count": self.count}

    def read(self, start: int, stop: int, image_size: int) -> Iterator[Item | BadItem]:
        """Rows in order; of a stream, those before `start` are read and left.

        Raises AsdmError where the reading itself breaks off, as in a shard that is cut short.
        """
        stop = min(stop, self.count)
        rows = self._stream.read(start, stop) if self.streamed else (self.rows[i] for i in range(start, stop))
        for number, row in enumerate(_unbroken(rows, self.name, start), start=start):
            name = f"row {number}"
            caption = _as_text(row.get(self.caption_column))
            if not caption:
                yield BadItem(name, "it has no caption")
                continue
            image = _as_pixels(row.get(self.image_column), image_size, self.folder)
            yield BadItem(name, image) if isinstance(image, str) else Item(name, caption, image)


class _Stream:
    """Rows that can only be read in order. Ranges one behind the other are read in one go."""

    def __init__(self, rows: Any) -> None:
        self._rows, self._place = rows, 0
        self._reading: Iterator[Any] = iter(())

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """The rows from `start` to before `stop`, or to the end."""
        if start < self._place or self._place == 0:
            self._reading, self._place = iter(self._rows), 0
        for row in self._reading:
            self._place += 1
            if self._place > start:
                yield row
            if self._place >= stop:
                return


def _unbroken(rows: Iterator[Any], name: str, start: int) -> Iterator[Any]:
    number = start
    try:
        for row in rows:
            yield row
            number += 1
    except (OSError, ValueError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AsdmError(
            f"{name} cannot be read on from row {number}: {reason}",
            f"Mend or remove the file that row is in, or take the rows before it with --data-size {max(number, 1)}.",
        ) from error


def is_table(source: str) -> bool:
    """Whether `--data` names what this module reads."""
    path = Path(source).expanduser()
    if source.startswith(HUB) or source.endswith((".parquet", ".tar")):
        return True
    return path.is_dir() and (any((path / mark).is_file() for mark in _DISK_MARKS) or bool(_inside(path)))


def open_table(data: Data) -> TableSource:
    """Open a dataset saved by `datasets`, parquet files, webdataset shards, or `hf:NAME` of the hub.

    Streams want a size. Raises AsdmError for columns that are not there, and, exit code 4, without `datasets`.
    """
    try:
        import datasets
    except ImportError as error:
        raise AsdmError(
            "tables, shards and streams need the package datasets",
            "Install it with `pip install asdm-compress[distill]`, or give a folder of images.",
            ExitCode.ENVIRONMENT,
        ) from error
    path = Path(data.source).expanduser()
    streamed, files = False, list[str]()
    try:
        if data.source.startswith(HUB):
            rows = datasets.load_dataset(data.source.removeprefix(HUB), split="train", streaming=True)
            streamed = True
        elif path.is_dir() and not _inside(path):
            rows = datasets.load_from_disk(str(path))
            rows = rows["train"] if isinstance(rows, datasets.DatasetDict) else rows
            files = [str(p) for p in sorted(path.rglob("*.arrow"))]
        else:
            files = _inside(path) if path.is_dir() else sorted(str(p) for p in path.parent.glob(path.name))
            if not files:
                raise AsdmError(f"there are no training data at {data.source}")
            streamed = files[0].endswith(".tar")
            kind = "webdataset" if streamed else "parquet"
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=streamed)
        if streamed and data.size is None:
            raise AsdmError("a stream has no known length", "Say how many items to take of it with --data-size.")
        columns = list(rows.column_names or next(iter(rows), ()))
    except (OSError, ValueError, KeyError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AsdmError(f"{data.source} cannot be opened as a dataset: {reason}") from error
    image = _column(data.image_column, "image", _IMAGE_COLUMNS, columns, data.source)
    caption = _column(data.caption_column, "text", _CAPTION_COLUMNS, columns, data.source)
    if (rows.features or {}).get(image) is not None and isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))  # a broken one must not stop the reading
    count = int(data.size) if streamed and data.size else min(len(rows), data.size or len(rows))
    folder = Path() if data.source.startswith(HUB) else path if path.is_dir() else path.parent
    stats = [_stat(Path(f).name, Path(f)) for f in files]
    if not streamed:  # what a stream names is not known before it is read
        stats += [_stat(name, _named(folder, name)) for name in _paths(rows, image, count)]
    return TableSource(data.source, rows, image, caption, count, streamed, tuple(stats), folder)


def _paths(rows: Any, column: str, count: int) -> list[str]:
    """The images that the rows name by their paths, where they hold no more than that."""
    values: Any = rows.select(range(count)).with_format(None)[column] if _is_light(rows, column) else ()
    names = (value.get("path") if isinstance(value, Mapping) and not value.get("bytes") else value for value in values)
    return [name for name in names if isinstance(name, str)]


def _is_light(rows: Any, column: str) -> bool:
    """Whether a column has no images in it: all of it is read to know what its rows name."""
    import datasets

    feature = (rows.features or {}).get(column)
    if isinstance(feature, datasets.Image):
        return len(rows) > 0 and not (rows[0][column] or {}).get("bytes")
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _named(folder: Path, name: str) -> Path:
    """Where an image lies that a row names: beside the table, or in the current folder."""
    beside = folder / name
    return beside if _is_file(beside) else Path(name)


def _stat(name: str, path: Path) -> tuple[str, int, int]:
    """Name, size and time of a file, of which size and time are 0 where there is none."""
    found = path.stat() if _is_file(path) else None
    return name, found.st_size if found else 0, found.st_mtime_ns if found else 0


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as for a name that is none: a string may hold a whole image
        return False


def _inside(folder: Path) -> list[str]:
    """The shards of a folder that holds parquet files or tars."""
    for suffix in ("*.parquet", "*.tar"):
        found = sorted(str(p) for p in folder.glob(suffix))
        if found:
            return found
    return []


def _column(asked: str, default: str, usual: Sequence[str], there: Sequence[str], source: str) -> str:
    if asked != default or asked in there:
        found = asked if asked in there else None
    else:
        found = next((name for name in usual if name in there), None)
    if found is None:
        raise AsdmError(
            f"{source} has no column {asked}; it has {', '.join(sorted(there))}",
            "Name the columns with --image-column and --caption-column.",
        )
    return found


def _as_text(value: Any) -> str | None:
    value = first_of(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _as_pixels(value: Any, size: int, folder: Path) -> Tensor | str:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        return read_image(_named(folder, value), size)
    if isinstance(value, Image.Image):
        return to_pixels(value, size)
    if not isinstance(value, bytes):
        return "it has no image"
    return read_pixels(io.BytesIO(value), size)
