"""An IP-Adapter made for the teacher, renumbered for the cross-attentions that a student still has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import build, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.tree import meta_copy

# A tensor's name: the number of the attention processor, then what it is. A UNet's attentions are numbered in the order
# of its modules, self- and cross-attentions in turns, so that the image's keys and values have odd numbers.
_NAME: Final = re.compile(r"(\d+)\.(to_[kv]_ip\..+|to_\w+_lora\..+)")

IpAdapter = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class RemappedIpAdapter:
    """The adapter's two parts, for `load_ip_adapter`, and the teacher's attentions that get nothing of it, with why."""

    tensors: dict[str, dict[str, Tensor]]
    left_out: Mapping[str, str]


def remap_ip_adapter(adapter: IpAdapter, teacher: UNet2DConditionModel, plan: Plan) -> RemappedIpAdapter:
    """Renumber an IP-Adapter (2308.06721) for the student of a plan; the projection of the image stays as it is.

    `adapter` is what its file holds: `image_proj` and `ip_adapter`. A narrowed cross-attention, for which the image's
    keys and values are too wide, gets zeros, so that it looks at the text alone. Raises AsdmError for what is no
    IP-Adapter of this teacher.
    """
    if not {"image_proj", "ip_adapter"} <= set(adapter):
        raise AsdmError("this is no IP-Adapter: it lacks image_proj or ip_adapter")
    spec = specify(teacher, plan)
    theirs = _attentions(meta_copy(teacher))
    ours = _attentions(build(spec.config, spec.edits))
    narrowed = {key.rpartition(".to_q.")[0]: unit for key, (unit, _) in spec.slot_map.items() if ".to_q." in key}
    sources = {
        path: narrowed.get(path) or spec.weight_map[f"{path}.to_q.weight"].rpartition(".to_q.")[0] for path in ours
    }
    parts = _by_number(adapter["ip_adapter"])
    _check_numbers(parts, theirs)
    found: dict[str, Tensor] = {}
    left_out = {path: "the student does not have this attention" for path in theirs if path not in sources.values()}
    crossing = 0
    for number, path in enumerate(ours):
        source = sources[path]
        old = theirs.index(source)
        for name, tensor in parts.get(old, {}).items():
            # Processors' own tensors are numbered as if each attention had its pair; LoRAs by the processor itself.
            new = 2 * crossing + 1 if "_ip." in name else number
            if path not in narrowed:
                found[f"{new}.{name}"] = tensor
                continue
            left_out[source] = "the student has this attention narrowed"
            if "_ip." in name:
                found[f"{new}.{name}"] = torch.zeros_like(tensor)
        crossing += path.endswith(".attn2")
    used = {path: why for path, why in left_out.items() if theirs.index(path) in parts}
    return RemappedIpAdapter({"image_proj": dict(adapter["image_proj"]), "ip_adapter": found}, used)


def _attentions(unet: UNet2DConditionModel) -> list[str]:
    """The paths of the attentions, in the order in which their processors are numbered."""
    return [name.removesuffix(".processor") for name in unet.attn_processors]


def _by_number(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise AsdmError(f"{name} is no tensor of an IP-Adapter")
        parts.setdefault(int(match[1]), {})[match[2]] = tensor
    return parts


def _check_numbers(parts: Mapping[int, Mapping[str, Tensor]], attentions: list[str]) -> None:
    """Raise AsdmError unless there are keys and values for exactly the teacher's cross-attentions."""
    given = sorted(number for number, part in parts.items() if any("_ip." in name for name in part))
    expected = [number for number, path in enumerate(attentions) if path.endswith(".attn2")]
    if given != expected:
        raise AsdmError(
            f"this IP-Adapter is for {len(given)} cross-attentions, the teacher has {len(expected)}",
            "Give one that was made for the teacher.",
        )
