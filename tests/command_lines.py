"""The program itself on several command lines in one process: starting torch anew for each would take minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Before a program's own words: two processes on CPUs, which accelerate takes for two accelerators.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]

_RUN_ALL = """
import contextlib, io, json, resource, sys, traceback
from asdm_compress.cli.main import main
results = []
before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for line, limit in json.loads(sys.stdin.read()):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["asdm-compress", *line]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or before, most))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def run_all(folder: Path, lines: Sequence[tuple[Sequence[str], int | None]]) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of every line run in `folder`; with each the most bytes that a file may take."""
    result = subprocess.run(
        [sys.executable, "-c", _RUN_ALL],
        cwd=folder,
        env={**os.environ, "ASDM_COMPRESS_CACHE": str(folder / "cache"), "NO_COLOR": "1"},
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return [(code, out, err) for code, out, err in json.loads(result.stdout.splitlines()[-1])]


def contents(folder: Path) -> list[str]:
    """What lies in a folder, caches apart."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts)
