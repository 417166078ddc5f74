"""What a workflow tells while it runs; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Notes, stages, and bars of known length."""

    def note(self, text: str) -> None:
        """What a user should know and did not ask for."""
        ...

    def stage(self, title: str) -> AbstractContextManager[None]:
        """Shown while its block runs."""
        ...

    def bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Gives a function to call with (done, total)."""
        ...

    def meter(self, title: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """A bar with figures beside it: gives a function to call with (done, total, figures)."""
        ...


class Silent:
    """Tells nothing, for use from Python."""

    def note(self, text: str) -> None:
        """Nothing is shown."""

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Nothing is shown."""
        yield

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Nothing is shown."""
        yield lambda done, total: None

    @contextmanager
    def meter(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """Nothing is shown."""
        yield lambda done, total, figures: None
