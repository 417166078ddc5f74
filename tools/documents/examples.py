"""The examples of the Python API as they stand in `tools/examples/`, which mypy checks and a test runs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_EXAMPLES: Final = Path(__file__).parents[1] / "examples"


def example_measure() -> str:
    """What parts cost."""
    return _code("measure")


def example_cut() -> str:
    """A plan of one's own."""
    return _code("cut")


def example_budget() -> str:
    """The best plan for a budget."""
    return _code("budget")


def example_inherit() -> str:
    """Inheritance by a rule and by a schedule."""
    return _code("inherit")


def example_train() -> str:
    """Training, figures and report."""
    return _code("train")


def _code(name: str) -> str:
    return f"```python\n{(_EXAMPLES / f'{name}.py').read_text(encoding='utf-8').strip()}\n```"
