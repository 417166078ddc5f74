"""A plan of your own on a pipeline, saved as a folder that opens like any other pipeline."""

from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL.Image import Image

import asdm_compress
from asdm_compress import AsdmError, Plan


def cut(teacher: StableDiffusionPipeline, edits: dict[str, str]) -> StableDiffusionPipeline:
    """A pipeline of the same parts around a student; the teacher is not touched."""
    student = asdm_compress.assemble(teacher.unet, Plan(edits))
    return StableDiffusionPipeline(**{**teacher.components, "unet": student}, requires_safety_checker=False)


def main(folder: Path, model: str = "mini-sd", steps: int = 25) -> Image:
    """Take the mid block and one self-attention out, save the student, open it again, and make an image."""
    teacher = asdm_compress.load_pipeline(model)
    attention = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    cut(teacher, {"mid_block": "drop", attention: "drop"}).save_pretrained(folder / "light")
    try:
        cut(teacher, {"conv_in": "drop"})
    except AsdmError as error:  # every mistake is one of these, and says what would do
        print(error.message)
    light = StableDiffusionPipeline.from_pretrained(folder / "light")  # after `import asdm_compress`
    image: Image = light("a small red circle", num_inference_steps=steps).images[0]
    return image


if __name__ == "__main__":
    main(Path()).save("light.png")
