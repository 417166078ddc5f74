"""Edits by name: what a plan may do at a site, as it is written in recipes and configs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from asdm_compress.core.errors import AsdmError

Edit = str
DROP: Final[Edit] = "drop"
SHORTCUT: Final[Edit] = "shortcut"
SUBPIXEL: Final[Edit] = (
    "subpixel"  # an upsampler that convolves before it interpolates: the same function, rounding apart
)
SHARED: Final[Edit] = "shared"  # computed once for both guidance branches, before the text comes in
EXACT: Final = (SUBPIXEL, SHARED)  # the same function in less time; they bring no weights and leave names as they are

Routing = Literal["none", "timestep", "feature", "both"]
Mixing = Literal["softmax", "sigmoid"]

MOST_EXPERTS: Final = 1000  # one per timestep of training

_CONV_NAME: Final = re.compile(
    r"(?P<shape>conv|separable)(?P<kernel>1x1|3x3)(-rank(?P<rank>\d+))?"
    r"(\*(?P<experts>\d+)@(?P<routing>timestep|feature|both)(-(?P<mixing>sigmoid))?(-t(?P<temperature>\d+(\.\d+)?))?)?"
)
_NARROW_NAME: Final = re.compile(r"narrow(?P<share>0\.\d{1,4})")
EDIT_GRAMMAR: Final = (
    "drop, shortcut, subpixel, shared, narrow0.5, conv1x1, conv3x3, separable3x3, conv3x3-rank32, conv3x3*8@timestep"
)


@dataclass(frozen=True, slots=True)
class ConvSpec:
    """What convolution stands in a slot.

    `kernel` is 1 or 3. `separable` is a depthwise kernel followed by a 1 x 1; `rank` a kernel to that many channels
    followed by a 1 x 1. With one expert there is nothing to route. Raises AsdmError for what does not fit together.
    """

    kernel: int = 1
    separable: bool = False
    rank: int | None = None
    experts: int = 1
    routing: Routing = "none"
    mixing: Mixing = "softmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kernel not in (1, 3):
            raise AsdmError(f"a slot's kernel is 1 or 3, not {self.kernel!r}")
        if self.routing not in get_args(Routing) or self.mixing not in get_args(Mixing):
            raise AsdmError(
                f"unknown routing {self.routing!r} or mixing {self.mixing!r}",
                f"Routings: {', '.join(get_args(Routing))}; mixings: {', '.join(get_args(Mixing))}.",
            )
        if self.separable and (self.rank is not None or self.kernel == 1):
            raise AsdmError("a separable slot has a 3 x 3 kernel and no rank")
        if self.experts < 1 or (self.rank is not None and self.rank < 1) or not self.temperature > 0:
            raise AsdmError("experts and rank are at least 1, and the temperature is above 0")
        if self.experts > MOST_EXPERTS:
            raise AsdmError(f"{self.experts} experts are more than there are timesteps, {MOST_EXPERTS}")
        if (self.experts == 1) != (self.routing == "none"):
            raise AsdmError(f"{self.experts} experts and routing {self.routing!r} do not fit together")

    @property
    def name(self) -> Edit:
        """For example `conv3x3`, `separable3x3*8@timestep`."""
        name = f"{'separable' if self.separable else 'conv'}{self.kernel}x{self.kernel}"
        if self.rank is not None:
            name += f"-rank{self.rank}"
        if self.experts > 1:
            name += f"*{self.experts}@{self.routing}"
            name += "-sigmoid" if self.mixing == "sigmoid" else ""
            name += f"-t{self.temperature:g}" if self.temperature != 1 else ""
        return name

    @property
    def needs_timestep(self) -> bool:
        """Whether the routing looks at the timestep."""
        return self.routing in ("timestep", "both")


def conv_spec(edit: Edit) -> ConvSpec | None:
    """The convolution that an edit puts into its slot, or None for an edit that puts none there.

    Raises AsdmError for a name that is no edit.
    """
    if edit in (DROP, SHORTCUT, *EXACT) or kept_share(edit) is not None:
        return None
    match = _CONV_NAME.fullmatch(edit) if isinstance(edit, str) else None
    if match is None:
        raise AsdmError(f"unknown edit {edit!r}", f"Edits are written like {EDIT_GRAMMAR}.")
    rank, experts = match["rank"], match["experts"]
    return ConvSpec(
        kernel=int(match["kernel"][0]),
        separable=match["shape"] == "separable",
        rank=None if rank is None else int(rank),
        experts=1 if experts is None else int(experts),
        routing=match["routing"] or "none",  # type: ignore[arg-type]
        mixing="sigmoid" if match["mixing"] else "softmax",
        temperature=float(match["temperature"] or 1),
    )


def narrow(share: float) -> Edit:
    """The edit that leaves a share of a unit's or sub-unit's inner width, for example `narrow0.5`."""
    return f"narrow{share:g}"


def kept_share(edit: Edit) -> float | None:
    """The share of the inner width that an edit leaves, or None for one that is no narrowing."""
    match = _NARROW_NAME.fullmatch(edit) if isinstance(edit, str) else None
    share = float(match["share"]) if match else 0.0
    return share if share > 0 else None


def has_weights(edit: Edit) -> bool:
    """Whether an edit brings weights of its own, which are fitted: convolutions and narrowed modules."""
    return kept_share(edit) is not None or conv_spec(edit) is not None


def parse_shares(text: str) -> tuple[float, ...]:
    """Shares of an inner width from a list with commas, such as `0.75,0.5`, or from `none`.

    Raises AsdmError for what is no share between 0 and 1 with at most four digits.
    """
    if text.strip() == "none":
        return ()
    shares = []
    for word in text.split(","):
        share = kept_share(f"narrow{word.strip()}")
        if share is None:
            raise AsdmError(f"{word.strip()!r} is no share of a width", "For example 0.75,0.5, or none.")
        shares.append(share)
    return tuple(dict.fromkeys(shares))
