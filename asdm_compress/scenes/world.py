"""Scenes of one to three coloured shapes on a plain background, and which combinations are held out of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

IMAGE_SIZE: Final = 128

SHAPES: Final = ("circle", "square", "triangle", "cross", "ring")
SIZES: Final = ("small", "large")
COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
BACKGROUNDS: Final = ("white", "black", "grey", "yellow", "blue", "pink")
RELATIONS: Final = ("above", "below", "left of", "right of")

# Half the extent of a shape in pixels at 128 x 128. The two ranges are far enough apart to stay readable after a VAE.
RADIUS_RANGES: Final = {"small": (9.0, 11.0), "large": (16.0, 18.0)}
GRID_CENTRES: Final = (24.0, 64.0, 104.0)
# Two large shapes in neighbouring cells are then never closer than 36 pixels, the sum of their largest radii.
CENTRE_JITTER: Final = 2.0
MAX_OBJECTS: Final = 3


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape: what it is, which cell of the 3 x 3 grid it stands in, and its exact centre and radius in pixels."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    centre_x: float
    centre_y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and one to three objects. Objects with neighbouring indices stand in one row or one column."""

    background: str
    objects: tuple[SceneObject, ...]


def relation_between(first: SceneObject, second: SceneObject) -> str | None:
    """The relation that holds from `first` to `second`, or None where they share neither a row nor a column."""
    if first.column == second.column and first.row != second.row:
        return "above" if first.row < second.row else "below"
    if first.row == second.row and first.column != second.column:
        return "left of" if first.column < second.column else "right of"
    return None


def is_held_out_kind(shape: str, colour: str, size: str) -> bool:
    """True for the (size, colour, shape) combinations, one in eleven, that never occur in a training scene."""
    return (5 * SIZES.index(size) + COLOURS.index(colour) + 2 * SHAPES.index(shape)) % 11 == 3


def is_held_out_pair(first: SceneObject, second: SceneObject) -> bool:
    """True for the (shape, relation, shape) combinations, one in thirteen, that never occur in a training scene."""
    relation = relation_between(first, second)
    if relation in ("below", "right of"):
        first, second = second, first
        relation = relation_between(first, second)
    if relation is None:
        return False
    code = 6 * int(relation == "left of") + SHAPES.index(first.shape) + 3 * SHAPES.index(second.shape)
    return code % 13 == 4


def is_held_out(scene: Scene) -> bool:
    """True when any object or any aligned pair of the scene is a held-out combination."""
    if any(is_held_out_kind(o.shape, o.colour, o.size) for o in scene.objects):
        return True
    return any(is_held_out_pair(a, b) for i, a in enumerate(scene.objects) for b in scene.objects[i + 1 :])


def sample_scene(rng: np.random.Generator, object_count: int | None = None, held_out: bool | None = False) -> Scene:
    """Draw a random scene.

    `object_count` is 1 to 3, or None for a random one (two and three objects a little more often than one).
    `held_out` False gives a training scene, True one with at least one held-out combination, None any scene.
    """
    while True:
        count = int(rng.choice((1, 2, 3), p=(0.3, 0.35, 0.35))) if object_count is None else object_count
        scene = _propose(rng, count)
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def _propose(rng: np.random.Generator, count: int) -> Scene:
    background = str(rng.choice(BACKGROUNDS))
    colours = [colour for colour in COLOURS if colour != background]
    objects: list[SceneObject] = []
    for row, column in _chain_of_cells(rng, count):
        size = str(rng.choice(SIZES))
        low, high = RADIUS_RANGES[size]
        jitter_x, jitter_y = rng.uniform(-CENTRE_JITTER, CENTRE_JITTER, size=2)
        objects.append(
            SceneObject(
                shape=str(rng.choice(SHAPES)),
                colour=str(rng.choice(colours)),
                size=size,
                row=row,
                column=column,
                centre_x=float(GRID_CENTRES[column] + jitter_x),
                centre_y=float(GRID_CENTRES[row] + jitter_y),
                radius=float(rng.uniform(low, high)),
            )
        )
    return Scene(background, tuple(objects))


def _chain_of_cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Distinct cells of which each shares a row or a column with the one before it."""
    cells = [(int(rng.integers(3)), int(rng.integers(3)))]
    while len(cells) < count:
        row, column = cells[-1]
        aligned = [(r, c) for r in range(3) for c in range(3) if (r == row) != (c == column) and (r, c) not in cells]
        cells.append(aligned[int(rng.integers(len(aligned)))])
    return cells
