"""One way to measure, for all benches: in turns, alone on the machine, with intervals, into one results format.

A bench is

    with measured("experts", __doc__) as bench:      # refuses while something else is running
        turns = in_turns({"plain": f, "routed": g}, repeats=9)
        bench.add({"case": 1, "routed_ratio": turns.ratio("routed", "plain")})

and leaves `tools/results/experts.json`: the machine, the command, how busy others were meanwhile, what the bench has
put into `bench.facts`, and the rows. A row holds plain values and figures, each figure `{"value", "low", "high", "n",
"method"}` with its 95 % interval.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import torch

import asdm_compress
from asdm_compress.core.provenance import processor_name, versions
from asdm_compress.evaluation import intervals
from asdm_compress.evaluation.record import Estimate
from asdm_compress.profiling.latency import time_side_by_side

RESULTS: Final = Path(__file__).parent / "results"
FORMAT: Final = 1
# Cores that other processes may use; more than a quiet system's own.
MOST_LOAD: Final = 0.15
_LISTENING: Final = 2.0  # seconds
BESIDE_LOAD: Final = "BENCH_BESIDE_LOAD"


def fingerprint(device: torch.device | None = None) -> dict[str, Any]:
    """What figures hold for: processor or accelerator, cores, memory, threads, system, versions."""
    device = device or torch.device("cpu")
    on_card = device.type == "cuda"
    card = torch.cuda.get_device_properties(device) if on_card else None
    return {
        "device": processor_name() if card is None else card.name,
        "device_memory_gib": None if card is None else round(card.total_memory / 2**30, 1),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda if on_card else None,
        "versions": versions(),
    }


def code_hash(*tools: str, packages: Sequence[str] = ("assembly",)) -> str:
    """Of everything that makes plans, or of other packages of asdm_compress, and of these modules beside this one."""
    digest, top = hashlib.sha256(), Path(asdm_compress.__file__).parent
    inside = [path for package in packages for path in sorted((top / package).glob("*.py"))]
    for path in (*inside, *(RESULTS.with_name(f"{name}.py") for name in tools)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of several passes, turn by turn."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> Estimate:
        """Of one pass."""
        return intervals.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Estimate:
        """The median over turns of one pass's time over another's in the same turn."""
        return intervals.median_ratio(self.seconds[base], self.seconds[name])


def in_turns(
    passes: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device | None = None,
    processor_time: bool = False,
) -> Turns:
    """Time passes in turns, so that a slow moment of the machine meets all; each runs once before, uncounted.

    With `processor_time` only what this process has had processors for is counted, which says more beside other work;
    of several threads it is the sum.
    """
    if processor_time:
        for run in passes.values():
            run()
        found: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(repeats):
            for name, run in passes.items():
                began = time.process_time()
                run()
                found[name].append(time.process_time() - began)
        return Turns(found)
    samples = time_side_by_side(list(passes.values()), repeats, device or torch.device("cpu"))
    return Turns(dict(zip(passes, samples, strict=True)))


class LoadMeter:
    """How many cores other processes have used since it was made. Other containers count where the system tells."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = self._now()

    def others(self) -> float:
        """Cores, on average."""
        now, busy, own = self._now()
        return max(0.0, (busy - self._busy) - (own - self._own)) / max(now - self._began, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        mine = own.user + own.system + own.children_user + own.children_system
        # Guests are counted as user time too.
        return time.perf_counter(), sum(times) - idle - getattr(times, "guest", 0.0), mine


def check_alone(seconds: float = _LISTENING) -> float:
    """Listen a while; leave the program where others use the machine, unless `BENCH_BESIDE_LOAD=1` says it is meant."""
    meter = LoadMeter()
    time.sleep(seconds)
    load = meter.others()
    if load > MOST_LOAD and os.environ.get(BESIDE_LOAD) != "1":
        raise SystemExit(
            f"other processes use {load:.2f} cores: timings beside them say nothing. Wait until they are done, or set "
            f"{BESIDE_LOAD}=1 to measure all the same; the results will say so."
        )
    return load


@dataclass(slots=True)
class Bench:
    """The rows of a bench under way, and `facts` that are of no row; every added row is printed, and all is written."""

    name: str
    about: str
    device: torch.device
    folder: Path = RESULTS
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    meter: LoadMeter = field(default_factory=LoadMeter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row; figures among its values are written with their intervals."""
        self.rows.append({key: plain(value) for key, value in row.items()})
        print(json.dumps({k: v for k, v in self.rows[-1].items() if not isinstance(v, list)}), flush=True)

    def head(self) -> dict[str, Any]:
        """What a results file begins with."""
        return {
            "format": FORMAT,
            "bench": self.name,
            "about": self.about.strip().splitlines()[0],
            "command": shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "machine": fingerprint(self.device),
        }

    @property
    def path(self) -> Path:
        """The results file."""
        return self.folder / f"{self.name}.json"

    def write(self) -> None:
        """Everything so far, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)

    def content(self) -> dict[str, Any]:
        """What the results file holds."""
        load = {"other_load_cores": round(self.meter.others(), 3)}
        return {**self.head(), **load, **self.facts, "rows": self.rows}


def plain(value: Any) -> Any:
    """A value as JSON holds it: figures as objects, floats to six digits."""
    if isinstance(value, Estimate):
        return {key: plain(part) for key, part in value.model_dump().items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


@dataclass(slots=True)
class Resumable(Bench):
    """A bench of hours, whose rows are on disk as soon as they are there and which goes on behind them.

    `setting` is what all rows of a file have in common beside the machine: what is there of another setting, machine or
    format, or is to be begun `fresh`, is put aside under a name with `.old`. Without `writes` no file is read or
    written.
    """

    setting: Mapping[str, Any] = field(default_factory=dict)
    writes: bool = True

    def begin(self, fresh: bool = False) -> Resumable:
        """Take over what is on disk, or put it aside."""
        if not self.writes or not self.path.exists():
            return self
        if fresh or not self.reload():
            names = (self.path.with_suffix(f".{number}.old.json") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.path.replace(aside)
            why = "is begun anew" if fresh else "was of another setting or machine"
            print(f"{self.path.name} {why}: what is there is put aside as {aside.name}", flush=True)
        return self

    def reload(self) -> bool:
        """Take over what is on disk, which another process may have added to; False if it is of another kind."""
        if not self.writes or not self.path.exists():
            return True
        before = json.loads(self.path.read_text(encoding="utf-8"))
        head = json.loads(json.dumps(self.head()))
        if any(before.get(name) != head[name] for name in ("format", "bench", "machine", *self.setting)):
            return False
        self.rows = before.pop("rows")
        self.facts = {name: value for name, value in before.items() if name not in (*head, "other_load_cores")}
        return True

    def head(self) -> dict[str, Any]:
        """Also with the setting."""
        return {**Bench.head(self), **self.setting}

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row, on disk too."""
        Bench.add(self, row)
        self.write()

    def write(self) -> None:
        """Where anything is written."""
        if self.writes:
            Bench.write(self)


@contextmanager
def measured(
    name: str, about: str | None, device: torch.device | None = None, folder: Path = RESULTS, alone: bool = True
) -> Iterator[Bench]:
    """A bench whose results are written to `folder` when it ends well; `alone` refuses while others use the machine."""
    if alone:
        check_alone()
    bench = Bench(name, about or name, device or torch.device("cpu"), folder)
    yield bench
    bench.write()
