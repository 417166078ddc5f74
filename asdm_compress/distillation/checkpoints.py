"""Checkpoints that a kill never leaves half-written: made aside, renamed into their places, old ones renamed away."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from asdm_compress.core.files import disk_errors

_NAME: Final = re.compile(r"step-(\d{8})")
_HINT: Final = "Free some space; the last whole checkpoint is kept, and --resume goes on from it."


class Checkpoints:
    """The folder of a training's checkpoints, of which the last `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint after so many steps is, or would be."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The whole checkpoints there are, by the steps taken, in order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def last(self) -> int | None:
        """The newest, or None."""
        return max(self.steps(), default=None)

    def tidy(self) -> None:
        """Remove what a kill has left; to be called by one process, before any other writes here."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if not _NAME.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def aside(self, step: int) -> Path:
        """Where the checkpoint is written before it counts; the same for every process."""
        return self.folder / f".writing-{step:08d}"

    def commit(self, step: int) -> None:
        """Make the folder at `aside` count, once every byte of it is on the disk, and prune. One process calls this."""
        aside, place = self.aside(step), self.path(step)
        with self.writing(step):
            for path in aside.rglob("*"):
                if path.is_file():
                    _sync(path)
            if place.exists():
                self._remove(place)
            aside.rename(place)
            _sync(self.folder)
        for old in self.steps()[: -self.keep]:
            self._remove(self.path(old))

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Turn a full disk into one message."""
        with disk_errors(self.path(step), _HINT):
            yield

    def forget_from(self, step: int) -> None:
        """Remove the checkpoints of this step and later ones. One process calls this."""
        for number in self.steps():
            if number >= step:
                self._remove(self.path(number))

    def _remove(self, place: Path) -> None:
        # Renamed first: a checkpoint that is half gone must not count.
        gone = place.with_name(f".removed-{place.name}")
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # which Windows does not open
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
