"""What a training writes down as it goes: `metrics.jsonl` always, and accelerate's trackers where there are any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from accelerate import Accelerator

from asdm_compress.core.files import disk_errors, output_file

METRICS: Final = "metrics.jsonl"
_HINT: Final = "Free some space and go on with --resume."


class Journal:
    """One line of JSON per log and per probe, each with its step; of several processes the first alone writes."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = folder / METRICS, accelerator

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line; its numbers go to the trackers too."""
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        self.accelerator.log(numbers, step=record["step"])
        if not self.accelerator.is_main_process:
            return
        with disk_errors(self.path, _HINT):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed training takes and logs again."""
        if not self.accelerator.is_main_process or not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # cut short by a kill
        with output_file(self.path) as aside:
            aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
