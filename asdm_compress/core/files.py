"""Output folders that appear whole or not at all, and the folder of cached measurements."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import platformdirs

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import format_bytes

OUT_HINT: Final = "Choose another --out, or free some space."
CACHE_HINT: Final = "Set ASDM_COMPRESS_CACHE to a folder that can be written and has space."
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS: Final = tuple(os.strerror(code) for code in _FULL)
_FORBIDDEN: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EBUSY)


def cache_folder() -> Path:
    """Folder of cached measurements; `ASDM_COMPRESS_CACHE` overrides the system's place for caches."""
    override = os.environ.get("ASDM_COMPRESS_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("asdm-compress", appauthor=False))


def check_output(out: Path, overwrite: bool, source: Path | None = None, *read: Path | None) -> None:
    """Refuse a place that cannot become the output, before any time is spent.

    That is one that exists (without `overwrite`), that is a mount point, that holds the current folder, `source`, or
    another file that is `read`, or whose nearest existing parent is no folder that can be written.
    """
    if out.exists() and not overwrite:
        raise AsdmError(f"{out} exists already", "Choose another --out, or replace it with --overwrite.")
    place = out.resolve()
    files = [(f"{file}, which is read", file) for file in read if file is not None and file.exists()]
    for what, holder in (("the current folder", Path.cwd()), ("the model itself", source), *files):
        if holder is not None and out.exists() and place in (holder.resolve(), *holder.resolve().parents):
            raise AsdmError(f"{out} holds {what} and cannot be replaced", "Choose another --out.")
    if source is not None and out.exists() and _is_part(place, source.resolve()):
        raise AsdmError(f"{out} is a part of the model itself and cannot be replaced", "Choose another --out.")
    if place.is_mount():
        raise AsdmError(
            f"{out} is mounted and cannot be replaced", "Name a new folder inside of it, such as --out FOLDER/new."
        )
    parent = next(p for p in place.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AsdmError(f"{out} cannot be written: {parent} is no folder that can be written", "Choose another --out.")
    try:  # some places, as /proc, say that they can be written, and cannot
        with tempfile.TemporaryDirectory(prefix=".", dir=parent):
            pass
    except OSError as error:
        why = f"{parent} takes no new folder ({error.strerror})"
        raise AsdmError(f"{out} cannot be written: {why}", "Choose another --out.") from error


def _is_part(place: Path, model: Path) -> bool:
    """Whether a place is one of the folders that a model's index names."""
    index = model / "model_index.json"
    return place.parent == model and index.is_file() and f'"{place.name}"' in index.read_text(encoding="utf-8")


def check_apart(out: Path, overwrite: bool, models: Iterable[str]) -> None:
    """As `check_output`, of every model that a user has named and that is a file or folder here."""
    for name in models:
        path = Path(name).expanduser()
        check_output(out, overwrite, path if path.exists() else None)


def check_space(out: Path, needed: int) -> None:
    """Refuse a place whose disk has fewer than `needed` bytes free, before any time is spent."""
    free = shutil.disk_usage(next(p for p in out.resolve().parents if p.exists())).free
    if needed > free:
        raise AsdmError(
            f"not enough disk: {out} takes at least {format_bytes(needed)}, and {format_bytes(free)} are free", OUT_HINT
        )


@contextmanager
def output_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `out` only when everything is written.

    Files go into a hidden folder beside `out`, which is renamed at the end; an error, a full disk or Ctrl-C removes it
    and leaves whatever stood at `out` untouched. Raises AsdmError when `out` exists (without `overwrite`), when its
    parent cannot be written, and when the disk is full.
    """
    check_output(out, overwrite)
    place = out.resolve()  # of a link what it points to is replaced
    with disk_errors(out, OUT_HINT, (errno.ENOENT,)):  # some places, as /proc, know no new folders
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        aside.chmod(0o755)
    try:
        with disk_errors(out, OUT_HINT):
            yield aside
            _replace(aside, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def output_file(path: Path, hint: str = OUT_HINT) -> Iterator[Path]:
    """A file path to write to that becomes `path` only when writing ended well."""
    with disk_errors(path, hint, (errno.ENOENT,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    aside = Path(name)
    try:
        with disk_errors(path, hint):
            yield aside
            aside.chmod(0o644)
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _replace(aside: Path, out: Path) -> None:
    """Put `aside` in the place of `out`; where that fails, what stood there is put back."""
    if not out.exists():
        aside.rename(out)
        return
    old = aside.with_name(f"{aside.name}.old")
    try:
        out.rename(old)
        aside.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


@contextmanager
def disk_errors(place: Path, hint: str, also: Collection[int] = ()) -> Iterator[None]:
    """Turn a full disk and a place that cannot be written, which errors numbered `also` are too, into one message."""
    try:
        yield
    except AsdmError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors and torch report a full disk as error types of their own, with the system's text.
        if code in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            raise AsdmError(f"the disk is full: {place} was not written", hint) from error
        if code in (*_FORBIDDEN, *also):
            message = f"{place} cannot be written: {os.strerror(code or 0)}"
            raise AsdmError(message, hint, ExitCode.ENVIRONMENT) from error
        raise
