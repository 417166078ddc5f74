"""A LoRA trained on the teacher, renamed for a student: what is kept moves along, what is gone is named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import StudentSpec, specify
from asdm_compress.core.edits import SUBPIXEL
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.ldm import UNET_PREFIX, unet_to_ldm

KOHYA: Final = "lora_unet_"
PEFT: Final = "unet."
# Before the same names: diffusers' for a pipeline, peft's own, and none, of a UNet that is saved by itself.
_HEADS: Final = (PEFT, "base_model.model.", "")
# Where the name of the module ends: kohya's, peft's, and two older ones of diffusers.
_END: Final = re.compile(
    r"\.(lora_down|lora_up|lora_mid|alpha|dora_scale|hada_\w+|lokr_\w+|diff|diff_b|lora_A|lora_B|lora_magnitude_vector"
    r"|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)(\.|$)"
)

# The two factors of a low-rank product: the first takes what the module takes, the second gives what it gives.
_DOWN: Final = re.compile(r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)\.")
_UP: Final = re.compile(r"\.(lora_up|lora_B|lora\.up|lora_linear_layer\.up)\.")

# What peft's configuration says of modules by their names: a number for each, or just which.
_NUMBERS_OF: Final = ("rank_pattern", "alpha_pattern")
_NAMES_OF: Final = ("target_modules", "exclude_modules")

_PROCESSOR: Final = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.")


@dataclass(frozen=True, slots=True)
class RemappedLora:
    """The renamed tensors, and the names in the LoRA of the modules whose tensors are left out, with why."""

    tensors: Mapping[str, Tensor]
    left_out: Mapping[str, str]


def remap_lora(tensors: Mapping[str, Tensor], teacher: UNet2DConditionModel, plan: Plan) -> RemappedLora:
    """Rename a LoRA's tensors from the teacher's modules to those of the student of a plan.

    Knows kohya's names, in diffusers' and in the original numbering, and peft's, also of a UNet's LoRA saved by itself.
    Tensors of text encoders stay as they are. Those of modules that the student does not have, or has in another shape,
    are left out and named. Raises AsdmError for a file that is no LoRA of this teacher's UNet, also where only the
    widths tell: the names are the same in Stable Diffusion 1.x and 2.x.
    """
    modules, weights = _modules(teacher), teacher.state_dict()
    moved, recast = _moved(specify(teacher, plan))
    found: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    known = 0
    for name, tensor in tensors.items():
        head, module, rest = _split(name)
        teacher_module = modules.get((KOHYA if head == KOHYA else PEFT, module))
        if teacher_module is None and not head:  # a text encoder's
            found[name] = tensor
            continue
        if teacher_module is None:
            left_out[module] = "the teacher has no such module"
            continue
        known += 1
        _check_widths(teacher_module, rest, tensor, weights[f"{teacher_module}.weight"])
        student_module = moved.get(teacher_module)
        if student_module is None:
            form = recast.get(teacher_module)
            left_out[module] = (
                f"the student has this module {form}" if form else "the student does not have this module"
            )
            continue
        found[f"{head}{_as_written(student_module, head)}{rest}"] = tensor
    if not known:
        raise AsdmError("this file is no LoRA of this model's UNet", "Is it a LoRA of another family, or a checkpoint?")
    return RemappedLora(found, left_out)


def remap_metadata(metadata: Mapping[str, str], teacher: UNet2DConditionModel, plan: Plan) -> dict[str, str]:
    """Rename the modules in the adapter's configuration that newer diffusers keep in a LoRA file's metadata.

    Ranks and scales of modules that the student does not have are left out, and stay where they go by parts of names.
    """
    told = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if told is None:
        return dict(metadata)
    known, (moved, _) = set(_modules(teacher).values()), _moved(specify(teacher, plan))

    def renamed(names: Mapping[str, Any]) -> dict[str, Any]:
        return {moved.get(name, name): said for name, said in names.items() if name in moved or name not in known}

    try:
        config = json.loads(told)
    except json.JSONDecodeError:
        config = None
    if not isinstance(config, dict):  # which whoever loads the LoRA will say
        return dict(metadata)
    for key, said in config.items():
        what = key.removeprefix(PEFT)  # text encoders' have a prefix of their own
        if what in _NUMBERS_OF and isinstance(said, dict):
            config[key] = renamed(said)
        elif what in _NAMES_OF and isinstance(said, list):
            config[key] = list(renamed(dict.fromkeys(said)))
    return {**metadata, LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def _check_widths(module: str, rest: str, factor: Tensor, weight: Tensor) -> None:
    """Raise AsdmError where a factor takes or gives other channels than the teacher's module."""
    for pattern, axis, does in ((_DOWN, 1, "takes"), (_UP, 0, "gives")):
        fits = min(factor.ndim, weight.ndim) < 2 or factor.shape[axis] == weight.shape[axis]
        if pattern.match(rest) and not fits:
            raise AsdmError(
                f"this LoRA is of another model: at {module} it {does} {factor.shape[axis]} channels, and the teacher "
                f"{weight.shape[axis]}",
                "A LoRA goes with one family only, Stable Diffusion 1.x or 2.x.",
            )


def _split(name: str) -> tuple[str, str, str]:
    """The prefix, the module as the LoRA writes it, and the rest."""
    head = next(h for h in (KOHYA, *_HEADS) if name.startswith(h))
    if head != KOHYA:  # attention processors of older diffusers
        name = _PROCESSOR.sub(lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}.lora.", name)
    end = _END.search(name)
    return (head, name[len(head) : end.start()], name[end.start() :]) if end else (head, name[len(head) :], "")


def _as_written(module: str, head: str) -> str:
    return module.replace(".", "_") if head == KOHYA else module


def _modules(teacher: UNet2DConditionModel) -> dict[tuple[str, str], str]:
    """Every way in which LoRAs write a module of the teacher, to its path."""
    keys = list(teacher.state_dict())
    found: dict[tuple[str, str], str] = {}
    for ours, theirs in zip(keys, unet_to_ldm(teacher), strict=True):
        path, old = (name.rpartition(".")[0] for name in (ours, theirs.removeprefix(UNET_PREFIX)))
        found[KOHYA, old.replace(".", "_")] = path
        found[KOHYA, path.replace(".", "_")] = path
        found[PEFT, path] = path
    return found


def _moved(spec: StudentSpec) -> tuple[dict[str, str], dict[str, str]]:
    """The teacher's modules that the student has as they were, to their paths there; and those that it has in another
    form, to which."""
    paths = {source.rpartition(".")[0]: key.rpartition(".")[0] for key, source in spec.weight_map.items()}
    recast = {f"{unit}.{name.rpartition('.')[0]}": "narrowed" for unit, name in spec.slot_map.values()}
    # The weights of such an upsampler are the teacher's, but its convolution is no layer that a LoRA can be put on.
    subpixel = {f"{site}.conv" for site, edit in spec.edits.items() if edit == SUBPIXEL}
    recast |= {source: "as a sub-pixel convolution" for source, path in paths.items() if path in subpixel}
    return {source: path for source, path in paths.items() if source not in recast}, recast
