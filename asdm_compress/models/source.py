"""What a model reference turns out to be: where its bytes are, what they hold, and how they are to be opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from asdm_compress.models.families import Family

SourceKind = Literal["pipeline folder", "unet folder", "single file", "random weights"]
PredictionType = Literal["epsilon", "v_prediction"]
Part = Literal["unet", "vae", "text_encoder"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is to be opened; `dtype` None takes the weights' own.

    `allow_pickle` lets a file run code while it is read, so it is off. `prediction_type` is what a single file's UNet
    predicts, where the file itself does not say so.
    """

    dtype: torch.dtype | None = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    random_weights: bool = False
    allow_pickle: bool = False
    prediction_type: PredictionType | None = None

    @classmethod
    def here(cls) -> LoadOptions:
        """In fp32, on a GPU where there is one."""
        return cls(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's bytes are, and what they are.

    `family` is set for random weights only, `parts` for single files only. `unet_config` is the UNet's configuration
    where it is known from the weights: of single files, and of folders whose config.json is not that of the weights.
    `prediction_type` is a single file's, None where nobody says which it is.
    `notes` is what a user should be told of all that.
    """

    name: str
    kind: SourceKind
    path: Path | None
    family: Family | None = None
    parts: frozenset[Part] = frozenset()
    unet_config: Mapping[str, Any] | None = None
    prediction_type: PredictionType | None = None
    notes: tuple[str, ...] = ()

    @property
    def unet_folder(self) -> Path | None:
        """The folder of the UNet, where there is one."""
        if self.path is None or self.kind == "single file":
            return None
        return self.path / "unet" if self.kind == "pipeline folder" else self.path

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a whole pipeline, not a UNet alone."""
        return self.kind == "pipeline folder" or {"vae", "text_encoder"} <= self.parts
