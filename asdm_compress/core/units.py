"""Budgets and quantities: parsing `latency=0.7x` or `params=450M`, and printing numbers with their units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from asdm_compress.core.errors import AsdmError

Resource = Literal["latency", "macs", "params"]
RESOURCES: Final[tuple[Resource, ...]] = ("latency", "macs", "params")

_COUNT_SUFFIXES: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_TIME_SUFFIXES: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER: Final = re.compile(r"^(\d+(?:\.\d*)?|\.\d+)\s*([a-zµ%]*)$", re.IGNORECASE)
_BYTE_SUFFIXES: Final = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_BYTES: Final = re.compile(r"^(\d+(?:\.\d*)?|\.\d+)\s*([kmg]i?b)$", re.IGNORECASE)
_EXAMPLES: Final = (
    "for example latency=0.7x, latency=180ms, macs=280G, params=450M, or several: latency=0.7x,params=0.6x"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """An upper bound on one resource: absolute (seconds, MACs, parameters), or as a share of the teacher's."""

    resource: Resource
    value: float
    relative: bool

    def absolute(self, teacher: float) -> float:
        """The bound in the resource's own unit, given the teacher's cost."""
        return self.value * teacher if self.relative else self.value

    def __str__(self) -> str:
        """As `parse_budget` reads it."""
        number = f"{self.value:.12f}".rstrip("0").rstrip(".")
        if self.relative:
            return f"{self.resource}={number}x"
        return f"{self.resource}={number}{'s' if self.resource == 'latency' else ''}"


def parse_budget(texts: Iterable[str]) -> tuple[Limit, ...]:
    """Parse one or more `resource=value` texts, each possibly a comma-separated list, into limits.

    Raises AsdmError for an unknown resource, a value that does not parse, or a resource named twice.
    """
    limits: dict[Resource, Limit] = {}
    for text in texts:
        for item in text.split(","):
            limit = _parse_limit(item.strip())
            if limit.resource in limits:
                raise AsdmError(f"the budget names {limit.resource} twice", "Give each resource one limit.")
            limits[limit.resource] = limit
    if not limits:
        raise AsdmError("no budget was given", f"Use --budget, {_EXAMPLES}.")
    return tuple(limits.values())


def _parse_limit(item: str) -> Limit:
    name, separator, amount = item.partition("=")
    resource = next((r for r in RESOURCES if r == name.strip().lower()), None)
    if not separator or resource is None:
        raise AsdmError(
            f"the budget {item!r} does not parse", f"Write RESOURCE=VALUE with {', '.join(RESOURCES)}; {_EXAMPLES}."
        )
    match = _NUMBER.match(amount.strip())
    if match is None:
        raise AsdmError(f"the value {amount!r} of the {resource} budget does not parse", f"Write {_EXAMPLES}.")
    number, suffix = float(match[1]), match[2].lower()
    if suffix in ("x", "%"):
        share = number / 100 if suffix == "%" else number
        if not 0 < share <= 1:
            raise AsdmError(
                f"the relative {resource} budget {amount!r} is not above 0 and at most 1x",
                "0.7x means 70 % of the teacher's.",
            )
        return Limit(resource, share, relative=True)
    suffixes = _TIME_SUFFIXES if resource == "latency" else _COUNT_SUFFIXES
    if suffix not in suffixes or (resource == "latency" and not suffix) or number <= 0:
        allowed = ", ".join(s for s in suffixes if s)
        raise AsdmError(
            f"the value {amount!r} of the {resource} budget does not parse",
            f"Use a positive number with x or one of: {allowed}; {_EXAMPLES}.",
        )
    return Limit(resource, number * suffixes[suffix], relative=False)


def parse_bytes(text: str) -> int:
    """'2GB' as 2·10⁹ and '2GiB' as 2·2³⁰; raises AsdmError for anything else."""
    match = _BYTES.match(text.strip())
    if match is None or float(match[1]) <= 0:
        raise AsdmError(f"the size {text!r} does not parse", "Write a number and a unit, such as 2GB or 500MiB.")
    return int(float(match[1]) * _BYTE_SUFFIXES[match[2].lower()])


def format_count(value: float) -> str:
    """4.02e11 as '402 G', 859520964 as '860 M'."""
    for suffix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {suffix}" if value < 999.5 * scale else f"{value / scale:.4g} {suffix}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """Bytes in powers of 1024: '1.64 GiB'."""
    for suffix, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.2f} {suffix}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """Seconds of a wait, for people: '95 s', '12 min', '17 h 4 min', '3.0 days'."""
    if seconds < 120:
        return format_seconds(seconds)
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def format_seconds(value: float) -> str:
    """Seconds with three significant digits: '12.3 ms', '3.81 s'."""
    if value >= 1:
        return f"{value:.3g} s"
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs"


def format_resource(resource: Resource, value: float) -> str:
    """A cost with its unit."""
    if resource == "latency":
        return format_seconds(value)
    return f"{format_count(value)}{'MACs' if resource == 'macs' else ''}".strip()


def within(costs: Mapping[Resource, float], teacher: Mapping[Resource, float], limits: Iterable[Limit]) -> bool:
    """True when no limit is exceeded."""
    return all(costs[limit.resource] <= limit.absolute(teacher[limit.resource]) for limit in limits)
