"""Constructors of diffusers' model classes with parameters of our own beside theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

InitT = TypeVar("InitT", bound=Callable[..., None])


def own_config(model: Any, base: type[Any]) -> dict[str, Any]:
    """Of a model's config what its `base` class takes. Configs keep whatever else a file had, of which diffusers warns:
    training scripts write how they averaged into it."""
    known = inspect.signature(base.__init__).parameters
    return {key: value for key, value in model.config.items() if key in known}


def with_parameters_of(base: type[Any], *own: str) -> Callable[[InitT], InitT]:
    """Expose a base class's parameters, from whose names diffusers decides which keys of a config it passes on, and
    keyword parameters of one's own, which are None unless given."""

    def decorate(init: InitT) -> InitT:
        signature = inspect.signature(base.__init__)
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in own]
        init.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *added]
        )
        return init

    return decorate
