"""Fitted weights in the precision that the model is stored in."""

from __future__ import annotations

from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.lazy import lazy_unet
from asdm_compress.models.source import LoadOptions, Source


def rounded_as_stored(weights: SlotWeights, source: Source, options: LoadOptions) -> SlotWeights:
    """A plan's own weights rounded as they will be stored beside those of `source`; random models are not stored."""
    if source.family is not None:
        return weights
    with lazy_unet(source, options) as lazy:
        dtype = lazy.dtype("conv_in.weight")
    return {
        unit: {name: t.to(dtype).to(t.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        for unit, tensors in weights.items()
    }
