"""What routing costs: a timestep-routed slot against a plain convolution of the same shape, in sampling runs.

    python tools/bench_experts.py       # alone on the machine; writes tools/results/experts.json

Every timestep of a 25-step run is met in turn, as a sampler meets them; the runs of the layers alternate. The first run
of a routed layer mixes its kernels, later ones find them kept. Between two steps the processor's caches are emptied,
not timed, as the rest of a UNet does between two calls of one of its layers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from asdm_compress.core.edits import ConvSpec
from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.models.expert_conv import Moment, MultiExpertConv2d

RESULTS = Path(__file__).parent / "results" / "experts.json"
EXPERTS, STEPS, RUNS = 8, 25, 9
# Channels and latent size of SD 1.5's levels; a batch of 2 is one image with guidance.
SHAPES = ((320, 64), (640, 32), (1280, 16), (1280, 8))
OTHER_WEIGHTS = 32 * 2**20  # numbers of 4 bytes that are touched between two steps; more than caches hold
ROUTINGS = ("timestep", "feature", "both")


@torch.no_grad()
def main() -> None:
    """Time every shape with every routing."""
    rows: list[dict[str, Any]] = []
    for channels, size in SHAPES:
        for kernel in (1, 3):
            images = torch.randn(2, channels, size, size)
            layers = {"none": _layer(channels, ConvSpec(kernel))}
            layers |= {r: _layer(channels, ConvSpec(kernel, experts=EXPERTS, routing=r)) for r in ROUTINGS}  # type: ignore[arg-type]
            _run(_layer(channels, ConvSpec(kernel)), images)  # what the first use of a shape costs belongs to no layer
            first = {name: _run(layer, images) for name, layer in layers.items()}
            times: dict[str, list[float]] = {name: [] for name in layers}
            for _ in range(RUNS):
                for name, layer in layers.items():
                    times[name].append(_run(layer, images))
            row = {
                "channels": channels,
                "size": size,
                "kernel": kernel,
                "plain_ms": 1e3 * median(times["none"]) / STEPS,
            }
            for name in ROUTINGS:
                ratios = [a / b for a, b in zip(times[name], times["none"], strict=True)]
                row |= {
                    f"{name}_ratio": round(median(ratios), 4),
                    f"{name}_first_ratio": round(first[name] / first["none"], 4),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    content = {"experts": EXPERTS, "steps": STEPS, "device": processor_name(), "versions": versions(), "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _layer(channels: int, spec: ConvSpec) -> MultiExpertConv2d:
    layer = MultiExpertConv2d(channels, channels, spec)
    for parameter in layer.weights:
        torch.nn.init.normal_(parameter, std=channels**-0.5 / spec.kernel)
    return layer


def _run(layer: MultiExpertConv2d, images: Tensor) -> float:
    """Seconds for one sampling run's timesteps."""
    seconds, others = 0.0, torch.zeros(OTHER_WEIGHTS)
    for timestep in torch.linspace(999, 0, STEPS).round():
        others += 1
        began = time.perf_counter()
        layer(images, Moment.of(timestep, len(images), images.device))
        seconds += time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    main()
