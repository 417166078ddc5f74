"""What of a caption a picture gets right, attribute by attribute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

from asdm_compress.scenes.captions import Caption, ObjectClaim, SeenObject, SeenScene, cell_of, holds, relation_holds

ATTRIBUTES: Final = ("count", "shape", "colour", "size", "place", "relation", "background")
# More objects than this in one picture are noise, and their permutations many.
_MOST: Final = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """`right` of `of` claims by attribute; `holds` where the picture shows the caption and nothing else.

    An object that is not there has no attribute right. `count` is one claim: that there are as many objects as named.
    """

    holds: bool
    right: Mapping[str, int]
    of: Mapping[str, int]


def judge(caption: Caption, seen: SeenScene) -> Verdict:
    """Match the objects seen to those named so that the most claims are right, and count."""
    of = {
        "count": 1,
        "shape": len(caption.objects),
        "colour": len(caption.objects),
        "size": sum(claim.size is not None for claim in caption.objects),
        "place": sum(claim.cell is not None for claim in caption.objects),
        "relation": len(caption.relations),
        "background": int(caption.background is not None),
    }
    best = max((_right(caption, match) for match in _matches(caption, seen.objects)), key=lambda r: sum(r.values()))
    best["count"] = int(len(seen.objects) == len(caption.objects))
    best["background"] = int(caption.background is not None and caption.background == seen.background)
    return Verdict(holds(caption, seen), best, of)


def _matches(caption: Caption, seen: Sequence[SeenObject]) -> Iterator[tuple[SeenObject | None, ...]]:
    """Every way to give each claim an object of its own, or none."""
    named = len(caption.objects)
    return permutations([*seen[:_MOST], *([None] * named)], named)


def _right(caption: Caption, match: Sequence[SeenObject | None]) -> dict[str, int]:
    right = dict.fromkeys(ATTRIBUTES, 0)
    for claim, found in zip(caption.objects, match, strict=True):
        if found is not None:
            for attribute, is_right in _compared(claim, found):
                right[attribute] += is_right
    for i, relation, j in caption.relations:
        first, second = match[i], match[j]
        if first is not None and second is not None:
            right["relation"] += relation_holds(first, relation, second)
    return right


def _compared(claim: ObjectClaim, found: SeenObject) -> Iterator[tuple[str, bool]]:
    yield "shape", claim.shape == found.shape
    yield "colour", claim.colour == found.colour
    yield "size", claim.size is not None and claim.size == found.size
    yield "place", claim.cell is not None and claim.cell == cell_of(found)
