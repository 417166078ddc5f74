"""What a workflow tells while it runs; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Stages, and bars of known length."""

    def stage(self, title: str) -> AbstractContextManager[None]:
        """Shown while its block runs."""
        ...

    def bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Gives a function to call with (done, total)."""
        ...


class Silent:
    """Tells nothing, for use from Python."""

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Nothing is shown."""
        yield

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Nothing is shown."""
        yield lambda done, total: None
