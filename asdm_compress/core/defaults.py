"""Defaults that the command line and the Python interface share."""

from __future__ import annotations

from typing import Final

STEPS: Final = 25
GUIDANCE: Final = 5.0
CALIBRATION_PROMPTS: Final = 512
MOMENTS: Final = 1024  # of their runs, that are kept
BANDS: Final = 8  # of timesteps
EXPERTS: Final = 8  # of a routed convolution
PROBES: Final = 8  # runs whose response is measured
HELD_OUT_PROMPTS: Final = 16
NEIGHBOURS_SECONDS: Final = 240.0  # in which the best plan's neighbours are tried
NARROW_SHARES: Final = (0.75, 0.5, 0.25)  # of the inner width, that a search may narrow modules to
