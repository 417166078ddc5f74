"""A resumable training run with a time budget: steps, seconds, learning rate, a metrics log, and safe checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from asdm_compress.core.provenance import processor_name

CHECKPOINT_EVERY_SECONDS: Final = 240.0
LOG_EVERY_STEPS: Final = 20
WARM_UP_STEPS: Final = 100
DECAY_SHARE: Final = 0.5  # of the minutes of one call: the learning rate falls linearly to zero at its end


class HasLearningRate(Protocol):
    """An optimizer, as far as its schedule is concerned."""

    param_groups: list[dict[str, Any]]


class TrainingRun:
    """Counts steps and seconds over any number of calls, and keeps the state of everything in `parts` on disk."""

    def __init__(self, folder: Path, name: str, minutes: float, parts: dict[str, Any], seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.pt"
        self.log_path = folder / f"{name}.jsonl"
        self.seconds_allowed = 60 * minutes
        self.parts = parts
        self.seed = seed
        self.machine = {"device": processor_name(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        if torch.cuda.is_available():
            self.machine["device"] = torch.cuda.get_device_name()
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.seconds_before = 0.0
        self.calls: list[dict[str, Any]] = []
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for key, part in parts.items():
                if key in state:
                    part.load_state_dict(state[key])
                else:
                    print(f"{name}: {self.path.name} has no {key}, which begins anew", flush=True)
            self.step, self.seconds_before, self.calls = state["step"], state["seconds"], state["calls"]
            print(f"{name}: resumed at step {self.step} after {self.seconds_before / 60:.1f} min", flush=True)

    def steps(self, optimizer: HasLearningRate, learning_rate: float) -> Iterator[int]:
        """Yield step numbers until the minutes are over, setting the learning rate and saving checkpoints."""
        self.started = saved = time.monotonic()
        self.calls.append({"from_step": self.step, "seed": self.seed, **self.machine})
        while True:
            now = time.monotonic()
            share = (now - self.started) / self.seconds_allowed
            if share >= 1:
                break
            warm_up = min(1.0, (self.step + 1) / WARM_UP_STEPS)
            decay = min(1.0, (1 - share) / DECAY_SHARE)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warm_up * decay
            yield self.step
            self.step += 1
            if now - saved > CHECKPOINT_EVERY_SECONDS:
                self.save()
                saved = now
        self.save()

    @property
    def seconds(self) -> float:
        """Seconds of training over all calls."""
        return self.seconds_before + time.monotonic() - self.started

    def log(self, **values: float) -> None:
        """Append one line of metrics every `LOG_EVERY_STEPS` steps."""
        if self.step % LOG_EVERY_STEPS:
            return
        if not all(math.isfinite(v) for v in values.values()):
            raise RuntimeError(f"training diverged at step {self.step}: {values}")
        record = {"step": self.step, "seconds": round(self.seconds, 1), **{k: round(v, 6) for k, v in values.items()}}
        self.metrics = record
        with self.log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it, so that a kill never leaves half a file."""
        state = {key: part.state_dict() for key, part in self.parts.items()}
        state |= {"step": self.step, "seconds": self.seconds, "calls": self.calls, "metrics": self.metrics}
        aside = self.path.with_suffix(".tmp")
        torch.save(state, aside)
        aside.replace(self.path)
