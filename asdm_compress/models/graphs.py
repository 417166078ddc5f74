"""Whether a graph is being made of what runs: by the compiler, by a trace, or by CUDA."""

from __future__ import annotations

import torch


def in_a_graph(device: torch.device) -> bool:
    """Whether what runs is recorded, so that its way must not hang on the numbers that there are now."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
