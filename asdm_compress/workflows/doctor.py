"""`doctor`: what the machine has, and what would fail on it."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.version import Version

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.files import cache_folder
from asdm_compress.core.provenance import package_version, processor_name, versions
from asdm_compress.core.units import format_bytes
from asdm_compress.models.names import HUB_NAMES, MINI_SD_FOLDER
from asdm_compress.models.onnx_file import PACKAGES, check_onnx
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions

OLDEST_TORCH = "2.6"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `problem` means that something will not work, `note` that something optional is not there."""

    state: Literal["ok", "note", "problem"]
    subject: str
    text: str

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at versions, devices, memory, disk and models."""
    return [*_versions(), _onnx(), *_devices(), *_places(), *_models()]


def _versions() -> list[Finding]:
    found = []
    for name, version in versions().items():
        missing = version == "not installed"
        found.append(Finding("problem" if missing else "ok", name, version))
    if Version(torch.__version__).release < Version(OLDEST_TORCH).release:
        found.append(Finding("problem", "torch", f"{torch.__version__} is older than {OLDEST_TORCH}"))
    return found


def _onnx() -> Finding:
    try:
        check_onnx()
    except AsdmError as error:
        return Finding("note", "onnx", f"{error.message}; {error.hint}")
    return Finding("ok", "onnx", ", ".join(f"{name} {package_version(name)}" for name in PACKAGES))


def _devices() -> list[Finding]:
    memory = psutil.virtual_memory()
    found = [
        Finding(
            "ok", "cpu", f"{processor_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
        ),
        Finding("ok", "memory", f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found.append(Finding("ok", f"cuda:{i}", f"{properties.name}, {format_bytes(properties.total_memory)}"))
    else:
        found.append(Finding("note", "cuda", "no GPU that this torch can use; everything runs on the CPU"))
    return found


def _places() -> list[Finding]:
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return [Finding("problem", "cache", f"{folder} cannot be written; set ASDM_COMPRESS_CACHE")]
    return [Finding("ok", "cache", f"{folder}, {format_bytes(shutil.disk_usage(existing).free)} free")]


def _models() -> list[Finding]:
    weights = list(MINI_SD_FOLDER.rglob("*.safetensors"))
    size = sum(Path(p).stat().st_size for p in weights)
    found = [
        Finding("ok", "mini-sd", f"bundled, {format_bytes(size)}")
        if weights
        else Finding("problem", "mini-sd", "the bundled weights are missing; install the package again")
    ]
    for name in HUB_NAMES:
        try:
            place = resolve(name, LoadOptions()).path
            found.append(Finding("ok", name, f"in {place}"))
        except AsdmError as error:
            found.append(Finding("note", name, f"{error.message}; {error.hint}"))
    return found
