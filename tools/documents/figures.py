"""How numbers are written in the documents, and tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mini_sd.weights import bundled_weights

RESULTS: Final = Path(__file__).parents[1] / "results"
_read: Final[set[str]] = set()


def results(name: str) -> Any:
    """What `tools/results/NAME.json` holds."""
    _read.add(name)
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def machine(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The machine of a results file; files of before the common format name it at their top."""
    return found.get("machine", found)  # type: ignore[no-any-return]


def with_older_weights(figure: Callable[[], str]) -> tuple[str, bool]:
    """What a figure says, and whether anything in it was measured with other weights than `mini-sd` has now."""
    _read.clear()
    text, now = figure(), bundled_weights()
    measured_with = [results(name).get("mini_sd", now) for name in sorted(_read)]
    return text, any(weights != now for weights in measured_with)


def source(name: str, bench: str) -> str:
    """Where a figure comes from, for the end of a sentence."""
    return f"[`{name}.json`]({{results}}/{name}.json), `tools/{bench}.py`"


def value(figure: Any) -> float:
    """A measured figure, plain or with its interval (see `measuring.py`)."""
    return float(figure["value"] if isinstance(figure, dict) else figure)


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def share(value: float) -> str:
    """A ratio to the teacher's."""
    return f"{value:.3f}x"


def small(value: float) -> str:
    """Three digits of a damage."""
    return f"{value:.3g}"


def decibels(value: float) -> str:
    """A PSNR."""
    return f"{value:.1f} dB"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f} %"


def minutes(seconds: float) -> str:
    """A duration."""
    return f"{seconds / 60:.1f} minutes"
