"""Silence around the libraries' own messages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the remarks and progress bars of diffusers and transformers, whose findings we check ourselves."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, had_bar) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if had_bar:
                library.enable_progress_bar()


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the remarks of torch's ONNX exporter on what it does without, and on torch's own old calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
