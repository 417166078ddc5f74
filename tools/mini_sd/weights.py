"""Which weights the bundled model has, so that a result can say what it was measured with."""

from __future__ import annotations

import hashlib

from asdm_compress.models.names import MINI_SD_FOLDER


def bundled_weights() -> str:
    """A short hash of the bundled UNet's weights file."""
    path = MINI_SD_FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
