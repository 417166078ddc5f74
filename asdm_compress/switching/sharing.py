"""Which of a member's tensors are those of members before it: found by content, written down by place."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

_UNIT: Final = re.compile(r"(?:(?:down_blocks|up_blocks)\.\d+|mid_block)\.(?:resnets|attentions|\w+samplers)\.\d+|\w+")
_LEVEL: Final = re.compile(r"up_blocks\.(\d+)\.")
_PROBED: Final = 7  # values that tell most tensors apart before all of them are compared


@dataclass(frozen=True, slots=True)
class Shared:
    """What a member has in common with those before it.

    `tensors` gives names in the member the full names of the very tensors. `units` gives units of the member that are
    other units of the body, by what they share, those.
    """

    tensors: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)


def find_shared(member: nn.Module, owners: Sequence[tuple[str, nn.Module]]) -> Shared:
    """Compare a member with its owners, each under the prefix that its tensors have (`""` or `others.0.`), body first.

    A layer may stand at another place than in its owner: students number their layers anew. So the matrices, which
    tell where they come from, say first which unit is which; then tensors are compared unit by unit.
    """
    own = dict(member.named_parameters(remove_duplicate=False))
    theirs = {f"{prefix}{name}": p for prefix, unet in owners for name, p in unet.named_parameters()}
    by_content: dict[object, list[str]] = defaultdict(list)
    for name, tensor in theirs.items():
        if tensor.ndim > 1:
            by_content[_probe(tensor)].append(name)
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, tensor in own.items():
        unit = unit_of(name)
        for other in by_content.get(_probe(tensor), ()) if tensor.ndim > 1 else ():
            if other.endswith(name[len(unit) :]) and _equal(tensor, theirs[other]):
                votes[unit][other[: len(other) - len(name[len(unit) :])]] += 1
    prefixes = [prefix for prefix, _ in owners]
    tensors: dict[str, str] = {}
    for name, tensor in own.items():
        unit = unit_of(name)
        likely = sorted(votes[unit], key=lambda place: (-votes[unit][place], place != unit))
        for place in dict.fromkeys([*likely, *(f"{prefix}{unit}" for prefix in prefixes)]):
            other = f"{place}{name[len(unit) :]}"
            if other in theirs and _equal(tensor, theirs[other]):
                tensors[name] = other
                break
    units = {}
    for unit, counted in votes.items():
        in_body = {place: count for place, count in counted.items() if unit_of(place) == place}
        if in_body and unit not in in_body:
            units[unit] = max(in_body, key=lambda place: in_body[place])
    return Shared(tensors, units)


def unit_of(name: str) -> str:
    """The unit that a tensor or module belongs to; outside of blocks, what stands at the top."""
    match = _UNIT.match(name)
    assert match is not None
    return match[0]


def counterpart(name: str, units: Mapping[str, str], levels: int, levels_of_body: int) -> str:
    """The name that a member's layer has in the body: by what its unit shares, else by level, counted from outside."""
    unit = unit_of(name)
    if unit in units:
        return f"{units[unit]}{name[len(unit) :]}"
    level = _LEVEL.match(name)
    if level is None or levels == levels_of_body:
        return name
    return f"up_blocks.{int(level[1]) + levels_of_body - levels}.{name[level.end() :]}"


def as_prefixes(names: Iterable[str], tensors: Mapping[str, str]) -> dict[str, str]:
    """A map of tensors written by the highest places below which all of it is the same; `names` are all names."""
    found: dict[str, str] = {}
    _collect("", list(names), tensors, found)
    return found


def of_prefixes(names: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """The map of tensors that `as_prefixes` has written."""
    found = {}
    for name in names:
        parts = name.split(".")
        for count in range(len(parts), -1, -1):
            place = ".".join(parts[:count])
            if place in prefixes:
                found[name] = ".".join(part for part in (prefixes[place], *parts[count:]) if part)
                break
    return found


def _collect(place: str, names: Sequence[str], tensors: Mapping[str, str], found: dict[str, str]) -> None:
    """Write down what lies at and below a place, as few entries as possible."""
    rest = [name[len(place) :] for name in names]
    if all(name in tensors and tensors[name].endswith(end) for name, end in zip(names, rest, strict=True)):
        targets = {tensors[name][: len(tensors[name]) - len(end)] for name, end in zip(names, rest, strict=True)}
        if len(targets) == 1:
            found[place] = targets.pop()
            return
    below: dict[str, list[str]] = defaultdict(list)
    depth = len(place.split(".")) if place else 0
    for name in names:
        if name != place:
            below[".".join(name.split(".")[: depth + 1])].append(name)
    for child, inside in below.items():
        _collect(child, inside, tensors, found)


def _probe(tensor: Tensor) -> object:
    flat = tensor.detach().flatten()
    count = min(_PROBED, len(flat))
    # In whole numbers: of the largest convolutions of Stable Diffusion fp32 does not tell the last place from the next.
    at = torch.tensor([i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)], dtype=torch.long)
    return tuple(tensor.shape), tensor.dtype, tuple(flat[at.to(flat.device)].tolist())


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
