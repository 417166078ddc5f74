"""How benches measure: figures with intervals in one format, and not beside other work."""

from __future__ import annotations

import json
import subprocess
import sys

import measuring
import pytest


def test_rows_and_figures_are_written_with_the_machine(tmp_path):
    with measuring.measured("slots", "What slots cost.\nMore.", folder=tmp_path, alone=False) as bench:
        turns = measuring.in_turns({"short": lambda: sum(range(1000)), "long": lambda: sum(range(100_000))}, 5)
        bench.add({"case": 1, "ratio": turns.ratio("long", "short"), "seconds": turns.median("short")})
    found = json.loads((tmp_path / "slots.json").read_text())
    assert (found["format"], found["bench"], found["about"]) == (1, "slots", "What slots cost.")
    assert found["machine"]["versions"]["torch"]
    assert found["machine"]["cores"] >= 1
    assert found["other_load_cores"] >= 0
    ratio = found["rows"][0]["ratio"]
    assert set(ratio) == {"value", "low", "high", "n", "method"}
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["n"] == 5


def test_a_bench_that_fails_leaves_no_results(tmp_path):
    with pytest.raises(ValueError), measuring.measured("slots", None, folder=tmp_path, alone=False):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_beside_other_work(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            monkeypatch.delenv(measuring.BESIDE_LOAD, raising=False)
            with pytest.raises(SystemExit, match="timings beside them say nothing"):
                measuring.check_alone(1.0)
            monkeypatch.setenv(measuring.BESIDE_LOAD, "1")
            assert measuring.check_alone(0.5) > measuring.MOST_LOAD
        finally:
            other.kill()
