"""`asdm-compress report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output


def report(
    folder: Annotated[
        Path,
        typer.Argument(help="What assemble, frontier, apply, calibrate, switch, optimize, distill or evaluate wrote."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Another folder for the report; by default the same.")
    ] = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Write one report.html of everything that lies in a folder, and its figures as report.md and report.json.

    The page holds its images and drawings itself, and opens without a network. Sections whose files are not there are
    left out; the page says which command makes them.
    """
    output = Output(quiet, as_json)
    with output.stage("Reading and drawing"):
        from asdm_compress.workflows.report import HTML, JSON, MARKDOWN, write_report

        result = write_report(folder, out=out)
    for line in result.report.verdict:
        output.show(line)
    for missing in result.report.missing:
        output.show(f"Not in it: {missing.title} ({missing.command}).")
    output.show(f"Wrote {result.out}: {HTML} to open in a browser, {MARKDOWN} and {JSON}.")
    output.result({"out": str(result.out), **result.report.as_json()})
