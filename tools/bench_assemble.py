"""The main job on the bundled model, as a new user runs it: costs, damages and quality, predicted and measured.

    python tools/bench_assemble.py      # alone on the machine

Writes tools/results/assemble_mini_sd.json, and the recipe and the picture of the 0.7x run that the README shows. Other
budgets can be asked for; `tools/bench_assembly.py` compares plans at all of them with those of others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import check_alone

from asdm_compress.core.provenance import processor_name, versions

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parents[1] / "recipes"
SHOWN = 0.7


def main() -> None:
    """Run the command line once per budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a folder for measurements that stays; otherwise none is kept")
    parser.add_argument("--budgets", type=float, nargs="+", default=[SHOWN])
    arguments = parser.parse_args()
    check_alone()
    rows: list[dict[str, Any]] = []
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for share in arguments.budgets:
            out = Path(folder) / f"student-{share}"
            began = time.monotonic()
            result = subprocess.run(
                [
                    *(sys.executable, "-m", "asdm_compress", "assemble", "mini-sd", "--json"),
                    *("--budget", f"latency={share}x", "--out", str(out)),
                ],
                env={**os.environ, "ASDM_COMPRESS_CACHE": str(arguments.cache or folder)},
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.monotonic() - began
            printed = json.loads(result.stdout)
            if result.returncode:
                rows.append({"budget": share, "seconds": seconds, **printed})
                continue
            recipe = printed["recipe"]
            rows.append(
                {
                    "budget": share,
                    "seconds": round(seconds, 1),
                    "stock": printed["stock"],
                    "quality": printed["quality"],
                    "edits": recipe["edits"],
                    "evidence": recipe["evidence"],
                }
            )
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "edits"}), flush=True)
            if share == SHOWN:
                shutil.copy(out / "grid.png", RESULTS / "readme_grid.png")
                shutil.copy(out / "recipe.yaml", RECIPES / f"mini-sd-latency-{share}x.yaml")
    content = {"command": "assemble mini-sd --budget latency=<budget>x", "device": processor_name(), "rows": rows}
    text = json.dumps({**content, "versions": versions()}, indent=1)
    (RESULTS / "assemble_mini_sd.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
