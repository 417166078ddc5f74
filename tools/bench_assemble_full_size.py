"""The main job at full size: `assemble` on Stable Diffusion 1.5 with random bf16 weights and 16 calibration triples.

    python tools/bench_assemble_full_size.py                        # alone on the machine
    python tools/bench_assemble_full_size.py --kill-after 600       # killed then, and started again
    python tools/bench_assemble_full_size.py --folder ~/full-size   # if it is interrupted, the same again goes on
    python tools/bench_assemble_full_size.py --folder ~/full-size --stop-after 999   # killed then, to be gone on with

Damages of random weights mean nothing: this is about time and memory, and that what a killed run has measured is not
measured again. Writes tools/results/assemble_full_size.json, or with --kill-after assemble_full_size_resumed.json. Runs
that were killed are in it, each with its seconds and the damages that it left, and in the sum of seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
import yaml
from make_fixtures import DTYPES, make
from measuring import Bench, check_alone

KILLED = "killed.json"
# Guidance off: a triple is one pass of the UNet. Parts down to units, and none of what is fitted: at full size the
# normal equations of 3x3 convolutions alone take longer than all of this. And no neighbours of the best plan, which are
# tried for as long as one wants. Channels-last, in which a processor's bf16 convolutions take a fifth less.
ARGUMENTS = (
    "--budget latency=0.7x --guidance 1 --batch 1 --steps 4 --bands 4 --calibration-prompts 4 --calibration-triples 16 "
    "--probes 1 --held-out-prompts 1 --channels-last --finest unit --slot none --narrow none --refit none "
    "--neighbours 0 --repeats 2"
)


def main() -> None:
    """Make the pipeline, run the command, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--arguments", default=ARGUMENTS)
    parser.add_argument("--kill-after", type=float, help="seconds until a first run is killed")
    parser.add_argument("--stop-after", type=float, help="the same, and the bench ends; needs --folder")
    parser.add_argument("--width", type=int, default=320, help="the UNet's on its highest level; fewer try this out")
    parser.add_argument("--folder", type=Path, help="where model and measurements stay; else in a temporary one")
    asked = parser.parse_args()
    if asked.stop_after and asked.folder is None:
        parser.error("--stop-after leaves a run to be gone on with, for which it needs --folder")
    check_alone()
    name = "assemble_full_size_resumed" if asked.kill_after else "assemble_full_size"
    bench = Bench(name, __doc__ or name, torch.device("cpu"))
    with tempfile.TemporaryDirectory() if asked.folder is None else nullcontext(asked.folder) as folder:
        model = Path(folder) / asked.model
        if not (model / "model_index.json").exists():  # which is written last
            shutil.rmtree(model, ignore_errors=True)
            make(asked.model, model, DTYPES[asked.dtype], asked.width)
        command = [
            *(sys.executable, "-m", "asdm_compress", "assemble", str(model), "--dtype", asked.dtype),
            *(*asked.arguments.split(), "--out", str(Path(folder) / "student"), "--overwrite"),
        ]
        result = bench.facts
        result |= {"model": asked.model, "dtype": asked.dtype, "width": asked.width, "arguments": asked.arguments}
        until = asked.kill_after or asked.stop_after
        if until:
            _run(command, Path(folder), until)
        if asked.stop_after:
            print(f"killed after {asked.stop_after:.0f} s with {_kept(Path(folder))} damages kept")
            return
        seconds, peak, stages = _run(command, Path(folder))
        killed = _killed(Path(folder))
        result["killed"] = killed
        recipe = yaml.safe_load((Path(folder) / "student" / "recipe.yaml").read_text(encoding="utf-8"))
        in_all = seconds + sum(run["seconds"] for run in killed)
        result |= {"damages": _kept(Path(folder)), "seconds": round(in_all, 1), "last_run_seconds": round(seconds, 1)}
        result |= {"stages_of_last_run": stages}
        (Path(folder) / KILLED).unlink(missing_ok=True)
    result |= {"peak_gb": round(peak / 1e9, 2), **{part: recipe[part] for part in ("edits", "evidence", "provenance")}}
    print(json.dumps(result), flush=True)
    if asked.width == 320:
        bench.write()


def _run(command: list[str], folder: Path, kill_after: float | None = None) -> tuple[float, int, dict[str, float]]:
    """Seconds, peak resident bytes, and the seconds of its stages; or kill it half-way."""
    began = time.monotonic()
    environment = {**os.environ, "ASDM_COMPRESS_CACHE": str(folder / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    peaks = [0]
    watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peaks), daemon=True)
    watcher.start()
    try:
        _, said = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seconds = time.monotonic() - began
        run = {"seconds": round(seconds, 1), "damages": _kept(folder), "peak_gb": round(peaks[0] / 1e9, 2)}
        (folder / KILLED).write_text(json.dumps([*_killed(folder), run]), encoding="utf-8")
        return seconds, peaks[0], {}
    if process.returncode:
        raise SystemExit(f"the command ended with {process.returncode}: {said}")
    return time.monotonic() - began, peaks[0], _stages(said)


def _stages(said: str) -> dict[str, float]:
    """What the command's progress says that each of its stages took."""
    found = re.findall(r"✓ (.+?) ━+ (\d+):(\d+):(\d+)", said)
    return {title: 3600 * float(hours) + 60 * float(minutes) + float(rest) for title, hours, minutes, rest in found}


def _watch(process: psutil.Process, peaks: list[int]) -> None:
    while process.is_running():
        try:
            peaks[0] = max(peaks[0], process.memory_info().rss)
        except psutil.Error:
            return
        time.sleep(0.5)


def _killed(folder: Path) -> list[dict[str, float]]:
    """The runs of this model and these measurements that were killed so far."""
    path = folder / KILLED
    found: list[dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def _kept(folder: Path) -> int:
    """How many damages the cache has."""
    names: set[str] = set()
    for path in folder.glob("cache/measurements/*/damages*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                names |= set(json.loads(line)["errors"])
    return len(names)


if __name__ == "__main__":
    main()
