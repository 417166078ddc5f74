"""Output: tables to stdout, progress and errors to stderr, or one JSON object."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.processes import is_main_process


class Output:
    """Where a command's results go. Quiet prints nothing, JSON prints one object and nothing else to stdout."""

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        # Piped output is not cut to a terminal's width.
        self._out = Console(width=None if sys.stdout.isatty() else 160)
        self._err = Console(stderr=True, quiet=quiet or as_json)

    def show(self, what: RenderableType) -> None:
        """Print a table or a line, unless quiet or JSON is asked for."""
        if not (self.quiet or self.as_json):
            # Texts hold paths and prompts, in which brackets are no markup.
            self._out.print(what, markup=False)

    def result(self, value: dict[str, Any]) -> None:
        """Print the JSON object, if JSON is asked for."""
        if self.as_json:
            print(json.dumps(value, indent=1))

    def note(self, text: str) -> None:
        """Print what a user should know beside the result, unless quiet or JSON is asked for."""
        self._err.print(f"Note: {text}.", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """A spinner with the elapsed time."""
        with self._progress() as progress:
            task = progress.add_task(title, total=None)
            yield
            progress.update(task, total=1, completed=1)

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar, to be called with (done, total)."""
        with self._progress() as progress:
            task = progress.add_task(title, total=None)

            def update(done: int, total: int) -> None:
                progress.update(task, total=total, completed=done)

            yield update
            progress.update(task, total=1, completed=1)

    @contextmanager
    def meter(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """A progress bar with figures beside it, to be called with (done, total, figures)."""
        with self._progress(TextColumn("{task.fields[figures]}")) as progress:
            task = progress.add_task(title, total=None, figures="")

            def update(done: int, total: int, figures: str) -> None:
                progress.update(task, total=total, completed=done, figures=figures)

            yield update

    def _progress(self, *more: ProgressColumn) -> Progress:
        return Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            *more,
            console=self._err,
        )


def fail(error: AsdmError, as_json: bool, code: int | None = None) -> NoReturn:
    """Print what went wrong and how to go on, and leave with the exit code.

    Of several processes only the main one does. The others leave quietly, so that their launcher lets it.
    """
    if not is_main_process():
        raise SystemExit(0)
    exit_code = int(error.exit_code) if code is None else code
    if as_json:
        print(json.dumps({"error": {"message": error.message, "hint": error.hint, "exit_code": exit_code}}))
    else:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"[bold red]Error:[/] {_plain(error.message)}", highlight=False)
        if error.hint:
            console.print(f"[bold]Hint:[/] {_plain(error.hint)}", highlight=False)
    raise SystemExit(exit_code)


def end_with(error: AsdmError) -> None:
    """Leave at once, from any thread, as `fail` would; for a process that another's error ends."""
    try:
        fail(error, as_json="--json" in sys.argv)
    except SystemExit as leaving:
        Console(stderr=True).show_cursor()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(leaving.code or 0))


def _plain(text: str) -> str:
    """Text in which square brackets are no markup."""
    return text.replace("[", "\\[")
