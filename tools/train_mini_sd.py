"""Train the bundled model from nothing, stage by stage; every stage goes on from its last checkpoint.

    python tools/train_mini_sd.py vae --work ~/mini-sd --minutes 12
    python tools/train_mini_sd.py text --work ~/mini-sd --minutes 4
    python tools/train_mini_sd.py unet --work ~/mini-sd --minutes 240
    python tools/train_mini_sd.py decoder --work ~/mini-sd --minutes 20
    python tools/train_mini_sd.py reader --work ~/mini-sd --minutes 10
    python tools/train_mini_sd.py package --work ~/mini-sd

The minutes are for two CPU cores; with `--device cuda` fewer do more. `decoder` does not change the latents, so it can
come at any time after `vae`. Without checkpoints, `unpack` makes some of the bundled model, and a stage goes on from
those.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

# Two processes whose OpenMP threads spin long at barriers slow each other many times over; threads that sleep at once
# slow a training run that is alone. A short spin does neither.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Each stage's module; `decoder` goes on with the second half of what `vae` trains.
STAGES = {"reader": "reader", "vae": "vae", "decoder": "vae", "text": "text", "unet": "unet"}


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "package", "unpack"))
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs, outside the repo")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for this call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = arguments.work.expanduser()
    if arguments.stage in ("package", "unpack"):
        getattr(importlib.import_module("mini_sd.package"), arguments.stage)(work)
        return
    stage = importlib.import_module(f"mini_sd.{STAGES[arguments.stage]}")
    train = getattr(stage, f"train_{arguments.stage}")
    train(work, arguments.minutes, arguments.seed, torch.device(arguments.device))


if __name__ == "__main__":
    main()
