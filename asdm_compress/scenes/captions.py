"""A small grammar of captions, and the check of a caption's claims against what stands in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np

from asdm_compress.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    GRID_CENTRES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    relation_between,
    sample_scene,
)

PLACES: Final = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
# Half the distance of two cells: a centre nearer than this along an axis counts as standing in the same row or column.
ALIGNMENT_TOLERANCE: Final = (GRID_CENTRES[1] - GRID_CENTRES[0]) / 2


@dataclass(frozen=True, slots=True)
class ObjectClaim:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    colour: str
    size: str | None
    cell: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption's text with the claims that it makes, in the order in which the objects are named."""

    text: str
    objects: tuple[ObjectClaim, ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str | None


@dataclass(frozen=True, slots=True)
class SeenObject:
    """One object as read from pixels: its kind and its centre in pixels."""

    shape: str
    colour: str
    size: str
    centre_x: float
    centre_y: float


@dataclass(frozen=True, slots=True)
class SeenScene:
    """What was read from one image."""

    background: str
    objects: tuple[SeenObject, ...]


def vocabulary() -> tuple[str, ...]:
    """Every word that the grammar can produce, sorted."""
    words = {"a", "an", "the", "on", "at", "in", "of", "to", "and", "is", "which", "with", "background", ","}
    words.update(SHAPES, SIZES, COLOURS, BACKGROUNDS)
    words.update(("above", "below", "left", "right", "over", "under", "top", "bottom", "centre"))
    return tuple(sorted(words))


def caption_of(scene: Scene, rng: np.random.Generator, complete: bool = False) -> Caption:
    """A random caption of the scene. `complete` names every size and the background, and how the objects stand."""
    keep_size = complete or rng.random() < 0.9
    order = list(range(len(scene.objects)))
    if rng.random() < 0.5:
        order.reverse()
    objects = [scene.objects[i] for i in order]
    phrases = [_noun_phrase(o, keep_size) for o in objects]
    style = rng.random()
    by_relation = len(objects) > 1 and style < 0.65
    by_place = not by_relation and (complete or style < 0.9)

    relations: list[tuple[int, str, int]] = []
    if by_relation:
        body = phrases[0]
        for i in range(1, len(objects)):
            relation = relation_between(objects[i - 1], objects[i])
            if relation is None:
                raise ValueError("neighbouring objects of a scene must share a row or a column")
            relations.append((i - 1, relation, i))
            link = "which is " if i > 1 else ""
            body += f" {link}{_wording(relation, rng)} {phrases[i]}"
    else:
        if by_place:
            phrases = [f"{p} {PLACES[o.row][o.column]}" for p, o in zip(phrases, objects, strict=True)]
        body = phrases[0] if len(phrases) == 1 else f"{' , '.join(phrases[:-1])} and {phrases[-1]}"

    background = scene.background if complete or rng.random() < 0.95 else None
    text = body
    if background is not None:
        setting = f"{_article(background)} {background} background"
        text = f"{body} on {setting}" if rng.random() < 0.8 else f"on {setting} , {body}"
    claims = tuple(
        ObjectClaim(o.shape, o.colour, o.size if keep_size else None, (o.row, o.column) if by_place else None)
        for o in objects
    )
    return Caption(text, claims, tuple(relations), background)


def sample_captions(
    count: int, seed: int, object_count: int | None = None, held_out: bool | None = True
) -> tuple[Caption, ...]:
    """`count` complete captions of random scenes; by default of scenes with a combination never seen in training."""
    rng = np.random.default_rng(seed)
    return tuple(caption_of(sample_scene(rng, object_count, held_out), rng, complete=True) for _ in range(count))


def holds(caption: Caption, seen: SeenScene) -> bool:
    """True when the picture shows just what the caption names: every object, attribute, place and relation."""
    if len(seen.objects) != len(caption.objects):
        return False
    if caption.background is not None and caption.background != seen.background:
        return False
    return any(_assignment_holds(caption, seen.objects, order) for order in permutations(range(len(seen.objects))))


def _assignment_holds(caption: Caption, seen: Sequence[SeenObject], order: Sequence[int]) -> bool:
    for claim, index in zip(caption.objects, order, strict=True):
        found = seen[index]
        if (claim.shape, claim.colour) != (found.shape, found.colour) or claim.size not in (None, found.size):
            return False
        if claim.cell is not None and claim.cell != cell_of(found):
            return False
    return all(relation_holds(seen[order[i]], relation, seen[order[j]]) for i, relation, j in caption.relations)


def relation_holds(first: SeenObject, relation: str, second: SeenObject) -> bool:
    """Whether two objects stand as the relation says."""
    dx, dy = second.centre_x - first.centre_x, second.centre_y - first.centre_y
    along, across = {"above": (dy, dx), "below": (-dy, dx), "left of": (dx, dy), "right of": (-dx, dy)}[relation]
    return along > ALIGNMENT_TOLERANCE and abs(across) < ALIGNMENT_TOLERANCE


def cell_of(seen: SeenObject) -> tuple[int, int]:
    """The (row, column) of the grid cell whose centre is nearest."""

    def nearest(value: float) -> int:
        return min(range(3), key=lambda k: abs(GRID_CENTRES[k] - value))

    return nearest(seen.centre_y), nearest(seen.centre_x)


def _noun_phrase(item: SceneObject, with_size: bool) -> str:
    words = [item.size] if with_size else []
    words += [item.colour, item.shape]
    return f"{_article(words[0])} {' '.join(words)}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _wording(relation: str, rng: np.random.Generator) -> str:
    wordings = {
        "above": ("above", "over"),
        "below": ("below", "under"),
        "left of": ("left of", "to the left of"),
        "right of": ("right of", "to the right of"),
    }[relation]
    return wordings[0] if rng.random() < 0.6 else wordings[1]
