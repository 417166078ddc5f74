"""A UNet whose forward pass also gives the outputs of some of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.core.errors import AsdmError


class FeatureUNet(nn.Module):
    """Wraps a UNet; one forward pass gives the prediction and the outputs of the modules at `places`.

    The features are a part of what `forward` returns, so wrappers for several devices see them; nothing hangs on names
    that such wrappers change. They are kept in the pass itself alone: what gradient checkpointing runs again is not.
    """

    def __init__(self, unet: UNet2DConditionModel, places: Sequence[str] = ()) -> None:
        super().__init__()
        self.unet = unet
        self.places = tuple(places)
        self._found: dict[int, Tensor] | None = None
        self._handles = [
            unet.get_submodule(place).register_forward_hook(self._keeper(number))
            for number, place in enumerate(self.places)
        ]

    def forward(self, sample: Tensor, timesteps: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, h, w), (B,), (B, tokens, width) to the prediction (B, C, h, w) and one tensor per place."""
        self._found = {}
        try:
            dtype = self.unet.dtype  # a teacher may be held in half precision
            prediction: Tensor = self.unet(sample.to(dtype), timesteps, text.to(dtype), return_dict=False)[0]
            found = self._found
        finally:
            self._found = None
        missing = [place for number, place in enumerate(self.places) if number not in found]
        if missing:
            raise AsdmError(f"the module {missing[0]} did not run, so it has no feature to compare")
        return prediction, [found[number] for number in range(len(self.places))]

    def release(self) -> UNet2DConditionModel:
        """The UNet as it was."""
        for handle in self._handles:
            handle.remove()
        return self.unet

    def _keeper(self, number: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._found is not None:
                self._found[number] = output[0] if isinstance(output, (tuple, list)) else output

        return keep
