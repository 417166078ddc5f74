"""Command lines run in processes that are forked from one which has imported torch and the rest already.

Each is a process of its own with its own folder, environment, output and exit code, as `python -m asdm_compress` is,
without the seconds that starting anew takes. They do not show what importing says or leaves out, have one seed of
hashes, and are not taken down module by module: what depends on that is tested with `cli_anew`.
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
import threading
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
        self._asked = 0

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
            self._asked += 1
            more = {"number": self._asked, "outputs": outputs, "timeout": timeout}
            print(json.dumps({**asked, **more}), file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
            assert answer, f"the process that is forked from has ended with {self._server.wait()}"
            number, code = json.loads(answer)
            assert number == self._asked, "an answer to an earlier command line, which was interrupted"
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

    gc.freeze()  # a collection in a child would write to all pages
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
        print(json.dumps([asked["number"], _outcome(child, asked["timeout"])]), flush=True)


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
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, but for taking down all that was imported, which takes seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


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
