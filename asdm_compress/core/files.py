"""Output folders that appear whole or not at all, and the folder of cached measurements."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from asdm_compress.core.errors import AsdmError, ExitCode


def cache_folder() -> Path:
    """Folder of cached measurements; `ASDM_COMPRESS_CACHE` overrides the system's place for caches."""
    override = os.environ.get("ASDM_COMPRESS_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("asdm-compress", appauthor=False))


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output place that exists, before any time is spent."""
    if out.exists() and not overwrite:
        raise AsdmError(f"{out} exists already", "Choose another --out, or replace it with --overwrite.")
    if out.exists() and out.is_dir() and out.resolve() in (Path.cwd().resolve(), *Path.cwd().resolve().parents):
        raise AsdmError(f"{out} holds the current folder and cannot be replaced", "Choose another --out.")


@contextmanager
def output_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `out` only when everything is written.

    Files go into a hidden folder beside `out`, which is renamed at the end; an error, a full disk or Ctrl-C removes it
    and leaves whatever stood at `out` untouched. Raises AsdmError when `out` exists (without `overwrite`), when its
    parent cannot be written, and when the disk is full.
    """
    check_output(out, overwrite)
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        aside.chmod(0o755)
    try:
        with _disk_errors(out):
            yield aside
            _replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A file path to write to that becomes `path` only when writing ended well."""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    aside = Path(name)
    try:
        with _disk_errors(path):
            yield aside
            aside.chmod(0o644)
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _replace(aside: Path, out: Path) -> None:
    if not out.exists():
        aside.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(old / out.name)
    try:
        aside.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AsdmError(
                f"the disk is full: {place} was not written",
                "Free some space, or choose another --out.",
                ExitCode.ENVIRONMENT,
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise AsdmError(
                f"{place} cannot be written: {error.strerror}", "Choose another --out.", ExitCode.ENVIRONMENT
            ) from error
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error type with the system's text.
        if "No space left on device" in str(error):
            raise AsdmError(
                f"the disk is full: {place} was not written",
                "Free some space, or choose another --out.",
                ExitCode.ENVIRONMENT,
            ) from error
        raise
