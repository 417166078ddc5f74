"""Whether a student with a folded config computes what its plan says: it is built, and its outputs are compared.

What folds into a config depends on a UNet's structure alone. So both sides are made narrow, of random weights, with the
levels, layers, attention and equal widths of the real ones: that takes parts of a second, and no weights are needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from asdm_compress.assembly.plan import PlacedEdits
from asdm_compress.assembly.stock import StockParts, fold_into_config, own_config
from asdm_compress.core.edits import Edit, has_weights
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.edits import edited_copy
from asdm_compress.models.quiet import quiet_libraries

_NARROWEST: Final = 8
_NARROW: Final[Mapping[str, Any]] = {
    "norm_num_groups": 4, "attention_head_dim": 2, "num_attention_heads": None, "cross_attention_dim": 8,
}  # fmt: skip
_TOLERANCE: Final = 1e-5
_TEXT_TOKENS: Final = 3

_Pairs = tuple[tuple[str, str], ...]


def stock_parts(unet: UNet2DConditionModel, placed: PlacedEdits) -> StockParts:
    """As much of a plan in a plain config as changes nothing, by comparison of the outputs.

    Where a config with folded layers computes something else, the layers stay in it, and are taken out by edits.
    """
    for folds_layers in (True, False):
        parts = fold_into_config(unet, placed, folds_layers)
        if computes_the_same(unet, placed, parts):
            return parts
    raise AsdmError("no student computes what this plan says", "This is a mistake of the program: please report it.")


def computes_the_same(unet: UNet2DConditionModel, placed: PlacedEdits, parts: StockParts) -> bool:
    """Whether a student made of these parts gives the edited UNet's outputs.

    Edits that bring weights along are left out on both sides: they are the same modules at the same places.
    """
    whole, folded = (json.dumps(config, sort_keys=True) for config in (own_config(unet), dict(parts.config)))
    return whole == folded or _agree(
        whole, _without_weights(placed.units), placed.drop_mid, placed.keep_levels, folded,
        _without_weights(parts.edits), tuple(parts.renamed.items()),
    )  # fmt: skip


def _without_weights(edits: Mapping[str, Edit]) -> _Pairs:
    return tuple((site, edit) for site, edit in edits.items() if not has_weights(edit))


@lru_cache(maxsize=512)
def _agree(
    config: str, units: _Pairs, drop_mid: bool, keep_levels: int | None, folded: str, left: _Pairs, renamed: _Pairs
) -> bool:
    whole, parts = json.loads(config), StockParts(json.loads(folded), dict(left), dict(renamed))
    widths = sorted(set(whole["block_out_channels"]))
    # The caller's device and random numbers are its own.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        teacher = _narrow(whole, widths, {})
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        wanted = edited_copy(teacher, dict(units), drop_mid, keep_levels)
        try:
            student = _narrow(parts.config, widths, parts.edits)
            weights = teacher.state_dict()
            student.load_state_dict({key: weights[parts.teacher_key(key)] for key in student.state_dict()})
        except (KeyError, ValueError, RuntimeError):
            return False  # such a student cannot be built, or takes other weights
        size = 2 ** (len(whole["down_block_types"]) - 1)
        inputs = (torch.randn(1, whole["in_channels"], size, size), 500, torch.randn(1, _TEXT_TOKENS, _NARROWEST))
        one, other = (net.eval()(*inputs, return_dict=False)[0] for net in (wanted, student))
    return one.shape == other.shape and torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)


def _narrow(config: Mapping[str, Any], widths: list[int], edits: Mapping[str, Edit]) -> nn.Module:
    """A UNet of this structure whose widths are equal where the config's are."""
    narrow = tuple(_NARROWEST * (widths.index(width) + 1) for width in config["block_out_channels"])
    with quiet_libraries():
        made: nn.Module = AssembledUNet2DConditionModel(
            **{**config, **_NARROW, "block_out_channels": narrow}, edits=dict(edits)
        )
    return made
