"""`asdm-compress lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm_compress.cli import options as o
from asdm_compress.cli.console import Output
from asdm_compress.core.files import check_output


def lora(
    file: Annotated[Path, typer.Argument(metavar="LORA", help="A LoRA's .safetensors, trained on the teacher.")],
    student: Annotated[Path, typer.Argument(help="A student's folder, with its recipe.yaml.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The renamed LoRA's file.")] = Path("lora.safetensors"),
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Rename a teacher's LoRA for a student, whose blocks have other numbers; what is gone is named."""
    check_output(out, overwrite)
    output = Output(quiet, as_json)
    with output.stage("Starting torch"):
        from asdm_compress.workflows.lora import run_lora
    result = run_lora(file, student, out, output, overwrite)
    for module, why in result.left_out.items():
        output.show(f"left out: {module} ({why})")
    output.show(f"Wrote {result.out}: {result.kept} tensors kept, {len(result.left_out)} modules left out.")
    output.result({"out": str(result.out), "kept_tensors": result.kept, "left_out": dict(result.left_out)})
