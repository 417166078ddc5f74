"""Puts runs under a diffusers pipeline: enable, disable, or a context manager around both.

An enabled pipeline becomes an instance of a subclass of its own class whose call opens a run and closes it again,
whatever happens; its UNet's instance gets a forward that asks for the run. So a run belongs to one call of one pipeline
in one thread. Other pipelines on the same UNet find no run and get the plain forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from diffusers import DiffusionPipeline

from asdm_compress.inheritance.attachment import Attachment
from asdm_compress.inheritance.dispatcher import answering
from asdm_compress.inheritance.open_run import OpenRun
from asdm_compress.inheritance.schedule import Rule
from asdm_compress.inheritance.schedule_file import read_rule

_ATTACHED: Final = "_asdm_inheritance"


def enable(
    pipeline: DiffusionPipeline,
    rule: Rule | str | Path,
    compile_options: Mapping[str, Any] | None = None,
) -> None:
    """Let a pipeline inherit features by a rule, until `disable`.

    `rule` is a mode or its written form (`uniform:3`), a schedule, or the path of an `inheritance.yaml`. A pipeline
    that is enabled already changes its rule. A compiled UNet stays compiled, by `torch.compile(unet)` or
    `unet.compile()`: its passes become a few static graphs, of which every step chooses one; `compile_options` are
    those of `torch.compile` for them. Raises AsdmError for a pipeline whose UNet is not of the Stable Diffusion kind,
    and for a rule that cannot be read or does not fit it.
    """
    followed = read_rule(rule)
    before = _detach(pipeline)
    try:
        attachment = Attachment(pipeline, followed, compile_options)
    except BaseException:
        _attach(pipeline, before)
        raise
    _attach(pipeline, attachment)


def disable(pipeline: DiffusionPipeline) -> None:
    """Undo `enable`; a pipeline that is not enabled stays as it is."""
    _detach(pipeline)


def _detach(pipeline: DiffusionPipeline) -> Attachment | None:
    """What the pipeline carried, if it was enabled."""
    attachment: Attachment | None = pipeline.__dict__.get(_ATTACHED)
    if attachment is not None:
        pipeline.__class__ = type(pipeline).__mro__[1]
        delattr(pipeline, _ATTACHED)
        attachment.uninstall(pipeline)
    return attachment


def _attach(pipeline: DiffusionPipeline, attachment: Attachment | None) -> None:
    if attachment is not None:
        attachment.install(pipeline)
        setattr(pipeline, _ATTACHED, attachment)
        pipeline.__class__ = _inheriting(type(pipeline))


@contextmanager
def inheriting(
    pipeline: DiffusionPipeline, rule: Rule | str | Path, compile_options: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Within the context the pipeline inherits features by a rule, and behind it by that of before, if any; see
    `enable`."""
    before: Attachment | None = pipeline.__dict__.get(_ATTACHED)
    enable(pipeline, rule, compile_options)
    try:
        yield
    finally:
        disable(pipeline)
        _attach(pipeline, before)


def _inheriting(base: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A subclass whose calls are runs; it has its base's name, which diffusers writes into `model_index.json`."""

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment: Attachment | None = self.__dict__.get(_ATTACHED)
        if attachment is None:  # a pipeline that somebody has made anew of this one's class and components
            return base.__call__(self, *args, **kwargs)
        attachment.follow(self)
        run = OpenRun(self, attachment)
        try:
            with answering(run):
                return base.__call__(self, *args, **kwargs)
        finally:
            run.close()

    names = {
        "__call__": call,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), names)
