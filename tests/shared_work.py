"""What the tests of several processes share out; a script, too: `shared_work.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from asdm_compress.assembly.calibration import Effort, record
from asdm_compress.assembly.option_fit import measure_options
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.store import recorded
from asdm_compress.core.processes import ALONE, joined
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions

EDITS = {
    "mid_block": ["drop", "conv1x1"],
    "mid_block.resnets.0": ["conv1x1", "conv1x1*2@timestep"],
    "down_blocks.3.resnets.1": ["drop"],
    "up_blocks.1.attentions.1": ["drop"],
    "up_blocks.2.attentions.0.transformer_blocks.0.attn1": ["drop", "narrow0.5"],
    "down_blocks.2.attentions.0.transformer_blocks.0.ff": ["narrow0.25"],
    "up_blocks.0.upsamplers.0": ["subpixel"],
}
OPTIONS = [Option(site, edit, frozenset([site]), {}) for site, edits in EDITS.items() for edit in edits]


def work(folder, processes=ALONE):
    """Record and measure; the triples, the bands' weights and borders, the damages, and how many were counted."""
    pipeline = load_pipeline("mini-sd", LoadOptions())
    prompts = [c.text for c in sample_captions(18, 4)]
    settings, effort = SamplingSettings(steps=3, guidance=4.0), Effort(24, 2)
    calibration = recorded(
        folder / "triples.pt", lambda: record(pipeline, prompts, settings, 2, None, None, effort, processes), processes
    )
    counted = []
    damages = measure_options(
        pipeline.unet,
        OPTIONS,
        calibration,
        folder / "damages.jsonl",
        lambda done, total: counted.append(total),
        True,
        processes,
    )
    inputs = calibration.inputs
    triples = [inputs.samples, inputs.timesteps, inputs.texts, calibration.bands, calibration.prompts]
    weights = (calibration.band_weights, calibration.boundaries)
    return triples, weights, {n: (d.bands, d.total, d.sketch.tolist()) for n, d in damages.items()}, counted[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as processes:
        torch.save(work(Path(sys.argv[1]), processes), Path(sys.argv[1]) / f"found-{processes.rank}.pt")
