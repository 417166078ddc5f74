"""`assembly.json`: what an assembly measured and found, kept beside the student for reports.

The recipe says what was done and its `evidence` what came of it; this file holds the figures behind them: every edit
that the search could choose, the damage of the whole plan by timestep band, the student's costs site by site, and the
image pairs, which lie as PNG files in `pairs/`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from asdm_compress.assembly.damage import Damage
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.search import Interaction
from asdm_compress.core.checked_json import read_record
from asdm_compress.core.errors import AsdmError

SCHEMA_VERSION: Final = 1
FILE_NAME: Final = "assembly.json"
PAIRS_FOLDER: Final = "pairs"
_AGAIN: Final = "Make the student again with `asdm-compress assemble`."


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Band(_Record):
    """A timestep band, from noise to image: its first and its last timestep, the share that it has in a total damage,
    and the relative squared error of the whole plan's guided prediction in it, on held-out prompts."""

    first: float
    last: float
    weight: float
    held_out_damage: float


class MeasuredOption(_Record):
    """An edit that the search could choose. Savings are in seconds, MACs and parameters of the whole UNet's.

    `damage` is one-shot, alone, and `bands` the same band by band; `atoms` are the smallest sites that it touches: of
    two options that share one only one can be chosen.
    """

    site: str
    edit: str
    atoms: list[str]
    saved_latency: float
    saved_macs: float
    saved_params: float
    damage: float
    bands: list[float]

    @property
    def name(self) -> str:
        """`site:edit`, as options are called."""
        return f"{self.site}:{self.edit}"

    def as_option(self) -> Option:
        """As the search has it."""
        savings = {"latency": self.saved_latency, "macs": self.saved_macs, "params": self.saved_params}
        return Option(self.site, self.edit, frozenset(self.atoms), savings)  # type: ignore[arg-type]


class StudentSite(_Record):
    """What is left at a site, by its path in the teacher. Seconds are shares of the student's measured latency."""

    path: str
    latency: float
    macs: int
    parameters: int


class Pair(_Record):
    """Images of one held-out prompt and seed; files relative to `assembly.json`.

    `unfitted` is the same cut without anything fitted to it, where something was.
    """

    prompt: str
    seed: int
    teacher: str
    student: str
    unfitted: str | None = None
    psnr: float
    ssim: float


class Assembly(_Record):
    """The whole of `assembly.json`.

    `quality` has the figures of all held-out prompts, of which `pairs` shows the first; `seconds_per_image` whole
    images, by `teacher` and `student`. `pair_terms` holds, for every two of the `options` in the order of
    `itertools.combinations`, what their errors together come to above the sum of their damages, as base64 of
    little-endian 32-bit floats. `proof` says what is proven of the plan.
    """

    schema_version: Literal[1] = 1
    model: str
    command: str
    proof: str
    opens_in_plain_diffusers: bool
    sampler: str
    bands: list[Band]
    options: list[MeasuredOption]
    pair_terms: str
    student_sites: list[StudentSite]
    quality: dict[str, float | int | None]
    seconds_per_image: dict[Literal["teacher", "student"], float]
    pairs: list[Pair]

    def option(self, site: str, edit: str) -> MeasuredOption | None:
        """The record of an edit; None where it was none of the options."""
        return next((o for o in self.options if (o.site, o.edit) == (site, edit)), None)

    def interaction(self) -> Interaction:
        """What two options by name damage together above the sum of their own, as far as errors simply add up."""
        terms = np.frombuffer(base64.b64decode(self.pair_terms), "<f4")
        at = {option.name: i for i, option in enumerate(self.options)}
        count = len(self.options)

        def between(one: str, other: str) -> float:
            i, j = sorted((at[one], at[other]))
            return float(terms[i * count - i * (i + 1) // 2 + j - i - 1])

        return between

    def save(self, path: Path) -> None:
        """Write `assembly.json`."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_assembly(path: Path) -> Assembly:
    """Read an `assembly.json`; raises AsdmError for one that is damaged or of another schema version."""
    found = read_record(path, Assembly, SCHEMA_VERSION, _AGAIN)
    count = len(found.options)
    try:
        terms = len(base64.b64decode(found.pair_terms, validate=True))
    except ValueError as error:
        raise AsdmError(f"{path}: pair_terms is no base64", _AGAIN) from error
    if terms != 4 * count * (count - 1) // 2:
        raise AsdmError(f"{path}: pair_terms does not have one number for every two of {count} options", _AGAIN)
    return found


def measured_options(options: Sequence[Option], damages: Mapping[str, Damage]) -> list[MeasuredOption]:
    """Options with their damages, for the file."""
    return [
        MeasuredOption(
            site=o.site,
            edit=o.edit,
            atoms=sorted(o.atoms),
            saved_latency=o.savings["latency"],
            saved_macs=o.savings["macs"],
            saved_params=o.savings["params"],
            damage=damages[o.name].total,
            bands=list(damages[o.name].bands),
        )
        for o in options
    ]


def pair_terms(options: Sequence[Option], damages: Mapping[str, Damage]) -> str:
    """The terms of all pairs of options, as `Assembly.pair_terms` holds them."""
    terms = [damages[a.name].interaction(damages[b.name]) for a, b in combinations(options, 2)]
    return base64.b64encode(np.array(terms, dtype="<f4").tobytes()).decode("ascii")


def bands_of(
    held_out: Damage, weights: Sequence[float], boundaries: Sequence[float], train_timesteps: int
) -> list[Band]:
    """The bands of a plan's damage on held-out prompts; `boundaries` are the timesteps between bands, falling."""
    edges = [float(train_timesteps), *boundaries, 0.0]
    return [
        Band(first=first, last=last, weight=weight, held_out_damage=damage)
        for first, last, weight, damage in zip(edges, edges[1:], weights, held_out.bands, strict=False)
    ]
