"""Several processes on one job, as `accelerate launch` or `torchrun` starts them: who does what, and one error for all.

Only small Python values travel between them, by gloo and never by the accelerators, which are each process's own. Where
they also work on shared tensors, a process may wait for another inside a collective, and an error has to reach it
there: see `sharing_fate`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from asdm_compress.core.errors import AsdmError, ExitCode

# One process may wait for another's whole share of the work.
PATIENCE: Final = timedelta(days=7)
_FATE: Final = "asdm-compress/failure"
_LOOKS: Final = 0.5  # seconds between two
_GRACE: Final = 30.0  # seconds in which the launcher ends a process whose error has been told
_CONNECTING: Final = timedelta(seconds=60)
T = TypeVar("T")


def started_processes() -> int:
    """How many processes a launcher has started for this job; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return started_processes() == 1 or int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way to the other processes."""

    message: str
    hint: str | None
    exit_code: ExitCode

    @staticmethod
    def of(error: Exception, rank: int) -> _Failure:
        if isinstance(error, AsdmError):
            return _Failure(error.message, error.hint, error.exit_code)
        text = f"process {rank} failed with {type(error).__name__}: {error}"
        return _Failure(text, None, ExitCode.ENVIRONMENT)


class Processes:
    """The processes of a job, of which this is number `rank`; by default the only one.

    Every method but `share` must be called by all of them in the same order. An error that one of them meets is raised
    by all, at their next such call.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._together = count > 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints, writes, times and searches."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of what is to be done: every `count`-th item."""
        return list(items[self.rank :: self.count])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Raises AsdmError where one of them has failed."""
        return self._exchange(value)

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main process, for all; the others wait for it."""
        if not self._together:
            return work()
        found: T = self._exchange(work() if self.is_main else None)[0]
        return found

    def wait(self) -> None:
        """Go on when all have come here."""
        self._exchange(None)

    def part(self) -> None:
        """The last call of all: from here on each goes its own way."""
        self.wait()
        self._together = False

    def file(self, path: Path) -> Path:
        """A file of this process alone beside the main one's, which is `path`; see `files_of_all`."""
        return path if self.is_main else path.with_name(f"{path.stem}.{self.rank}{path.suffix}")

    def device(self, wanted: str) -> str:
        """The name of this process's own device, where `wanted` (auto or cuda) leaves open which it is.

        Raises AsdmError where a machine has fewer accelerators than processes.
        """
        if self.count == 1 or wanted not in ("auto", "cuda"):
            return wanted
        import torch

        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if cards == 0 and wanted == "auto":
            return "cpu"
        if self.local_rank >= cards:
            raise AsdmError(
                f"there are more processes than the {cards} accelerators of this machine",
                f"Start {max(cards, 1)}, or use --device cpu.",
                ExitCode.ENVIRONMENT,
            )
        return f"cuda:{self.local_rank}"

    def tell(self, error: Exception) -> None:
        """Let the others, who still count on this process, end with its error."""
        if self._together:
            self._together = False
            self._all(_Failure.of(error, self.rank))

    def _exchange(self, value: Any) -> list[Any]:
        if not self._together:
            return [value]
        found = self._all(value)
        failures = [one for one in found if isinstance(one, _Failure)]
        if failures:
            self._together = False
            raise AsdmError(failures[0].message, failures[0].hint, failures[0].exit_code)
        return found

    def _all(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        try:
            found: list[Any] = gather_object([value])
        except RuntimeError as error:  # what torch.distributed raises when a connection breaks
            self._together = False
            raise AsdmError("another process of this run has ended", None, ExitCode.ENVIRONMENT) from error
        return found


ALONE: Final = Processes()


def files_of_all(path: Path) -> list[Path]:
    """The files of all processes that are there, the main one's first, also of earlier runs (see `Processes.file`)."""
    others = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return [path, *sorted(others)] if path.exists() else sorted(others)


@contextmanager
def joined() -> Iterator[Processes]:
    """All the processes of the job; those that a launcher has started meet here first.

    An error that leaves the block on one of them ends all.
    """
    if started_processes() == 1:
        yield ALONE
        return
    import torch
    from accelerate import PartialState

    # Its CPU side: what travels are Python objects, whatever the models are on.
    state = PartialState(cpu=True, timeout=PATIENCE)
    processes = Processes(state.process_index, state.num_processes, state.local_process_index)
    try:
        yield processes
    except Exception as error:
        processes.tell(error)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def sharing_fate(end: Callable[[AsdmError], None]) -> Iterator[None]:
    """An error that leaves the block on one process ends all, also those that wait for it inside a collective.

    It is told by the store at which the processes have met. In a process that another's error ends, `end` is called
    with it, from a thread; it must not return but leave the process. The error of the main process is raised as it is.
    """
    if started_processes() == 1:
        yield
        return
    import torch.distributed  # noqa: F401 - not for the first time in a thread

    watch = _Watch(end)
    watch.start()
    try:
        yield
    except Exception as error:
        watch.over.set()
        known = watch.known()
        if known is not None and not isinstance(error, AsdmError):
            raise known from error  # what a collective says when its partner is gone is not the reason
        watch.tell(error)
        if not is_main_process():
            time.sleep(_GRACE)
        elif _is_broken_connection(error):
            raise AsdmError("another process of this run has ended", None, ExitCode.ENVIRONMENT) from error
        raise
    finally:
        watch.over.set()


class _Watch(threading.Thread):
    """Looks now and then whether another process has failed."""

    def __init__(self, end: Callable[[AsdmError], None]) -> None:
        super().__init__(daemon=True)
        self.end, self.over = end, threading.Event()
        self._lock = threading.Lock()
        self._store: Any = None

    def run(self) -> None:
        while not self.over.wait(_LOOKS):
            error = self.known()
            if error is not None and not self.over.is_set():
                self.end(error)

    def known(self) -> AsdmError | None:
        """Another's error, if there is one."""
        with self._lock:
            store = self._connected()
            try:
                if store is None or not store.check([_FATE]):
                    return None
                told = json.loads(store.get(_FATE))
            except RuntimeError:  # the store is gone, with its launcher
                return None
        return AsdmError(told["message"], told["hint"], ExitCode(told["exit_code"]))

    def tell(self, error: Exception) -> None:
        """Let the others end with an error of this process, unless one of them was first."""
        failure = _Failure.of(error, int(os.environ.get("RANK", "0")))
        told = {"message": failure.message, "hint": failure.hint, "exit_code": int(failure.exit_code)}
        with self._lock:
            store = self._connected()
            if store is not None:
                store.compare_set(_FATE, "", json.dumps(told))

    def _connected(self) -> Any:
        """The store, once there is one: an elastic launcher has it from the start, or the main process opens it."""
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        from_start = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self._store is None and (from_start or dist.is_initialized()):
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.TCPStore(host, port, None, False, _CONNECTING)  # type: ignore[attr-defined]
            self._store = PrefixStore(f"fate/{attempt}", store)
        return self._store


def _is_broken_connection(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "peer" in str(error))
