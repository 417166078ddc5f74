"""The student class: a UNet that rebuilds its edits from its own `config.json`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.edits import Edit, apply_edits

InitT = TypeVar("InitT", bound=Callable[..., None])


def _with_base_parameters(init: InitT) -> InitT:
    """Expose the base class's parameters, from whose names diffusers decides which keys of a config it passes on."""
    base = inspect.signature(UNet2DConditionModel.__init__)
    edits = inspect.Parameter("edits", inspect.Parameter.KEYWORD_ONLY, default=None)
    init.__signature__ = base.replace(parameters=[*base.parameters.values(), edits])  # type: ignore[attr-defined]
    return init


class AssembledUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """A Stable Diffusion UNet with slots in the places of the modules that an assembly plan has taken out.

    `edits` maps unit and sub-unit paths to `drop` or `shortcut`; every other parameter is the base class's. Without
    edits the class is its base class. Saving and loading are diffusers' own, except that loading a folder whose weights
    do not fit the config raises AsdmError, where the base class would fill the gaps with random numbers.
    """

    # A saved pipeline names this as the class's library, and diffusers takes it from what has been imported: so
    # `import asdm_compress` is enough, and stays right wherever the class moves inside the package.
    __module__ = "asdm_compress"

    @register_to_config  # type: ignore[untyped-decorator]
    @_with_base_parameters
    def __init__(self, *args: Any, edits: Mapping[str, Edit] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        apply_edits(self, edits or {})

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the base class, but any missing, unexpected or mismatched weight raises AsdmError."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = {
            kind: [str(key) for key in info[kind]]
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        }
        if problems:
            kind, keys = next(iter(problems.items()))
            raise AsdmError(
                f"the weights in {args[0] if args else 'the folder'} do not fit its config.json: "
                f"{len(keys)} {kind.replace('_', ' ')}, the first is {keys[0]}",
                "The folder is damaged or was edited by hand; make it again with `asdm-compress apply`.",
            )
        return (model, info) if wants_info else model
