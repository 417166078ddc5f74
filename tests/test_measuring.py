"""How benches measure: figures with intervals in one format, and not beside other work."""

from __future__ import annotations

import json
import subprocess
import sys

import measuring
import pytest
import torch


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


def test_a_bench_of_hours_goes_on_where_it_was_and_puts_others_aside(tmp_path):
    def begun(fresh=False, **setting):
        bench = measuring.Resumable("long", "About.", torch.device("cpu"), tmp_path, setting=setting)
        return bench.begin(fresh)

    first = begun(steps=25)
    first.facts["more"] = {"a": [1]}
    first.add({"budget": 0.5, "rival": "x"})
    found = json.loads((tmp_path / "long.json").read_text())
    assert (found["bench"], found["steps"], found["rows"]) == ("long", 25, [{"budget": 0.5, "rival": "x"}])
    again = begun(steps=25)
    assert (again.rows, again.facts) == (first.rows, first.facts)
    first.add({"budget": 0.4, "rival": "y"})  # by another process
    assert again.reload()
    assert len(again.rows) == 2
    assert begun(steps=20).rows == []
    assert json.loads((tmp_path / "long.1.old.json").read_text())["rows"] == first.rows
    assert not (tmp_path / "long.json").exists()
    begun(steps=20).add({"budget": 0.3})
    assert begun(True, steps=20).rows == []
    assert (tmp_path / "long.1.old.json").exists() and (tmp_path / "long.2.old.json").exists()
    silent = measuring.Resumable("long", "About.", torch.device("cpu"), tmp_path, writes=False).begin()
    silent.add({"budget": 0.1})
    assert not (tmp_path / "long.json").exists()


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
