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
from typing import Any, Final

from measuring import measured
from mini_sd.weights import bundled_weights

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parents[1] / "recipes"
SHOWN = 0.7
SOURCES: Final = """\
# The plan that `asdm-compress assemble mini-sd --budget latency={share}x` came to (tools/bench_assemble.py; its figures
# stand in tools/results/assemble_mini_sd.json too): searched, timed and measured on the machine that is named below.
# Wherever it is applied, weights are fitted anew; on another checkpoint of the architecture nothing here says how well.
"""


def main() -> None:
    """Run the command line once per budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a folder for measurements that stays; otherwise none is kept")
    parser.add_argument("--budgets", type=float, nargs="+", default=[SHOWN])
    arguments = parser.parse_args()
    with measured("assemble_mini_sd", __doc__) as bench, tempfile.TemporaryDirectory() as folder:
        bench.facts |= {"asked": "assemble mini-sd --budget latency=<budget>x", "mini_sd": bundled_weights()}
        for share in arguments.budgets:
            out = Path(folder) / f"student-{share}"
            bench.add(main_job(share, out, arguments.cache or Path(folder)))
            if share == SHOWN and out.is_dir():
                shutil.copy(out / "grid.png", RESULTS / "readme_grid.png")
                written = (out / "recipe.yaml").read_text(encoding="utf-8")
                shipped = RECIPES / f"mini-sd-latency-{share}x.yaml"
                shipped.write_text(SOURCES.format(share=share) + written, encoding="utf-8")


def main_job(share: float, out: Path, cache: Path) -> dict[str, Any]:
    """The command line's run for one budget, as a row."""
    began = time.monotonic()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "asdm_compress", "assemble", "mini-sd", "--json"),
            *("--budget", f"latency={share}x", "--out", str(out)),
        ],
        env={**os.environ, "ASDM_COMPRESS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    row = {"budget": share, "seconds": round(time.monotonic() - began, 1)}
    printed = json.loads(result.stdout)
    if result.returncode:
        return {**row, **printed}
    recipe = printed["recipe"]
    kept = {name: printed[name] for name in ("stock", "quality")}
    return {**row, **kept, "edits": recipe["edits"], "evidence": recipe["evidence"]}


if __name__ == "__main__":
    main()
