"""A part of the matrix of what works around a UNet; `tools/make_matrix.py` runs all of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from matrix.checks import CHECKS
from matrix.runtimes import compiled
from matrix.subjects import Subject

BY_NAME = {check.name: check for check in CHECKS}
# What a backend makes of the graph is the backend's, and takes minutes.
BY_NAME["`torch.compile`, one graph"] = replace(
    BY_NAME["`torch.compile`, one graph"], run=partial(compiled, backend="eager")
)
# No dependency of the tests, which makes every import of diffusers slower and louder; the table says what it did.
if find_spec("torchao") is None:
    BY_NAME.pop("torchao int8 weights")
# Every row with the student that has the most of its own, and the others where their numbering or widths matter.
CELLS = [
    *((name, "timestep experts") for name in BY_NAME),
    *((name, "stock student") for name in ("LoRA (peft) of the teacher", "T2I-Adapter of the teacher", "FreeU")),
    ("ControlNet made from it", "no mid block"),
    *((name, "narrowed") for name in ("LoRA (peft) of the teacher", "attention slicing", "`torch.export`")),
]


@pytest.fixture(scope="module")
def subjects(pipeline):
    return {name: Subject(name, pipeline) for name in {column for _, column in CELLS}}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("row", "column"), CELLS)
def test_what_is_put_around_it_works(unet, pipeline, subjects, row, column):
    torch.manual_seed(0)
    check = BY_NAME[row]
    outcome = check.run(subjects[column])
    assert check.works(outcome), outcome
