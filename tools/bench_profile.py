"""How long `profile` takes at full size, and how much of the forward pass the sites explain.

python tools/bench_profile.py       # alone on the machine; writes tools/results/profile_sd.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from asdm_compress.core.provenance import processor_name, versions

RESULTS = Path(__file__).parent / "results" / "profile_sd.json"
MODELS = ("sd15", "sd21-base")


def main() -> None:
    """Profile each architecture with random weights in bf16."""
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        began = time.monotonic()
        command = ["profile", model, "--random-weights", "--dtype", "bf16", "--json"]
        run = subprocess.run(
            [sys.executable, "-m", "asdm_compress", *command], capture_output=True, text=True, check=True
        )
        printed = json.loads(run.stdout)
        profile = printed.get("profile", printed)
        row = {key: profile[key] for key in ("parameters", "macs", "macs_conv_linear", "latency", "explained")}
        rows.append({"command": " ".join(command), "seconds": round(time.monotonic() - began, 1), **row})
        print(json.dumps(rows[-1]), flush=True)
    content = {"device": processor_name(), "versions": versions(), "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
