"""What other networks add to a UNet's forward pass: ControlNet's and T2I-Adapter's residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from asdm_compress.core.errors import AsdmError


@dataclass(frozen=True, slots=True)
class AddedResiduals:
    """`skips` are added to the encoder's outputs and `mid` to the mid block's (ControlNet, 2302.05543); `blocks`, one
    per encoder block, to what its layers end in (T2I-Adapter, 2302.08453).

    Raises AsdmError for a half of ControlNet's, and for a number of them that does not fit the UNet.
    """

    skips: Sequence[Tensor] | None = None
    mid: Tensor | None = None
    blocks: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.skips is None) != (self.mid is None):
            raise AsdmError(
                "a ControlNet's residuals are those of the skip connections and that of the mid block, both",
                "An adapter's residuals go into `down_intrablock_additional_residuals`.",
            )

    def check_count(self, skips: int) -> None:
        """Raise AsdmError unless there is one residual for each of so many skip connections, or none at all."""
        if self.skips is not None and len(self.skips) != skips:
            raise AsdmError(
                f"{len(self.skips)} residuals were given for {skips} skip connections",
                "The ControlNet was made for another UNet; of a student, make it anew.",
            )

    def to_block(self, number: int | None, hidden: Tensor) -> Tensor:
        """`hidden` with an encoder block's own residual, if there is one."""
        if number is None or self.blocks is None or number >= len(self.blocks):
            return hidden
        return hidden + self.blocks[number]

    def to_skips(self, skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The skip connections with theirs."""
        if self.skips is None:
            return skips
        self.check_count(len(skips))
        return tuple(skip + residual for skip, residual in zip(skips, self.skips, strict=True))

    def to_mid(self, hidden: Tensor) -> Tensor:
        """The decoder's input with the mid block's."""
        return hidden if self.mid is None else hidden + self.mid


NONE_ADDED = AddedResiduals()
