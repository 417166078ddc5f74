from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.scenes.captions import (
    SeenObject,
    SeenScene,
    caption_of,
    holds,
    sample_captions,
    vocabulary,
)
from asdm_compress.scenes.draw import RGB, draw_scenes
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scenes.world import (
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    is_held_out,
    is_held_out_kind,
    relation_between,
    sample_scene,
)

seeds = st.integers(0, 2**32 - 1)


def as_seen(scene: Scene) -> SeenScene:
    objects = tuple(SeenObject(o.shape, o.colour, o.size, o.centre_x, o.centre_y) for o in scene.objects)
    return SeenScene(scene.background, objects)


@given(seed=seeds)
def test_training_scenes_hold_nothing_that_is_held_out(seed):
    rng = np.random.default_rng(seed)
    assert not is_held_out(sample_scene(rng))
    assert is_held_out(sample_scene(rng, held_out=True))


def test_every_value_occurs_in_training_though_some_combinations_do_not():
    kinds = {(s, c, z) for s in SHAPES for c in COLOURS for z in SIZES}
    kept = {k for k in kinds if not is_held_out_kind(*k)}
    assert 0 < len(kinds - kept) < len(kinds) / 5
    assert {k[0] for k in kept} == set(SHAPES)
    assert {k[1] for k in kept} == set(COLOURS)


@given(seed=seeds, complete=st.booleans())
def test_a_caption_holds_for_its_scene_and_uses_known_words(seed, complete):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, held_out=None)
    caption = caption_of(scene, rng, complete)
    assert holds(caption, as_seen(scene))
    assert set(caption.text.split()) <= set(vocabulary())


@given(seed=seeds)
def test_a_complete_caption_fails_for_any_changed_scene(seed):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, held_out=None)
    caption = caption_of(scene, rng, complete=True)
    first, *rest = as_seen(scene).objects
    other_colour = next(c for c in COLOURS if c != first.colour and all(c != o.colour for o in rest))
    changed = [
        SeenScene("nothing", (first, *rest)),
        SeenScene(scene.background, tuple(rest)),
        SeenScene(scene.background, (first, *rest, first)),
        SeenScene(scene.background, (replace(first, colour=other_colour), *rest)),
        SeenScene(scene.background, (replace(first, shape="blob"), *rest)),
        SeenScene(scene.background, (replace(first, size="huge"), *rest)),
    ]
    assert not any(holds(caption, seen) for seen in changed)


@given(seed=seeds)
def test_neighbours_in_a_scene_are_related_and_the_relation_turns_around(seed):
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    scene = sample_scene(np.random.default_rng(seed), object_count=3, held_out=None)
    for a, b in zip(scene.objects, scene.objects[1:], strict=False):
        relation = relation_between(a, b)
        assert relation is not None
        assert relation_between(b, a) == opposite[relation]


@settings(max_examples=20)
@given(seed=seeds)
def test_pictures_show_the_colours_at_the_places(seed):
    scene = sample_scene(np.random.default_rng(seed), held_out=None)
    (image,) = draw_scenes([scene])
    assert image.shape == (3, 128, 128)
    assert image.min() >= 0
    assert image.max() <= 1
    corner = torch.tensor(RGB[scene.background])
    assert torch.allclose(image[:, 0, 0], corner)
    for item in scene.objects:
        # A ring is hollow: look at its rim.
        x = item.centre_x + (0.75 * item.radius if item.shape == "ring" else 0)
        pixel = image[:, int(item.centre_y), int(x)]
        assert torch.allclose(pixel, torch.tensor(RGB[item.colour]), atol=0.02)


def test_the_same_seed_gives_the_same_captions():
    assert sample_captions(5, 3) == sample_captions(5, 3)
    assert sample_captions(5, 3) != sample_captions(5, 4)


@pytest.mark.parametrize("blur", [False, True])
def test_the_reader_reads_scenes_that_it_has_not_seen(blur):
    rng = np.random.default_rng(123)
    scenes = [sample_scene(rng, held_out=None) for _ in range(400)]
    captions = [caption_of(scene, rng, complete=True) for scene in scenes]
    images = draw_scenes(scenes)
    if blur:
        kernel = torch.tensor([0.25, 0.5, 0.25])
        taps = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
        images = torch.nn.functional.conv2d(images, taps, padding=1, groups=3)
        images = (images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    right = load_reader().accuracy(images, captions)
    assert np.mean(right) >= 0.99
