"""A UNet's forward pass as a list of operations between named values, derived from the live modules.

Values have the names of the units that make them (`up_blocks.1.attentions.2`); beside these there are `cut.B`, the
hidden state that the decoder's layer B, counted from the outside, is about to join with its skip connection, and inside
of opened transformers the residual branches of the sub-units (`….transformer_blocks.0.attn1`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from diffusers import UNet2DConditionModel
from torch import nn

from asdm_compress.models.sites import modules_of
from asdm_compress.models.walk import Step, steps_of

OpKind = Literal[
    "unit", "cut", "adapter", "skip", "middle", "tokens", "part", "sum", "projection", "taken", "restored", "branch",
]  # fmt: skip
SAMPLE: Final = "sample"
PREDICTION: Final = "conv_out"
_PARTS: Final = (("norm1", "attn1"), ("norm2", "attn2"), ("norm3", "ff"))


@dataclass(frozen=True, slots=True)
class Op:
    """What makes one value: from which others, by which modules, and at the price of which modules' MACs.

    `index` numbers an adapter's or a ControlNet's residual; `correction` is set where a taken value is corrected.
    """

    value: str
    kind: OpKind
    inputs: tuple[str, ...]
    step: Step | None = None
    modules: tuple[nn.Module | None, ...] = ()
    priced: tuple[str, ...] = ()
    index: int = 0
    correction: str | None = None

    @property
    def entered(self) -> tuple[str, ...]:
        """The values that the unit as a whole takes; an opened transformer's last operation has its tokens too."""
        return self.inputs[1:] if self.kind == "projection" else self.inputs


@dataclass(frozen=True, slots=True)
class Graph:
    """All operations in the order in which they run.

    `skip_of` is the skip connection joined at each cut, `opened` the transformers that are taken apart.
    """

    ops: tuple[Op, ...]
    skip_of: Mapping[str, str]
    opened: tuple[str, ...] = ()
    by_value: Mapping[str, Op] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_value", {op.value: op for op in self.ops})


def graph_of(unet: UNet2DConditionModel, opened: Collection[str] = ()) -> Graph:
    """The graph of a UNet; the transformers at the paths `opened` are taken apart into their sub-units."""
    steps = steps_of(unet)
    layers = sum(step.kind == "decoder-resnet" for step in steps)
    ops: list[Op] = []
    skip_of: dict[str, str] = {}
    hidden, skips, where = SAMPLE, list[str](), "encoder"

    def add(op: Op) -> str:
        ops.append(op)
        return op.value

    for step in steps:
        if where == "encoder" and step.path.startswith(("mid_block", "up_blocks")):
            where = "middle"
            skips = [add(Op(f"skip.{i}", "skip", (value,), index=i)) for i, value in enumerate(skips)]
        if where == "middle" and step.path.startswith("up_blocks"):
            where, hidden = "decoder", add(Op("middle", "middle", (hidden,)))
        inputs: tuple[str, ...] = (hidden,)
        if step.kind == "decoder-resnet":
            layers -= 1
            cut = add(Op(f"cut.{layers}", "cut", (hidden,)))
            skip_of[cut] = skips.pop()
            inputs = (cut, skip_of[cut])
        elif step.kind == "upsampler" and skips:
            inputs = (hidden, skips[-1])  # whose size it takes
        if step.path in opened:
            ops += _opened(step, hidden)
            hidden = step.path
        else:
            hidden = add(Op(step.path, "unit", inputs, step, step.modules, _priced(step)))
        if step.encoder_block is not None:
            hidden = add(Op(f"{step.path}+adapter", "adapter", (hidden,), index=step.encoder_block))
        if step.pushes_skip:
            skips.append(hidden)
    return Graph(tuple(ops), skip_of, tuple(step.path for step in steps if step.path in opened))


def parts_of(path: str, transformer: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The sub-units of a transformer that are there: value, normalisation, module."""
    for k, block in enumerate(modules_of(transformer, "transformer_blocks")):
        for norm, part in _PARTS:
            if getattr(block, part, None) is not None:
                yield f"{path}.transformer_blocks.{k}.{part}", block.get_submodule(norm), block.get_submodule(part)


def _opened(step: Step, hidden: str) -> Iterator[Op]:
    path, transformer = step.path, step.modules[0]
    tokens = f"{path}.tokens"
    yield Op(tokens, "tokens", (hidden,), step, (transformer,), (f"{path}.proj_in",))
    for value, norm, part in parts_of(path, transformer):
        yield Op(value, "part", (tokens,), step, (norm, part), (value,))
        tokens, before = f"{value}+", tokens
        yield Op(tokens, "sum", (value, before))
    yield Op(path, "projection", (tokens, hidden), step, (transformer,), (f"{path}.proj_out",))


def _priced(step: Step) -> tuple[str, ...]:
    """The paths of the modules whose MACs a step spends."""
    return ("conv_out",) if step.kind == "head" else (step.path,)
