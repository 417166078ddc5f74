"""UNets that have several members, of which every step runs one: what runs have to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.timeline import Timeline


@runtime_checkable
class HasMembers(Protocol):
    """A UNet with members; the first of them is the UNet's own body."""

    @property
    def member_names(self) -> tuple[str, ...]:
        """The members' names, that of the body first."""
        ...

    def member(self, name: str) -> UNet2DConditionModel:
        """Another member than the body."""
        ...

    def body_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the body, whatever step it is."""
        ...

    def actions_at(self, timeline: Timeline) -> tuple[Action, ...]:
        """What the UNet's own schedule does at each of these evaluations."""
        ...


def member_name(unet: object, name: str | None) -> str | None:
    """A member's name, None for the body; raises AsdmError for one that the UNet does not have."""
    if name is None:
        return None
    names = unet.member_names if isinstance(unet, HasMembers) else ()
    if name not in names:
        have = f"It has {', '.join(names)}." if names else "It is no switched UNet (see `asdm-compress switch`)."
        raise AsdmError(f"this UNet has no member {name!r}", have)
    return None if name == names[0] else name


def member_of(unet: UNet2DConditionModel, name: str | None) -> UNet2DConditionModel:
    """The UNet of a member, for the body the one that has it."""
    found = member_name(unet, name)
    if found is None:
        return unet
    assert isinstance(unet, HasMembers)
    return unet.member(found)


def with_own_members(unet: object, actions: Sequence[Action], timeline: Timeline, start: int) -> tuple[Action, ...]:
    """The actions of a run from evaluation `start` on, with the members and skipped steps of the UNet's own schedule.

    A step is skipped where either says so. Actions that name members themselves stay as they are.
    """
    if not isinstance(unet, HasMembers) or any(action.member is not None for action in actions):
        return tuple(actions)
    own = unet.actions_at(timeline)[start:]
    return tuple(
        action if action.skips else Action(action.inherits, action.guidance, mine.member) if mine.is_whole else mine
        for action, mine in zip(actions, own, strict=True)
    )


def body_prediction(unet: HasMembers, arguments: dict[str, Any]) -> Tensor:
    """The body's prediction (B, C, H, W)."""
    return unet.body_forward(**arguments, return_dict=False)[0]  # type: ignore[no-any-return]
