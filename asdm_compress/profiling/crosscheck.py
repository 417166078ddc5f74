"""What fvcore and thop count for the same forward pass, and why they differ from the true count."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asdm_compress.models.tree import sharing_copy


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """MACs by module path (the empty path is the whole UNet) as another counter sees them, and its convention."""

    counter: str
    convention: str
    macs: Mapping[str, int]


class _TupleOutput(nn.Module):
    """The UNet with positional inputs and a plain tuple as output, as tracing needs it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return self.unet(sample, timestep, text, return_dict=False)


@torch.no_grad()
def cross_check(unet: nn.Module, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[CrossCheck, ...]:
    """Count the pass with fvcore and with thop; both run it on real tensors."""
    return (_count_with_fvcore(unet, sample, timestep, text), _count_with_thop(unet, sample, timestep, text))


def _count_with_fvcore(unet: nn.Module, sample: Tensor, timestep: Tensor, text: Tensor) -> CrossCheck:
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The tracer's remarks on shapes that are constant here, and fvcore's own use of deprecated scripting.
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis

            analysis = FlopCountAnalysis(_TupleOutput(unet), (sample, timestep, text))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts = {name.removeprefix("unet").removeprefix("."): int(n) for name, n in analysis.by_module().items()}
    finally:
        logger.setLevel(level)
    return CrossCheck(
        "fvcore", "convolutions, linear layers and norms; scaled-dot-product attention is not counted", counts
    )


def _count_with_thop(unet: nn.Module, sample: Tensor, timestep: Tensor, text: Tensor) -> CrossCheck:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing thop compares versions in a deprecated way
        import thop

        # thop leaves buffers in the modules that it has looked at: not in ours.
        twin = sharing_copy(unet)
        macs, _, tree = thop.profile(twin, inputs=(sample, timestep, text), verbose=False, ret_layer_info=True)
    counts: dict[str, int] = {"": int(macs)}
    _flatten(tree, "", counts)
    return CrossCheck(
        "thop", "convolutions, linear layers and norms, from module hooks; attention is not counted", counts
    )


def _flatten(tree: Mapping[str, Any], prefix: str, counts: dict[str, int]) -> None:
    for name, (macs, _, children) in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        counts[path] = int(macs)
        _flatten(children, path, counts)
