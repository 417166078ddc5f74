"""What a single file's UNet predicts, ε or v: found where it is written down, and never guessed from the weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from diffusers import DiffusionPipeline

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.files import first_line
from asdm_compress.models.folder import read_json
from asdm_compress.models.layout import Layout
from asdm_compress.models.source import PredictionType, Source

PREDICTION_TYPES: Final[Mapping[str, PredictionType]] = {
    "epsilon": "epsilon", "eps": "epsilon", "v_prediction": "v_prediction", "v": "v_prediction",
}  # fmt: skip
_V_SIZE: Final = 768  # pixels: Stable Diffusion 2.x that predicts v was trained at this size
_SD1_TEXT_WIDTH: Final = 768
# Stability's own inpainting and depth models of 2.x predict ε, and have channels that no other model has.
_EPSILON_CHANNELS: Final = (5, 9)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is predicted, None where nobody says; how that is known; the image size in pixels that goes with it."""

    kind: PredictionType | None
    reason: str
    image_size: int | None


def parse_prediction_type(text: str | None) -> PredictionType | None:
    """An option's value; raises AsdmError for an unknown one."""
    if text is None:
        return None
    if text not in PREDICTION_TYPES:
        raise AsdmError(f"unknown prediction type {text!r}", "Use epsilon or v_prediction.")
    return PREDICTION_TYPES[text]


def check_asked(source: Source, asked: PredictionType | None) -> None:
    """Raise AsdmError where a prediction type is asked for and the model's own config says another, or has none.

    A single file is opened as what is asked for: nothing else may say it there.
    """
    if asked is None or source.kind == "single file":
        return
    hint = "Leave --prediction-type out: it is for single files that do not say what they predict."
    if source.kind != "pipeline folder" or source.path is None:
        raise AsdmError(f"{source.name} is a UNet alone, whose prediction type changes nothing", hint)
    config = source.path / "scheduler" / "scheduler_config.json"
    own = read_json(config).get("prediction_type", "epsilon")  # diffusers' own default
    if own != asked:
        raise AsdmError(f"{source.name} has the prediction type {own}, not {asked}, as its {config.name} says", hint)


def find_prediction(
    path: Path,
    metadata: Mapping[str, str],
    names: Collection[str],
    layout: Layout,
    family_default: PredictionType | None,
    asked: PredictionType | None,
) -> Prediction:
    """Look, in this order, at the user's option, the config beside the file, the file's metadata, and its family.

    The config is the original code's YAML, of the file's own name; the metadata is `modelspec.prediction_type`; some
    fine-tunes carry an empty tensor called `v_pred`. Of the family it follows for 1.x, and for 2.x with the channels of
    Stability's inpainting and depth models. Raises AsdmError for a config that cannot be read.
    """
    written = _sidecar(path.with_suffix(".yaml")) if asked is None else None
    said = metadata.get("modelspec.prediction_type", "").lower()
    kind: PredictionType | None
    if asked is not None:
        kind, reason = asked, ""
    elif written is not None:
        kind, reason = written, f"it predicts {_letter(written)}, as {path.with_suffix('.yaml').name} says"
    elif said in PREDICTION_TYPES:
        kind, reason = PREDICTION_TYPES[said], f"it predicts {_letter(PREDICTION_TYPES[said])}, as its metadata says"
    elif "v_pred" in names:
        kind, reason = "v_prediction", "it predicts v, as its tensor v_pred says"
    elif family_default is not None or layout.in_channels in _EPSILON_CHANNELS:
        kind = family_default or "epsilon"
        reason = f"it is taken to predict {_letter(kind)}, as the published models of its kind do (--prediction-type)"
    else:
        kind, reason = None, ""
    match = re.match(r"(\d+)x", metadata.get("modelspec.resolution", ""))
    size = int(match[1]) if match else None
    if size is None and kind == "v_prediction" and layout.text_width != _SD1_TEXT_WIDTH:
        size = _V_SIZE
    return Prediction(kind, reason, size)


def written_prediction(pipeline: DiffusionPipeline) -> dict[str, str]:
    """What a pipeline predicts, and its size in pixels, as metadata that `find_prediction` reads from a single file.

    The keys are those of Stability AI's model specification.
    """
    kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
    size = pipeline.unet.config["sample_size"]
    found = {"modelspec.prediction_type": "v" if kind == "v_prediction" else kind}
    if isinstance(size, int):
        pixels = size * pipeline.vae_scale_factor
        found["modelspec.resolution"] = f"{pixels}x{pixels}"
    return found


def _letter(kind: PredictionType) -> str:
    return "ε" if kind == "epsilon" else "v"


def _sidecar(path: Path) -> PredictionType | None:
    """The parameterization in the original code's config, where such a file lies beside the checkpoint."""
    if not path.is_file():
        return None
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        parameters = content["model"]["params"]
        value = str(parameters.get("parameterization", "eps"))  # the original code's own default
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise AsdmError(
            f"{path} is no config of the original Stable Diffusion code: {first_line(error)}",
            "Mend it, move it away, or give --prediction-type.",
        ) from error
    if value not in PREDICTION_TYPES:
        raise AsdmError(f"{path} has the unknown parameterization {value!r}", "Known are eps and v.")
    return PREDICTION_TYPES[value]
