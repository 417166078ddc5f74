"""What the parts of a UNet cost, and what is left of a profile on disk."""

from pathlib import Path

import asdm_compress
from asdm_compress import Profile, ProfileSettings


def slowest_units(profile: Profile, count: int = 5) -> list[str]:
    """The units (ResNets, transformers, samplers) that take most of a pass, the slowest first."""
    units = [site for site in profile.sites if site.level == "unit"]
    units.sort(key=lambda site: site.latency, reverse=True)
    return [f"{site.path}: {1000 * site.latency:.2f} ms, {site.macs / 1e6:.0f} M MACs" for site in units[:count]]


def main(folder: Path, model: str = "mini-sd") -> Profile:
    """Profile a model, name its slowest units, and keep the profile."""
    pipeline = asdm_compress.load_pipeline(model)  # or a StableDiffusionPipeline of your own
    profile = asdm_compress.profile(pipeline.unet, ProfileSettings(batch=2, repeats=5), model)
    print(*slowest_units(profile), sep="\n")
    profile.save(folder / "profile.json")
    return asdm_compress.load_profile(folder / "profile.json")


if __name__ == "__main__":
    main(Path())
