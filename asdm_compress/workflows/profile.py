"""`profile`: measure a model and leave `profile.json` and a plot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import check_output, output_folder
from asdm_compress.inheritance.members import HasMembers
from asdm_compress.models.loading import open_unet, text_tokens_of
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.profile import Profile, ProfileSettings, profile
from asdm_compress.reporting.plots import profile_svg
from asdm_compress.workflows.progress import Progress


def run_profile(
    model: str,
    options: LoadOptions,
    settings: ProfileSettings,
    progress: Progress,
    out: Path | None = None,
    overwrite: bool = False,
) -> Profile:
    """Profile the UNet that `model` names; with `out`, write `profile.json` and `profile.svg` there."""
    if out is not None:
        check_output(out, overwrite)
    with progress.stage("Opening the model"):
        source = resolve(model, options)
        if out is not None:
            check_output(out, overwrite, source.path)
        unet = open_unet(source, options)
    if isinstance(unet, HasMembers):
        raise AsdmError(
            f"{model} is switched between {', '.join(unet.member_names)}, of which every step runs another",
            "Profile one of the models that it was made of; `evaluate` times and counts a whole run.",
        )
    for note in source.notes:
        progress.note(note)
    if settings.text_tokens is None:
        settings = replace(settings, text_tokens=text_tokens_of(source))
    with progress.stage("Measuring"):
        found = profile(unet, settings, model)
    if out is not None:
        with output_folder(out, overwrite) as aside:
            found.save(aside / "profile.json")
            (aside / "profile.svg").write_text(profile_svg(found), encoding="utf-8")
    return found
