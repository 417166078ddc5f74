"""`apply` at full size: peak memory and time beside those of copying the same bytes.

    python tools/bench_apply.py     # writes tools/results/apply.json

Full-size pipelines with random weights are made in a temporary folder. Peak and seconds are those of the whole
process; what starting it takes of both, with everything that it imports, is measured by itself and given beside them.
The promise is a peak of 1.25 times the student's bytes and the largest block's at most.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from make_fixtures import make
from measuring import Bench, measured

from asdm_compress.models.streaming import reading

CASES = (("sd15", "bk-sdm-base-v1"), ("sd15", "bk-sdm-tiny-v1"), ("sd21-base", "bk-sdm-base-v2"))
# What the command does before it looks at any file.
START = """
from asdm_compress.cli.options import load_options
load_options("cpu", "auto", None)
import asdm_compress.workflows.apply
"""
# Runs the command in a child of a small process, whose peak is then the command's alone.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=2)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def main() -> None:
    """Alone on the machine."""
    with measured("apply", __doc__) as bench:
        apply_all(bench)


def apply_all(bench: Bench) -> None:
    """Apply recipes to every family."""
    with tempfile.TemporaryDirectory() as folder:
        start, idle = taken([sys.executable, "-c", START])
        bench.facts |= {"dtype": "fp16", "start_gb": round(idle / 1e9, 3), "start_seconds": round(start, 1)}
        for family in dict.fromkeys(family for family, _ in CASES):
            source = Path(folder) / family
            make(family, source, torch.float16)
            for recipe in (recipe for other, recipe in CASES if other == family):
                out = Path(folder) / "student"
                command = ["-m", "asdm_compress", "apply", recipe, str(source), "--out", str(out)]
                seconds, peak = taken([sys.executable, *command])
                size = _size(out)
                began = time.perf_counter()
                shutil.copytree(out, Path(folder) / "copy")
                os.sync()
                copied = time.perf_counter() - began
                block = largest_block(source / "unet")
                bound = 1.25 * size + block
                bench.add(
                    {
                        "model": family,
                        "recipe": recipe,
                        "student_gb": round(size / 1e9, 3),
                        "peak_gb": round(peak / 1e9, 3),
                        "peak_beside_imports_gb": round((peak - idle) / 1e9, 3),
                        "peak_over_student": round(peak / size, 3),
                        "largest_block_gb": round(block / 1e9, 3),
                        "bound_gb": round(bound / 1e9, 3),
                        "peak_over_bound": round(peak / bound, 3),
                        "seconds": round(seconds, 1),
                        "seconds_beside_start": round(seconds - start, 1),
                        "copy_seconds": round(copied, 1),
                        "seconds_over_copy": round(seconds / copied, 2),
                        "beside_start_over_copy": round((seconds - start) / copied, 2),
                    }
                )
                shutil.rmtree(out)
                shutil.rmtree(Path(folder) / "copy")
            shutil.rmtree(source)


def largest_block(folder: Path) -> int:
    """The bytes of the UNet's largest resolution level or middle, in the precision of its files."""
    blocks: dict[str, int] = {}
    with reading(folder) as reader:
        for name in reader.names():
            kind, number, *_ = name.split(".")
            block = f"{kind}.{number}" if kind in ("down_blocks", "up_blocks") else kind
            blocks[block] = blocks.get(block, 0) + reader.get(name).nbytes
    return max(blocks.values())


def taken(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    os.sync()  # what others have written is not this command's to wait for
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", MEASURED, *command], stdout=subprocess.PIPE, text=True, check=True)
    os.sync()
    return time.perf_counter() - began, 1024 * int(result.stdout)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
