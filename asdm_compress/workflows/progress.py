"""What a workflow tells while it runs; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Progress(Protocol):
    """Stages, and bars of known length."""

    def stage(self, title: str) -> AbstractContextManager[None]:
        """Shown while its block runs."""
        ...

    def bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Gives a function to call with (done, total)."""
        ...
