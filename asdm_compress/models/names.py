"""The names that stand for a model on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MINI_SD_FOLDER: Final = Path(__file__).with_name("mini_sd")
MINI_SD: Final = "mini-sd"

# Name on the command line -> repository on the hub whose local copy is used where there is one.
HUB_NAMES: Final = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21-base": "stabilityai/stable-diffusion-2-1-base",
    "sd21": "stabilityai/stable-diffusion-2-1",
}
NAMES: Final = (MINI_SD, *HUB_NAMES)
