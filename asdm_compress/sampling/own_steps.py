"""How many steps a model was made for, where that is a part of what was found for it: `sampling.json` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from diffusers import StableDiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field

from asdm_compress.core.checked_json import read_record

FILE_NAME: Final = "sampling.json"
_VERSION: Final = 1


class SamplingFile(BaseModel):
    """The steps that a switched or optimized model was made for, of its own scheduler, whose class is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    steps: int = Field(ge=1, le=1000)
    scheduler: str


def save_own_steps(folder: Path, pipeline: StableDiffusionPipeline, steps: int) -> None:
    """Say in a pipeline's folder how many steps of its own scheduler it was made for."""
    content = SamplingFile(steps=steps, scheduler=type(pipeline.scheduler).__name__)
    (folder / FILE_NAME).write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")


def own_steps(folder: Path | None, scheduler: Any) -> int | None:
    """The steps of its scheduler that a model was made for, None where its folder does not say or names another one.

    Raises AsdmError for a file that is damaged.
    """
    path = None if folder is None else folder / FILE_NAME
    if path is None or not path.is_file():
        return None
    found = read_record(path, SamplingFile, _VERSION, "Make the model again, or delete the file.")
    return found.steps if found.scheduler == type(scheduler).__name__ else None
