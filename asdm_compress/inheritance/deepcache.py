"""For people who come from DeepCache (2312.00858): its three calls and their arguments, on this run time.

A step that does not compute holds the hidden state below one branch, which is `uniform:N,branch=B,forecast=hold` here.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import cut
from asdm_compress.inheritance.attach import disable, enable
from asdm_compress.inheritance.forecast import HOLD, Forecast
from asdm_compress.inheritance.modes import Mode


class DeepCacheHelper:
    """Enables and disables caching on one pipeline with DeepCache's parameters."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.mode: Mode | None = None

    def set_params(
        self,
        cache_interval: int = 3,
        cache_branch_id: int = 0,
        skip_mode: str = "uniform",
        forecast: Forecast = HOLD,
    ) -> None:
        """Every `cache_interval`-th step computes; the others compute the layers outside of the branch.

        Branches count the decoder's layers from the outside. Unlike DeepCache's the interval is 3 by default, not 1,
        which caches nothing. Raises AsdmError for an interval below 1, and for another `skip_mode` than `uniform`, of
        which DeepCache 0.1.1 knows no other either.
        """
        if skip_mode != "uniform":
            raise AsdmError(
                f"there is no skip_mode {skip_mode!r} here", "Use uniform, or enable(pipeline, mode) for other modes."
            )
        self.mode = Mode("uniform", float(cache_interval), light=cut(cache_branch_id, forecast))

    def enable(self, pipe: DiffusionPipeline | None = None) -> None:
        """Start caching, on another pipeline where one is given.

        Raises AsdmError before `set_params`, and for a branch that the UNet does not have.
        """
        if self.mode is None:
            raise AsdmError("the cache has no parameters yet", "Call set_params(cache_interval=3, cache_branch_id=0).")
        self.pipe = self.pipe if pipe is None else pipe
        enable(self.pipe, self.mode)

    def disable(self) -> None:
        """Stop caching; harmless where nothing is cached."""
        disable(self.pipe)
