"""`asdm-compress doctor`."""

from __future__ import annotations

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.errors import ExitCode


def doctor(quiet: o.Quiet = False, as_json: o.Json = False) -> None:
    """Show the environment: versions, devices, memory, and what is missing."""
    output = Output(quiet, as_json)
    with output.stage("Looking around"):
        from asdm_compress.workflows.doctor import examine

        findings = examine()
    for finding in findings:
        output.show(f"{finding.state:>7}  {finding.subject}: {finding.text}")
    output.result({"findings": [finding.as_json() for finding in findings]})
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(int(ExitCode.ENVIRONMENT))
