"""How good the bundled model is: the reader, the VAE's floor, prompt accuracy and Fréchet distance, all held out.

python tools/bench_mini_sd.py            # about ten minutes on two cores; writes tools/results/mini_sd.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from measuring import Bench, measured
from mini_sd.reader import degrade
from mini_sd.weights import bundled_weights

from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import to_tensor
from asdm_compress.evaluation.quality import accuracy_by_count, scene_features
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import Caption, caption_of
from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scenes.world import Scene, sample_scene

TEST_SEED = 77
GUIDANCE_SEED = 78  # the guidance scale is chosen on other captions than those that are reported


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100, help="held-out captions per number of objects")
    parser.add_argument("--guidances", type=float, nargs="+", default=[2.0, 3.0, 4.5, 6.0, 8.0])
    arguments = parser.parse_args()
    # Nothing is timed: other work on the machine does not matter.
    with measured("mini_sd", __doc__, alone=False) as bench:
        measure(bench, arguments)


def measure(bench: Bench, arguments: argparse.Namespace) -> None:
    """What the reader reads, and what the model draws."""
    pipeline, reader = load_pipeline("mini-sd", LoadOptions()), load_reader()
    scenes, captions = _scenes(TEST_SEED, arguments.captions)
    drawn = draw_scenes(scenes)
    with torch.no_grad():
        decoded = [_reconstruct(pipeline.vae, part) for part in drawn.split(50)]
    reconstructed = torch.cat(decoded)
    rng = np.random.default_rng(TEST_SEED)
    degraded = torch.cat([degrade(part, rng) for part in drawn.split(20)])
    bench.facts |= {
        "mini_sd": bundled_weights(),
        "captions_per_object_count": arguments.captions,
        "reader_accuracy": {
            "rendered": _accuracy(reader.accuracy(drawn, captions), captions),
            "blur_and_noise": _accuracy(reader.accuracy(degraded, captions), captions),
            "vae_reconstructions": _accuracy(reader.accuracy(reconstructed, captions), captions),
        },
        "vae_psnr_db": float(-10 * torch.log10((reconstructed - drawn).square().mean())),
    }
    _, tuning = _scenes(GUIDANCE_SEED, max(8, arguments.captions // 4))
    by_scale: dict[str, float] = {}
    for scale in arguments.guidances:
        images = _images(pipeline, tuning, scale, seed=500_000)
        by_scale[f"{scale:g}"] = float(np.mean(reader.accuracy(images, tuning)))
        print(f"guidance {scale:g}: {by_scale[f'{scale:g}']:.3f}", flush=True)
    best = max(by_scale, key=lambda k: by_scale[k])
    images = _images(pipeline, captions, float(best), seed=900_000)
    flags = reader.accuracy(images, captions)
    real, floor = scene_features(drawn), scene_features(reconstructed)
    bench.facts |= {
        "guidance_accuracy": by_scale,
        "guidance": float(best),
        "sampler": "DPMSolverMultistepScheduler, 25 steps",
        "prompt_accuracy": _accuracy(flags, captions),
        "frechet_distance": {
            "samples_to_rendered": frechet_distance(scene_features(images), real),
            "vae_reconstructions_to_rendered": frechet_distance(floor, real),
        },
    }
    print(json.dumps(bench.facts, indent=1))


def _scenes(seed: int, count: int) -> tuple[list[Scene], list[Caption]]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, objects, held_out=True) for objects in (1, 2, 3) for _ in range(count)]
    return scenes, [caption_of(scene, rng, complete=True) for scene in scenes]


def _images(pipeline: object, captions: list[Caption], guidance: float, seed: int) -> torch.Tensor:
    samples = sample(pipeline, [c.text for c in captions], SamplingSettings(25, guidance, seed), batch=50)
    return to_tensor(samples.images)


def _reconstruct(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def _accuracy(flags: list[bool], captions: list[Caption]) -> dict[str, float]:
    by_count = accuracy_by_count(flags, [len(c.objects) for c in captions])
    return {"all": float(np.mean(flags)), **{f"{n} objects": share for n, share in by_count.items()}}


if __name__ == "__main__":
    main()
