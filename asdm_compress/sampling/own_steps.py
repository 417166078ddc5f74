"""How a model is to be sampled, where that is a part of what was found for it: `sampling.json` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from diffusers import StableDiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field

from asdm_compress.core.checked_json import read_record
from asdm_compress.sampling.settings import SamplingSettings

FILE_NAME: Final = "sampling.json"
_VERSION: Final = 1


class SamplingFile(BaseModel):
    """The steps that a switched or optimized model was made for, of its own scheduler, whose class is named.

    Its guidance scale and image size, in pixels, are there where it was chosen under them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    steps: int = Field(ge=1, le=1000)
    scheduler: str
    guidance: float | None = None
    image_size: int | None = Field(default=None, ge=8)


def save_own_steps(
    folder: Path, pipeline: StableDiffusionPipeline, steps: int, chosen_under: SamplingSettings | None = None
) -> None:
    """Say in a pipeline's folder how many steps of its own scheduler it was made for, and under which guidance."""
    content = SamplingFile(steps=steps, scheduler=type(pipeline.scheduler).__name__)
    if chosen_under is not None:
        more = {"guidance": chosen_under.guidance, "image_size": chosen_under.image_size}
        content = content.model_copy(update=more)
    (folder / FILE_NAME).write_text(content.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")


def made_for(folder: Path | None) -> SamplingFile | None:
    """How a model was made to be sampled, None where its folder does not say; raises AsdmError for a damaged file."""
    path = None if folder is None else folder / FILE_NAME
    if path is None or not path.is_file():
        return None
    return read_record(path, SamplingFile, _VERSION, "Make the model again, or delete the file.")


def own_steps(folder: Path | None, scheduler: Any) -> int | None:
    """The steps of its scheduler that a model was made for, None where its folder does not say or names another one.

    Raises AsdmError for a file that is damaged.
    """
    found = made_for(folder)
    return found.steps if found is not None and found.scheduler == type(scheduler).__name__ else None
