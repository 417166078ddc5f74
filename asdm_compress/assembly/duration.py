"""How long measuring will take, from the time of one pass: said before it begins, since at full size it can be days."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from asdm_compress.assembly.calibration import OPTION_MEASURED, Effort, probe_steps
from asdm_compress.assembly.options import Option
from asdm_compress.profiling.profile import Profile
from asdm_compress.sampling.settings import SamplingSettings

# Of a whole pass an edited one is taken to take: it begins at the edit, and most edits are in the deeper half.
PART_OF_PASS: Final = 0.7


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of the recording and of measuring every edit once, without fits."""

    recording: float
    measuring: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.recording + self.measuring


def measuring_time(
    profile: Profile, prompts: int, sampling: SamplingSettings, effort: Effort, bands: int, options: Sequence[Option]
) -> Duration:
    """What `record` on so many prompts, and the damages of these options, will take as fast as the profiled pass is."""
    branches = 2 if sampling.guidance > 1 else 1
    per_image = branches * profile.latency / profile.fingerprint.batch
    probed = min(effort.probes, prompts) * probe_steps(sampling.steps, bands)
    moments = min(OPTION_MEASURED, effort.moments, prompts * bands)
    return Duration(
        recording=(prompts * sampling.steps + probed) * per_image,
        measuring=len(options) * moments * PART_OF_PASS * per_image,
    )
