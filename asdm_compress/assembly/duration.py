"""How long measuring will take, from the time of one pass: said before it begins, since at full size it can be days."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from asdm_compress.assembly.calibration import FEW, ONE_IN, ONE_IN_FEW, OPTION_MEASURED, Effort, probe_steps
from asdm_compress.assembly.options import Option
from asdm_compress.core.edits import has_weights
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
    profile: Profile,
    prompts: int,
    sampling: SamplingSettings,
    effort: Effort,
    bands: int,
    options: Sequence[Option],
    is_fitted: bool = True,
    refits: bool = True,
) -> Duration:
    """What `record` on so many prompts, and the damages of these options, will take as fast as the profiled pass is.

    Where something is fitted damages are measured on the prompts kept out of that; where what stays is refitted those
    of cuts are measured without it too.
    """
    branches = 2 if sampling.guidance > 1 else 1
    per_image = branches * profile.latency / profile.fingerprint.batch
    probed = min(effort.probes, prompts) * probe_steps(sampling.steps, bands)
    moments = prompts * min(bands, -(-effort.moments // prompts))
    if is_fitted:
        moments = min(OPTION_MEASURED, -(-moments // (ONE_IN if prompts >= FEW else ONE_IN_FEW)))
    passes = len(options) + (sum(not has_weights(option.edit) for option in options) if refits else 0)
    return Duration(
        recording=(prompts * sampling.steps + probed) * per_image,
        measuring=passes * moments * PART_OF_PASS * per_image,
    )
