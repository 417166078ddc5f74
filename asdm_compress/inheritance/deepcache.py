"""For people who come from DeepCache (2312.00858): the same three calls, on this run time.

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

    def set_params(self, cache_interval: int = 3, cache_branch_id: int = 0, forecast: Forecast = HOLD) -> None:
        """Every `cache_interval`-th step computes; the others compute the layers outside of the branch.

        Branches count the decoder's layers from the outside. Raises AsdmError for an interval below 1.
        """
        self.mode = Mode("uniform", float(cache_interval), light=cut(cache_branch_id, forecast))

    def enable(self) -> None:
        """Start caching; raises AsdmError before `set_params`, and for a branch that the UNet does not have."""
        if self.mode is None:
            raise AsdmError("the cache has no parameters yet", "Call set_params(cache_interval=3, cache_branch_id=0).")
        enable(self.pipe, self.mode)

    def disable(self) -> None:
        """Stop caching; harmless where nothing is cached."""
        disable(self.pipe)
