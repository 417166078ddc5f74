"""Features inherited between sampling steps: by a rule at once, or by a schedule made for a budget of time."""

from pathlib import Path

import torch
from PIL.Image import Image

import asdm_compress
from asdm_compress.inheritance.schedule_file import save_schedule
from asdm_compress.workflows.calibrate import CalibrateSettings


def main(
    folder: Path, settings: CalibrateSettings | None = None, steps: int = 25, guidance: float = 5.0
) -> list[Image]:
    """The same image in full, by DeepCache's rule, and by a schedule for half of the time."""
    pipeline = asdm_compress.load_pipeline("mini-sd")

    def draw() -> Image:
        prompt = "a small red circle above a large blue square"
        noise = torch.Generator().manual_seed(0)
        found = pipeline(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=noise)
        image: Image = found.images[0]
        return image

    images = [draw()]
    with asdm_compress.inheriting(pipeline, "uniform:2,branch=0,forecast=hold"):
        images.append(draw())
    # For the sampler that the pipeline has, and for 25 steps at a guidance of 5 unless the settings say others.
    schedule = asdm_compress.calibrate(pipeline, "latency=0.5x", settings)
    save_schedule(schedule, folder / "inheritance.yaml")
    with asdm_compress.inheriting(pipeline, folder / "inheritance.yaml"):
        images.append(draw())
    return images


if __name__ == "__main__":
    main(Path())
