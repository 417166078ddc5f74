"""Plans for Stable Diffusion 1.x and 2.x, from light to heavy: each rung takes out what those above it do, and more.

No pre-trained weights were at hand, so that no damage could be measured. The order is that of others' findings on such
weights, and of what a part costs; how far down a latency budget leads is measured (`bench_recipes.py`), on weights that
may be random.

1. The second of two layers in the encoder and the second of three in the decoder: what BK-SDM takes out of every level
   (Kim et al., 2305.15798, its public code), whose students, distilled, keep most of the teacher's quality. Shallow
   levels first, as they hold about 1 % of the weights and 15 % of the compute. With both sides of a level cut the
   student is one that plain diffusers opens. At the highest resolution, where a layer takes a tenth of the time, a
   transformer goes first and its ResNet with the next rung, the decoder's before the encoder's, so that no budget is
   left half unspent.
2. Self-attention at the highest resolution: what self-attention in trained UNets does is local for the most part
   (2504.21292), and its cost grows with the square of the places.
3. The middle and the deepest level, which BK-SDM-Small and -Tiny do without. They save little time.
4. The transformers left at the highest resolution, where SDXL has none (2307.01952).

Upsamplers that convolve first (`subpixel`) compute the same function with 4 % fewer MACs and are no rung: in bf16 at
full size no gain was seen on a CPU (1.003 of the teacher's time, three turns beside other work), and a student with
them opens only beside this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from asdm_compress.core.edits import DROP

Rung = Mapping[str, str]
BUDGETS: Final = (0.9, 0.8, 0.7, 0.6, 0.5)
_HIGHEST: Final = ("up_blocks.3.attentions.2", "up_blocks.3.attentions.0", "down_blocks.0.attentions.0")
RUNGS: Final[Sequence[Rung]] = (
    *({f"{block}.{part}.1": DROP} for block in ("up_blocks.3", "down_blocks.0") for part in ("attentions", "layers")),
    *({f"up_blocks.{3 - level}.layers.1": DROP, f"down_blocks.{level}.layers.1": DROP} for level in (1, 2)),
    {"up_blocks.0.resnets.1": DROP, "down_blocks.3.resnets.1": DROP},
    *({f"{path}.transformer_blocks.0.attn1": DROP} for path in _HIGHEST),
    {"mid_block": DROP},
    {"levels.3": DROP},
    *({path: DROP} for path in _HIGHEST),
)
_LAYER: Final = ("resnets", "attentions")
_WITH_LEVEL_3: Final = ("down_blocks.3.", "up_blocks.0.", "mid_block")


def plan_of(rungs: int) -> dict[str, str]:
    """The edits of the first so many rungs. What a later one takes out as a whole is not named in parts."""
    plan: dict[str, str] = {}
    for rung in RUNGS[:rungs]:
        plan |= rung
    if "levels.3" in plan:
        plan = {path: edit for path, edit in plan.items() if not path.startswith(_WITH_LEVEL_3)}
    parts = {path.replace(".layers.", f".{part}.") for path in plan if ".layers." in path for part in _LAYER}
    whole = parts | plan.keys()
    return {
        path: edit
        for path, edit in plan.items()
        if path not in parts and not any(path.startswith(f"{w}.") for w in whole)
    }


def first_within(
    budgets: Sequence[float], guesses: Sequence[float], measured: Callable[[int], float]
) -> dict[float, int]:
    """For each budget the fewest rungs whose student is measured to keep it; budgets that none keeps are left out.

    `guesses` are what the ratios may be, of none, one, two, … rungs; every rung is taken to be faster than the one
    before it. `measured` is called for as few as the guesses are good; what one was off by the next are taken to be.
    """
    found: dict[float, int] = {}
    known: dict[int, float] = {0: 1.0}

    def ratio(rungs: int) -> float:
        if rungs not in known:
            known[rungs] = measured(rungs)
        return known[rungs]

    last, off = len(guesses) - 1, 1.0
    for budget in budgets:
        at = next((i for i, guess in enumerate(guesses) if guess * off <= budget), last)
        while at < last and ratio(at) > budget:
            at += 1
        while at > 0 and ratio(at - 1) <= budget:
            at -= 1
        off = ratio(at) / guesses[at]
        if ratio(at) <= budget:
            found[budget] = at
    return found
