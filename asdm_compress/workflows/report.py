"""`report`: from a folder with whatever the stages have left to one HTML file, its figures as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import UNet2DConditionModel

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import output_file
from asdm_compress.models.folder import read_json, unet_class
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.reporting.html import render_html
from asdm_compress.reporting.markdown import markdown_of, with_figures
from asdm_compress.reporting.report import Blanks, Report, report_of
from asdm_compress.reporting.stages import RECIPE, Stages, read_stages
from asdm_compress.workflows.card import CARD
from asdm_compress.workflows.recipes import blank_teacher

HTML: Final = "report.html"
MARKDOWN: Final = "report.md"
JSON: Final = "report.json"


@dataclass(frozen=True, slots=True)
class ReportResult:
    """What was written, and the report itself."""

    out: Path
    report: Report


def write_report(folder: Path, name: str | None = None, out: Path | None = None) -> ReportResult:
    """Write `report.html`, `report.md` and `report.json` of a folder into it, or into the folder `out`.

    The figures of a model card in the folder are brought up to date where the report is written beside it. Raises
    AsdmError for a folder with nothing to tell of and for damaged files.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise AsdmError(f"{out} is a file, and a report is written into a folder", "Choose another --out.")
    stages = read_stages(folder, name)
    report = report_of(stages, blanks_of(stages))
    place = folder if out is None else out
    for file, text in (
        (HTML, render_html(report)),
        (MARKDOWN, markdown_of(report)),
        (JSON, json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"),
    ):
        with output_file(place / file) as aside:
            aside.write_text(text, encoding="utf-8")
    card = folder / CARD
    if place == folder and card.is_file():
        try:
            before = card.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a file of a user's own, in which nothing of ours is
            return ReportResult(place, report)
        after = with_figures(before, report)
        if after != before:
            with output_file(card) as aside:
                aside.write_text(after, encoding="utf-8")
    return ReportResult(place, report)


def blanks_of(stages: Stages) -> Blanks:
    """The UNets that drawings need, without weights: the recipe's teacher, and the student in the folder."""
    size = _latent_size(stages.folder)
    teacher = None if stages.recipe is None else blank_teacher(stages.recipe, stages.found[RECIPE], size)
    student = _blank_student(stages) if stages.schedule is not None else None
    return Blanks(teacher, student)


def _latent_size(folder: Path) -> int | None:
    """The side of the latents that the UNet in a folder was made for; None where its config does not say."""
    for path in (folder / "unet" / "config.json", folder / "config.json"):
        if path.is_file():
            size = read_json(path).get("sample_size")
            return size if isinstance(size, int) else None
    return None


def _blank_student(stages: Stages) -> UNet2DConditionModel | None:
    for folder in (stages.folder / "unet", stages.folder):
        config = folder / "config.json"
        if config.is_file():
            facts = read_json(config)
            with torch.device("meta"), quiet_libraries():
                return unet_class(folder, facts).from_config(facts)
    return None
