"""What routing costs: a timestep-routed slot against a plain convolution of the same shape, in sampling runs.

    python tools/bench_experts.py       # alone on the machine; writes tools/results/experts.json

Every timestep of a 25-step run is met in turn, as a sampler meets them; the runs of the layers alternate. The first run
of a routed layer mixes its kernels, later ones find them kept. Between two steps the processor's caches are emptied,
not timed, as the rest of a UNet does between two calls of one of its layers.
"""

from __future__ import annotations

import time

import torch
from measuring import Bench, Turns, measured
from torch import Tensor

from asdm_compress.core.edits import ConvSpec
from asdm_compress.models.expert_conv import Moment, MultiExpertConv2d

EXPERTS, STEPS, RUNS = 8, 25, 9
# Channels and latent size of SD 1.5's levels; a batch of 2 is one image with guidance.
SHAPES = ((320, 64), (640, 32), (1280, 16), (1280, 8))
OTHER_WEIGHTS = 32 * 2**20  # numbers of 4 bytes that are touched between two steps; more than caches hold
ROUTINGS = ("timestep", "feature", "both")


@torch.no_grad()
def main() -> None:
    """Time every shape with every routing."""
    with measured("experts", __doc__) as bench:
        for channels, size in SHAPES:
            for kernel in (1, 3):
                _case(bench, channels, size, kernel)


def _case(bench: Bench, channels: int, size: int, kernel: int) -> None:
    images = torch.randn(2, channels, size, size)
    layers = {"none": _layer(channels, ConvSpec(kernel))}
    layers |= {r: _layer(channels, ConvSpec(kernel, experts=EXPERTS, routing=r)) for r in ROUTINGS}  # type: ignore[arg-type]
    _run(_layer(channels, ConvSpec(kernel)), images)  # what the first use of a shape costs belongs to no layer
    first = {name: _run(layer, images) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(RUNS):
        for name, layer in layers.items():
            times[name].append(_run(layer, images))
    turns = Turns(times)
    row: dict[str, object] = {"channels": channels, "size": size, "kernel": kernel, "experts": EXPERTS, "steps": STEPS}
    row["plain_ms"] = 1e3 * turns.median("none").value / STEPS
    for name in ROUTINGS:
        row[f"{name}_ratio"] = turns.ratio(name, "none")
        row[f"{name}_first_ratio"] = first[name] / first["none"]
    bench.add(row)


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
