"""Where a result came from: versions, machine, content hashes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = (
    "asdm-compress",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "torch-pruning",
    "fvcore",
    "thop",
    "ortools",
)


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {name: package_version(name) or "not installed" for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def processor_name() -> str:
    """The CPU's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def content_hash(value: Mapping[str, Any]) -> str:
    """A short, stable hash of JSON-like content."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
