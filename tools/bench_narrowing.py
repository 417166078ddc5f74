"""Which structures a narrowed module should keep: by size, by Taylor importance, or by reconstruction of what follows.

    python tools/bench_narrowing.py     # writes tools/results/narrowing.json

Every module of `mini-sd` that can be narrowed to half is, alone, with its next projection refitted in all three cases,
and without any refit as torch-pruning would leave it; damages on prompts that nothing was fitted on.
"""

from __future__ import annotations

from math import exp, log
from statistics import fmean

import torch
from measuring import Bench, measured
from mini_sd.weights import bundled_weights

from asdm_compress.assembly.calibration import record
from asdm_compress.assembly.damage import chunks_of, measure_plan
from asdm_compress.assembly.narrowing import InnerSums, collecting, narrowed_state, taylor_importance
from asdm_compress.assembly.plan import Plan
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.models.walk import finish, start, steps_of
from asdm_compress.models.widths import Inner, inner_widths
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions

SHARE, EDIT = 0.5, "narrow0.5"
SEEN, UNSEEN = 64, 24


def main() -> None:
    """Nothing is timed: other work on the machine does not matter."""
    with measured("narrowing", __doc__, alone=False) as bench:
        measure(bench)


@torch.no_grad()
def measure(bench: Bench) -> None:
    """Narrow every module in every way."""
    pipeline = load_pipeline("mini-sd", LoadOptions())
    pipeline.set_progress_bar_config(disable=True)
    unet = pipeline.unet
    settings = SamplingSettings()
    calibration = record(pipeline, [c.text for c in sample_captions(SEEN, 1, held_out=False)], settings).thinned(192)
    unseen = record(
        pipeline, [c.text for c in sample_captions(UNSEEN, 6_161)], SamplingSettings(seed=60_000),
        band_weights=calibration.band_weights,
    ).thinned(48)  # fmt: skip
    inner = {path: i for path, i in inner_widths(unet).items() if i.can_narrow(SHARE)}
    steps = steps_of(unet)
    sums = {path: InnerSums.empty(i, unet.device) for path, i in inner.items()}
    for first, last in chunks_of(calibration):
        with collecting(unet, sums, calibration, first):
            finish(steps, start(unet, *calibration.part(first, last).rows()))
    taylor = taylor_importance(unet, list(inner), calibration)
    for path, here in inner.items():
        module = unet.get_submodule(path)
        choices = {"size": _size(module, here), "taylor": taylor[path], "reconstruction": None}
        damages = {"size, not refitted": measure_plan(unet, Plan({path: EDIT}), unseen).total}
        for name, importance in choices.items():
            weights = {path: narrowed_state(module, SHARE, sums[path], importance)}
            damages[name] = measure_plan(unet, Plan({path: EDIT}), unseen, weights).total
        bench.add({"site": path, **damages})
    rows = bench.rows
    names = [name for name in rows[0] if name != "site"]
    summary = {name: exp(fmean(log(row[name]) for row in rows)) for name in names}
    best = {name: sum(row[name] == min(row[n] for n in names) for row in rows) for name in names}
    print(summary, best)
    bench.facts |= {"share": SHARE, "prompts": SEEN, "unseen_prompts": UNSEEN}
    bench.facts |= {"geometric_mean": summary, "best_at": best, "mini_sd": bundled_weights()}


def _size(module: torch.nn.Module, inner: Inner) -> torch.Tensor:
    """The squared norm of the projection's weights for each structure."""
    weight = module.get_submodule(inner.projection).weight
    assert isinstance(weight, torch.Tensor)
    rows = weight.detach().double().transpose(0, 1).flatten(1).square().sum(1)
    return rows.reshape(inner.count, inner.size).sum(1)


if __name__ == "__main__":
    main()
