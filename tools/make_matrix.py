"""Try what users put beside and around a UNet on the teacher and on students of every kind, and print the table.

    python tools/make_matrix.py                     # writes tools/results/matrix.json
    python tools/make_matrix.py "torchao int8 weights"     # only these rows; the others stay as they are

`tests/test_matrix.py` runs a part of the same checks. A row whose package is not installed stays as it is, too. A cell
says that a thing works, with the largest difference from its oracle (see each check's own words) where there is one, or
why not.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from matrix.checks import CHECKS
from matrix.outcome import Check, Outcome
from matrix.subjects import PLANS, Subject
from measuring import Bench
from mini_sd.weights import bundled_weights

from asdm_compress.core.provenance import package_version, processor_name
from asdm_compress.models.loading import LoadOptions, load_pipeline

OPTIONAL = ("torchao", "torchsde")  # packages
OUT = Path(__file__).with_name("results") / "matrix.json"


def main() -> None:
    """Run every check on every subject."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    pipeline = load_pipeline("mini-sd", LoadOptions())
    subjects = [Subject(name, pipeline) for name in PLANS]
    wanted = sys.argv[1:] or [check.name for check in CHECKS]
    old = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    if old.get("plans") != PLANS or (old.get("mini_sd") != bundled_weights() and not sys.argv[1:]):
        old = {}
    rows = {row["name"]: row for row in old.get("rows", [])}
    # A package that is not here now was there when its rows were made.
    before = old.get("packages", old.get("versions", {}))
    packages = {name: package_version(name) or before.get(name) for name in ("peft", *OPTIONAL)}
    bench = Bench("matrix", __doc__ or "", torch.device("cpu"))
    bench.facts |= {"plans": PLANS, "mini_sd": bundled_weights(), "packages": packages}
    for check in CHECKS:
        if check.name in wanted:
            cells = {}
            try:
                for subject in subjects:
                    cells[subject.name] = tried(check, subject)
                    print(json.dumps({check.name: {subject.name: cells[subject.name]}}), flush=True)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                print(f"{check.name} is left as it is: {error}", flush=True)
                continue
            rows[check.name] = {
                "name": check.name, "oracle": check.oracle, "device": processor_name(), "cells": cells
            }  # fmt: skip
            bench.rows = [rows[each.name] for each in CHECKS if each.name in rows]
            bench.write()
    print(table(json.loads(OUT.read_text(encoding="utf-8"))))


def tried(check: Check, subject: Subject) -> dict[str, Any]:
    """One cell: what the check found, or the error that it ended in. Raises ModuleNotFoundError."""
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        outcome = check.run(subject)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"works": False, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    found = {name: getattr(outcome, name) for name in Outcome.__slots__ if getattr(outcome, name) not in (None, "")}
    return {"works": check.works(outcome), **found, "seconds": round(time.perf_counter() - began, 1)}


def table(content: dict[str, Any]) -> str:
    """The matrix in Markdown."""
    names = list(content["plans"])
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in content["rows"]:
        lines.append(f"| {row['name']} | {' | '.join(_cell(row['cells'][name]) for name in names)} |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any]) -> str:
    if "error" in cell:
        return f"no: {cell['error'].replace('|', '/')}"
    shown, difference = [], cell.get("difference")
    if difference is not None:
        exact = f"{difference:.0e}" if difference else "exact"
        shown.append(f"{difference:.2%}" if cell["relative"] else exact)
    shown += [cell["note"]] if "note" in cell else []
    return f"{'yes' if cell['works'] else 'NO'}{', ' if shown else ''}{', '.join(shown)}"


if __name__ == "__main__":
    main()
