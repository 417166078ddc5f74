"""Defaults that the command line and the Python interface share."""

from __future__ import annotations

from typing import Final

STEPS: Final = 25
GUIDANCE: Final = 5.0
CALIBRATION_PROMPTS: Final = 128
HELD_OUT_PROMPTS: Final = 16
NARROW_SHARES: Final = (0.75, 0.5, 0.25)  # of the inner width, that a search may narrow modules to
