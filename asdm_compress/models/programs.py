"""Which program opens which UNet in which layout, and why not: a table of what each needs, read in its sources.

None of the programs but diffusers and ONNX Runtime has been run on what is written here; each entry says where its
needs were read. `export` shows the table's answer for what it has written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from diffusers import UNet2DConditionModel

Layout = Literal["ldm", "sdcpp", "folder", "onnx"]

SD1_TEXT: Final = 768
SD2_TEXT: Final = 1024
_SD1_HEADS: Final = 8
_SD2_HEAD_WIDTH: Final = 64
_FULL_WIDTH: Final = 320  # of the highest level
_CROSS: Final = "CrossAttn"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the programs look at. Per level, the highest first: `widths`, `depths` (the encoder's layers), attention in
    the encoder and in the decoder, and `heads`. `is_whole` says whether VAE and text encoder come along."""

    edits: int
    is_whole: bool
    channels: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    down_attends: tuple[bool, ...]
    up_attends: tuple[bool, ...]
    mid: str | None
    heads: tuple[int, ...]
    transformer_depths: tuple[int, ...]
    text_width: int
    uses_linear: bool
    is_stock: bool

    @staticmethod
    def of(unet: UNet2DConditionModel, is_whole: bool) -> Facts:
        """Of a UNet, which may be on the meta device."""
        config = unet.config
        levels = len(config["down_block_types"])

        def per_level(value: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
            return (value,) * levels if isinstance(value, int) else tuple(value)

        transformers = config.get("transformer_layers_per_block", 1)
        nested = not isinstance(transformers, int) and any(not isinstance(depth, int) for depth in transformers)
        return Facts(
            len(config.get("edits") or {}),
            is_whole,
            config["in_channels"],
            tuple(config["block_out_channels"]),
            per_level(config["layers_per_block"]),
            tuple(name.startswith(_CROSS) for name in config["down_block_types"]),
            tuple(name.startswith(_CROSS) for name in reversed(config["up_block_types"])),
            config.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
            per_level(config.get("num_attention_heads") or config["attention_head_dim"]),
            (0,) * levels if nested else per_level(transformers),
            config["cross_attention_dim"],
            bool(config.get("use_linear_projection")),
            type(unet) is UNet2DConditionModel,
        )

    @property
    def is_sd1(self) -> bool:
        """Whether text and heads are those of Stable Diffusion 1.x."""
        return self.text_width == SD1_TEXT and not self.uses_linear and set(self.heads) == {_SD1_HEADS}

    @property
    def is_sd2(self) -> bool:
        """Whether text and heads are those of Stable Diffusion 2.x."""
        wide = all(width == heads * _SD2_HEAD_WIDTH for width, heads in zip(self.widths, self.heads, strict=True))
        return self.text_width == SD2_TEXT and self.uses_linear and wide

    def has(self, multiples: tuple[int, ...], depth: int, attends: tuple[bool, ...], mid: str | None) -> bool:
        """Whether the UNet has these levels: widths as multiples of the first, layers, attention, mid block."""
        return (
            self.widths == tuple(m * self.widths[0] for m in multiples)
            and set(self.depths) == {depth}
            and self.down_attends == self.up_attends == attends
            and self.mid == mid
            and set(self.transformer_depths) == {1}
        )

    @property
    def is_full(self) -> bool:
        """Whether nothing is cut out of Stable Diffusion's UNet, whatever its width."""
        return self.has((1, 2, 4, 4), 2, (True, True, True, False), "UNetMidBlock2DCrossAttn")

    @property
    def is_tiny(self) -> bool:
        """Whether the UNet is built like BK-SDM-Tiny's."""
        return self.has((1, 2, 4), 1, (True, True, True), None)


@dataclass(frozen=True, slots=True)
class Need:
    """What a program needs, and what to say of a UNet that lacks it."""

    holds: Callable[[Facts], bool]
    why_not: str


@dataclass(frozen=True, slots=True)
class Program:
    """A program that reads a layout: what it needs, the first lacking need being the reason, what else to know of those
    UNets that it opens, and where that was read."""

    name: str
    layout: Layout
    needs: tuple[Need, ...]
    remarks: tuple[Need, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program opens a UNet in a layout: `why` is the reason where not, else what to know, if anything."""

    program: str
    opens: bool
    why: str


_NO_EDITS: Final = Need(lambda f: not f.edits, "its UNet has no place for convolutions in slots and other such edits")
_IS_WHOLE: Final = Need(
    lambda f: f.is_whole, "it takes whole checkpoints, with VAE and text encoder, and this is a UNet"
)
_IS_FAMILY: Final = Need(
    lambda f: f.is_sd1 or f.is_sd2,
    "it knows the text width and the attention heads of Stable Diffusion 1.x and 2.x only",
)
_IS_320: Final = Need(
    lambda f: f.widths[0] == _FULL_WIDTH, f"it knows UNets whose highest level has {_FULL_WIDTH} channels only"
)
_CHANNELS: Final = Need(
    lambda f: f.channels in (4, 9) or (f.channels == 8 and f.is_sd1),
    "it takes 4 channels, 9 for inpainting, and 8 for instruct-pix2pix of 1.x",
)

PROGRAMS: Final[tuple[Program, ...]] = (
    Program(
        "AUTOMATIC1111",
        "ldm",
        (
            _NO_EDITS,
            _IS_WHOLE,
            Need(
                lambda f: f.is_full and f.widths[0] == _FULL_WIDTH,
                "it builds the full UNet of Stable Diffusion 1.x or 2.x whatever a file holds, and this one is another",
            ),
            _IS_FAMILY,
            _CHANNELS,
        ),
        (),
        "AUTOMATIC1111/stable-diffusion-webui modules/sd_models_config.py at 0120be7",
    ),
    Program(
        "ComfyUI",
        "ldm",
        (
            _NO_EDITS,
            _IS_320,
            _IS_FAMILY,
            Need(
                lambda f: all(width % f.widths[0] == 0 for width in f.widths),
                "it takes widths for multiples of the highest level's",
            ),
            Need(lambda f: min(f.depths) > 0, "it reads a level's width off its encoder's layers, and one has none"),
            Need(lambda f: any(f.down_attends), "it reads the text's width off the encoder, which has no attention"),
            _CHANNELS,
        ),
        (
            Need(
                lambda f: not f.is_sd2 or f.channels != 4 or sum(f.depths) + len(f.depths) == 12,
                "it knows a 2.x model that predicts v by its twelfth decoder layer, which is not there: set it with "
                "ModelSamplingDiscrete; versions before October 2024 stop there",
            ),
            Need(lambda f: f.is_whole, "load it as a diffusion model, and VAE and text encoder beside it"),
        ),
        "comfyanonymous/ComfyUI comfy/model_detection.py at 006dd0a, comfy/supported_models.py",
    ),
    Program(
        "stable-diffusion.cpp",
        "ldm",
        (
            _NO_EDITS,
            _IS_WHOLE,
            Need(
                lambda f: not f.is_tiny,
                "it wants a BK-SDM-Tiny UNet under names with the gaps of what was taken out (--format sdcpp)",
            ),
            Need(
                lambda f: f.is_full,
                "it builds the full UNet, or BK-SDM-Tiny's where the mid block is missing, and this one is another",
            ),
            _IS_FAMILY,
            _CHANNELS,
        ),
        (),
        "leejet/stable-diffusion.cpp src/model/diffusion/unet.hpp at 122076b",
    ),
    Program("asdm-compress", "ldm", (_NO_EDITS, _IS_FAMILY), (), "tested here"),
    Program(
        "stable-diffusion.cpp",
        "sdcpp",
        (
            _NO_EDITS,
            _IS_WHOLE,
            Need(lambda f: f.is_tiny, "under these names it builds BK-SDM-Tiny's UNet, and this one is another"),
            _IS_FAMILY,
            Need(lambda f: f.channels == 4, "of such UNets it knows those with 4 channels only"),
        ),
        (),
        "leejet/stable-diffusion.cpp src/model/diffusion/unet.hpp at 122076b, docs/distilled_sd.md at 071bafc",
    ),
    Program(
        "diffusers",
        "folder",
        (
            Need(
                lambda f: f.is_stock, "it opens after `import asdm_compress`, or by the loader that the folder carries"
            ),
        ),
        (),
        "tested here",
    ),
    Program("diffusers with asdm-compress", "folder", (), (), "tested here"),
    Program("ONNX Runtime", "onnx", (), (), "tested here, at every export"),
)


def verdicts(unet: UNet2DConditionModel, layout: Layout, is_whole: bool) -> tuple[Verdict, ...]:
    """What the programs that read a layout make of a UNet in it, alone or in a whole checkpoint."""
    facts = Facts.of(unet, is_whole)
    found = []
    for program in PROGRAMS:
        if program.layout != layout:
            continue
        lacking = next((need.why_not for need in program.needs if not need.holds(facts)), None)
        remarks = "; ".join(remark.why_not for remark in program.remarks if not remark.holds(facts))
        found.append(Verdict(program.name, lacking is None, remarks if lacking is None else lacking))
    return tuple(found)
