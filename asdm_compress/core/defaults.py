"""Defaults that the command line and the Python interface share."""

from __future__ import annotations

from typing import Final

STEPS: Final = 25
GUIDANCE: Final = 5.0
CALIBRATION_PROMPTS: Final = 24
HELD_OUT_PROMPTS: Final = 16
