from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe, load_recipe

GOOD = """\
asdm_recipe: 1
base:
  model: mini-sd
  architecture: {layers_per_block: 2}
edits:
- site: mid_block
  edit: drop
- site: up_blocks.2.resnets.0
  edit: shortcut
"""


def test_a_recipe_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert load_recipe(path).as_edits() == {"mid_block": "drop", "up_blocks.2.resnets.0": "shortcut"}


@given(sites=st.lists(st.text("abc.012_é", min_size=1), unique=True, max_size=6))
def test_writing_and_reading_is_identity(tmp_path_factory, sites):
    recipe = Recipe(
        asdm_recipe=1,
        base=Base(model="m", architecture={"widths": [1, 2], "mid": None}),
        edits=[EditEntry(site=s, edit="drop") for s in sites],
    )
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again.edits == recipe.edits
    assert again.base.architecture["widths"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("  edit: shortcut", "  edit: shorten"), 9, "drop"),
        (("- site: mid_block", "- sight: mid_block"), 6, "unknown key"),
        (("asdm_recipe: 1", "asdm_recipe: 1\nbugdet: [a]"), 2, "unknown key"),
        (("asdm_recipe: 1", "asdm_recipe: 7"), 1, "1"),
        (("  edit: drop", "  edit: [drop"), 8, "no valid YAML"),
        (("up_blocks.2.resnets.0", "mid_block"), 8, "named twice"),
        (("edits:", "edit:"), 5, "unknown key"),
        (("asdm_recipe: 1", "asdm_recipe: 1\nasdm_recipe: 1"), 2, "there twice"),
        (("  edit: shortcut", "  edit: shortcut\nedits: []"), 10, "there twice"),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path, change, line, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(AsdmError) as caught:
        load_recipe(path)
    assert f"recipe.yaml:{line}:" in caught.value.message
    assert words in caught.value.message


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(AsdmError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AsdmError, match="UTF-8"):
        load_recipe(binary)
    listing = tmp_path / "list.yaml"
    listing.write_text("- a\n")
    with pytest.raises(AsdmError, match="mapping"):
        load_recipe(listing)
