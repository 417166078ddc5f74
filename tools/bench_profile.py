"""How long `profile` takes at full size, and how much of the forward pass the sites explain.

python tools/bench_profile.py       # alone on the machine; writes tools/results/profile_sd.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from measuring import measured

MODELS = ("sd15", "sd21-base")


def main() -> None:
    """Profile each architecture with random weights in bf16."""
    with measured("profile_sd", __doc__) as bench:
        for model in MODELS:
            began = time.monotonic()
            command = ["profile", model, "--random-weights", "--dtype", "bf16", "--json"]
            run = subprocess.run(
                [sys.executable, "-m", "asdm_compress", *command], capture_output=True, text=True, check=True
            )
            printed = json.loads(run.stdout)
            profile = printed.get("profile", printed)
            row = {key: profile[key] for key in ("parameters", "macs", "macs_conv_linear", "latency", "explained")}
            bench.add({"command": " ".join(command), "seconds": round(time.monotonic() - began, 1), **row})


if __name__ == "__main__":
    main()
