"""What computing once what both guidance branches have in common saves (`shared`), at every model's own size.

    python tools/bench_shared.py        # alone on the machine; writes tools/results/shared.json

The UNet with every `shared` edit that it can have against itself, a pass for one image with guidance, taken in turns;
of the time what the processors spent on it. Random weights at full size: time does not depend on them.
"""

from __future__ import annotations

import torch
from measuring import in_turns, measured

from asdm_compress.models.edits import edited_copy, legal_edits
from asdm_compress.models.loading import load_unet
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.counting import count_macs
from asdm_compress.profiling.profile import ProfileSettings, forward_pass

# Model, precision, and text tokens.
MODELS = (("mini-sd", torch.float32, 40), ("sd15", torch.bfloat16, 77), ("sd21", torch.bfloat16, 77))
REPEATS = 15


def main() -> None:
    """Time every model."""
    with measured("shared", __doc__) as bench:
        for name, dtype, tokens in MODELS:
            if name == "mini-sd":
                unet = load_unet(name, LoadOptions(dtype))
            else:
                unet = load_unet(name, LoadOptions(dtype, random_weights=True))
            places = [path for path, edits in legal_edits(unet).items() if "shared" in edits]
            twin = edited_copy(unet, dict.fromkeys(places, "shared"))
            settings = ProfileSettings(text_tokens=tokens, channels_last=dtype == torch.bfloat16)
            passes = {"shared": forward_pass(twin, settings), "plain": forward_pass(unet, settings)}
            turns = in_turns(passes, REPEATS, processor_time=True)
            size = int(unet.config["sample_size"])
            macs = [count_macs(model, 2, size, size, tokens)[""].total for model in (twin, unet)]
            bench.add(
                {
                    "model": name, "dtype": str(dtype).removeprefix("torch."), "pixels": 8 * size, "places": places,
                    "macs_ratio": macs[0] / macs[1], "processor_seconds": turns.median("plain"),
                    "latency_ratio": turns.ratio("shared", "plain"),
                }
            )  # fmt: skip
            del unet, twin, turns


if __name__ == "__main__":
    main()
