"""Command lines run in processes that are forked from one which has imported torch and the rest already.

Each is a process of its own with its own folder, environment, output and exit code, as `python -m asdm_compress` is;
only the seconds of starting anew are saved.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class WarmStart:
    """The client's side: starts the process that is forked from, and asks it for others."""

    def __init__(self) -> None:
        self.environment = imported_under()
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def suits(self) -> bool:
        """Whether what modules read of the environment when they are imported is still the same."""
        return imported_under() == self.environment

    def run(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """`python -m asdm_compress` with these arguments in `folder`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as aside:
            outputs = [str(Path(aside) / name) for name in ("out", "err")]
            asked = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
            print(json.dumps({**asked, "outputs": outputs, "timeout": timeout}), file=self._server.stdin, flush=True)
            code = json.loads(self._server.stdout.readline())
            out, err = (Path(name).read_text(encoding="utf-8") for name in outputs)
        if code is None:
            raise subprocess.TimeoutExpired(list(arguments), timeout, out, err)
        return subprocess.CompletedProcess(list(arguments), code, out, err)

    def close(self) -> None:
        """End the process."""
        self._server.communicate()


def imported_under() -> dict[str, str]:
    """The environment but for what pytest itself changes from test to test."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def _serve() -> None:
    import asdm_compress

    for module in pkgutil.walk_packages(asdm_compress.__path__, "asdm_compress."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import torchmetrics.functional.image  # noqa: F401 - which commands import when they compare

    gc.freeze()  # what is never collected is never copied
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
        print(json.dumps(_outcome(child, asked["timeout"])), flush=True)


def _become(asked: Mapping[str, Any]) -> NoReturn:
    """Be the program."""
    for number, name in enumerate([os.devnull, *asked["outputs"]]):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.path[0] = asked["folder"]
    sys.argv = ["asdm_compress", *asked["arguments"]]
    code: Any = 0
    try:
        runpy.run_module("asdm_compress", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, but for taking down all that was imported, which takes seconds.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _outcome(child: int, timeout: float) -> int | None:
    """The exit code of a child, that of a signal negative; None where it took too long and was killed."""
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)


if __name__ == "__main__":
    _serve()
