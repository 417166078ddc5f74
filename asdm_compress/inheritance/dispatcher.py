"""Stands in the place of one UNet's `forward`, and asks the run of this context, if there is one, for the prediction.

Who moves weights or changes inputs around a UNet's forward (accelerate's and diffusers' hooks) does so around this.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Protocol

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.call import UNetCall

Forward = Callable[..., Any]
_IN_PLACE: Final = "_compiled_call_impl"  # where `nn.Module.compile` puts what it has compiled


class Answering(Protocol):
    """Who answers the calls of one UNet while it is open."""

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet whose calls it answers."""
        ...

    def evaluate(self, call: UNetCall, before: Forward) -> Tensor:
        """The prediction; `before` is the UNet's own forward."""
        ...


_open: ContextVar[Answering | None] = ContextVar("inheritance_run", default=None)


@contextmanager
def answering(run: Answering) -> Iterator[None]:
    """Within the context, and in this thread, calls of the run's UNet are the run's."""
    token = _open.set(run)
    try:
        yield
    finally:
        _open.reset(token)


def _open_for(unet: UNet2DConditionModel) -> Answering | None:
    opened = _open.get()
    return opened if opened is not None and opened.unet is unet else None


class Dispatcher:
    """What stands in the place of a UNet's forward as long as anybody uses it."""

    def __init__(self, unet: UNet2DConditionModel, before: Forward) -> None:
        self.unet, self.before = unet, before
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        functools.update_wrapper(self, before, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `UNet2DConditionModel.forward`."""
        if torch.compiler.is_compiling():
            return self.before(*args, **kwargs)  # a whole UNet is compiled as what it is without runs
        opened = _open_for(self.unet)
        if opened is None:
            return self.before(*args, **kwargs)
        return _forward(self.unet, self.before, opened, *args, **kwargs)

    def __reduce__(self) -> Any:
        # Copies of the UNet have their own forward and no runs.
        return _itself, (self.before,)


class CompiledCall:
    """Stands in the place of what `unet.compile()` has made, for a run that compiles its own, smaller passes."""

    def __init__(self, unet: UNet2DConditionModel, before: Forward) -> None:
        self.unet, self.before = unet, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `UNet2DConditionModel.__call__`."""
        called = self.before if _open_for(self.unet) is None else self.unet._call_impl
        return called(*args, **kwargs)


def attach_to(unet: UNet2DConditionModel, user: object) -> None:
    """Let a UNet ask for runs as long as `user` has not left. Harmless when repeated.

    Raises AsdmError where something else than hooks has taken the place of its forward.
    """
    dispatcher = _find(unet)
    if dispatcher is None:
        own = [slot for slot in _slots(unet) if _is_own(unet, slot.get())]
        if not own:
            name = getattr(unet.forward, "__qualname__", repr(unet.forward))
            raise AsdmError(
                f"the UNet's forward has been replaced by {name}, which feature inheritance would leave out",
                "Disable what has replaced it first.",
            )
        dispatcher = Dispatcher(unet, own[0].get())
        own[0].put(dispatcher)
    dispatcher.users.add(user)
    compiled = unet.__dict__.get(_IN_PLACE)
    if compiled is not None and not isinstance(compiled, CompiledCall):
        setattr(unet, _IN_PLACE, CompiledCall(unet, compiled))


def leave(unet: UNet2DConditionModel, user: object) -> None:
    """Undo `attach_to`; the last user gives the UNet its own forward back."""
    dispatcher = _find(unet)
    if dispatcher is None:
        return
    dispatcher.users.discard(user)
    if dispatcher.users:
        return
    for slot in _slots(unet):
        if slot.get() is dispatcher:
            slot.put(dispatcher.before)
    if _is_own(unet, unet.__dict__.get("forward")):
        del unet.__dict__["forward"]
    compiled = unet.__dict__.get(_IN_PLACE)
    if isinstance(compiled, CompiledCall):
        setattr(unet, _IN_PLACE, compiled.before)


def compiled_in_place(unet: UNet2DConditionModel) -> Forward | None:
    """What `unet.compile()` has made, if it was called."""
    found = unet.__dict__.get(_IN_PLACE)
    return found.before if isinstance(found, CompiledCall) else found


class _Slot:
    """A place that holds a UNet's forward: an attribute of the UNet's instance or of a record of a hook around it."""

    def __init__(self, holder: Any, name: str) -> None:
        self.holder, self.name = holder, name

    def get(self) -> Any:
        return getattr(self.holder, self.name, None)

    def put(self, forward: Forward) -> None:
        setattr(self.holder, self.name, forward)


def _slots(unet: UNet2DConditionModel) -> Iterator[_Slot]:
    """All of them; the hooks' own wrappers are among what they hold."""
    registry = unet.__dict__.get("_diffusers_hook")
    for record in getattr(registry, "_fn_refs", ()):
        yield _Slot(record, "original_forward")
        yield _Slot(record, "forward")
    if "_old_forward" in unet.__dict__:  # accelerate's
        yield _Slot(unet, "_old_forward")
    yield _Slot(unet, "forward")


def _find(unet: UNet2DConditionModel) -> Dispatcher | None:
    held = (slot.get() for slot in _slots(unet))
    return next((found for found in held if isinstance(found, Dispatcher)), None)


def _is_own(unet: UNet2DConditionModel, forward: Any) -> bool:
    """Whether this is the forward of the UNet's class, bound to it."""
    own: type[Any] = type(unet)
    return getattr(forward, "__self__", None) is unet and getattr(forward, "__func__", None) is own.forward


@apply_lora_scale("cross_attention_kwargs")  # type: ignore[untyped-decorator]
def _forward(
    unet: UNet2DConditionModel,
    before: Forward,
    opened: Answering,
    *args: Any,
    return_dict: bool = True,
    **kwargs: Any,
) -> Any:
    """The run's answer in the form of diffusers' own; adapters are scaled meanwhile as diffusers does it."""
    prediction = opened.evaluate(UNetCall.of(*args, **kwargs), before)
    return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def _itself(forward: Forward) -> Forward:
    return forward
