"""The loader that every student's UNet folder carries, for places where this package is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from asdm_compress.models.loader_source import loader_source

LOADER: Final = "asdm_unet"
# The classes, and the modules that say all of them.
_CLASSES: Final = {
    "AssembledUNet2DConditionModel": "models.assembled_unet",
    "SwitchedUNet2DConditionModel": "switching.switched_unet",
}


def write_loader(folder: Path, name: str) -> None:
    """Put the file of the class `name` beside a saved config, and tell diffusers' `AutoModel` of it in there.

    `AutoModel.from_pretrained(folder, trust_remote_code=True)` then opens the UNet.
    """
    (folder / f"{LOADER}.py").write_text(loader_source(_CLASSES[name]), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": f"{LOADER}.{name}"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def carry_loader(folder: Path) -> None:
    """Make a pipeline folder name the UNet's own file instead of this package.

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` then opens it anywhere. diffusers asks for that
    flag wherever there is such a file, and takes no other class from a repository on the hub.
    """
    path = folder / "model_index.json"
    path.write_text(carried(path.read_text(encoding="utf-8")), encoding="utf-8")


def carried(index: str) -> str:
    """A `model_index.json` that names the UNet's own file; a plain diffusers pipeline's stays as it is."""
    content = json.loads(index)
    if content["unet"][1] in _CLASSES:
        content["unet"] = [LOADER, content["unet"][1]]
    return json.dumps(content, indent=2) + "\n"
