"""What `--help` shows below the options: how to begin, and an example of every command."""

from __future__ import annotations

from typing import Final

BEGIN: Final = (
    "To begin: `asdm-compress assemble mini-sd --budget latency=0.7x --out mini-light` cuts the bundled model to 0.7 "
    "of its time and leaves the student with a report to open in a browser. Your own model goes in mini-sd's place.",
    "Words: the teacher is the model that you have, a student what is made of it; damage is the relative error of the "
    "student's noise prediction; to inherit features is to take them over from an earlier sampling step.",
    "Exit codes: 0 ok, 2 the input cannot be used, 3 the budget cannot be met, 4 something is missing on this machine. "
    "Every command has --help, --json for programs, and --quiet.",
)

EXAMPLES: Final = {
    "profile": "asdm-compress profile mini-sd --depth block --out costs",
    "frontier": "asdm-compress frontier mini-light --budgets 0.9x,0.8x,0.7x",
    "assemble": "asdm-compress assemble mini-sd --budget latency=0.7x --out mini-light",
    "apply": "asdm-compress apply mini-sd-latency-0.7x mini-sd --out student",
    "distill": "asdm-compress distill mini-light --out trained",
    "calibrate": "asdm-compress calibrate mini-sd --budget latency=0.5x --out fast",
    "switch": "asdm-compress switch mini-sd mini-light --schedule small-first:10 --out both",
    "optimize": "asdm-compress optimize mini-sd --members mini-light --budget latency=0.33x --out faster",
    "generate": 'asdm-compress generate mini-light "a small red circle" --compare mini-sd',
    "evaluate": "asdm-compress evaluate mini-light --against mini-sd",
    "report": "asdm-compress report mini-light",
    "export": "asdm-compress export mini-light --format portable --out elsewhere",
    "lora": "asdm-compress lora teacher-lora.safetensors mini-light --out light-lora.safetensors",
    "doctor": "asdm-compress doctor",
}
