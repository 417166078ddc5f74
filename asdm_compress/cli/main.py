"""The `asdm-compress` program: its commands, and what happens when one fails."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Final

import typer

from asdm_compress.cli.apply import apply
from asdm_compress.cli.assemble import assemble
from asdm_compress.cli.calibrate import calibrate
from asdm_compress.cli.console import fail
from asdm_compress.cli.distill import distill
from asdm_compress.cli.doctor import doctor
from asdm_compress.cli.evaluate import evaluate
from asdm_compress.cli.examples import BEGIN, EXAMPLES
from asdm_compress.cli.export import export
from asdm_compress.cli.frontier import frontier
from asdm_compress.cli.generate import generate
from asdm_compress.cli.lora import lora
from asdm_compress.cli.optimize import optimize
from asdm_compress.cli.profile import profile
from asdm_compress.cli.recipes import recipes
from asdm_compress.cli.report import report
from asdm_compress.cli.switch import switch
from asdm_compress.core.errors import AsdmError, ExitCode, is_out_of_memory
from asdm_compress.core.processes import started_processes

app = typer.Typer(
    name="asdm-compress",
    help="Make a Stable Diffusion UNet fit a budget: faster and smaller with the least loss, proven by measurement.",
    epilog="\n\n".join(BEGIN),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order in which they are used.
PANELS = {
    "Make a lighter UNet": (profile, assemble, frontier, apply, distill),
    "Spend less on every image": (calibrate, switch, optimize),
    "Look at the result": (generate, evaluate, report),
    "Take it elsewhere, and help": (export, lora, doctor),
}
for panel, commands in PANELS.items():
    for command in commands:
        example = f"Example: {EXAMPLES[command.__name__]}"
        app.command(rich_help_panel=panel, epilog=example)(command)
app.add_typer(recipes, rich_help_panel="Make a lighter UNet")

SHARED = ("assemble", "distill", "evaluate")  # the commands that a launcher may start in several processes


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    """Make a Stable Diffusion UNet fit a budget: faster and smaller with the least loss, proven by measurement."""
    if version:
        from asdm_compress.core.provenance import package_version

        typer.echo(f"asdm-compress {package_version('asdm-compress')}")
        raise typer.Exit
    if started_processes() > 1 and context.invoked_subcommand not in SHARED:
        raise AsdmError(
            f"only {', '.join(SHARED[:-1])} and {SHARED[-1]} can be shared by several processes",
            "Run this command without a launcher.",
        )


_MEASURED: Final = "The same command goes on from what was measured."
_GOES_ON: Final = {
    "distill": "Go on from the last checkpoint with --resume.",
    **dict.fromkeys(("assemble", "calibrate", "evaluate", "frontier", "optimize"), _MEASURED),
}


# What needs less memory, of commands where the usual would change what is asked for.
_LESS_AT_ONCE: Final = {
    "distill": "Take a smaller --micro-batch, or --gradient-checkpointing; where checkpoints are there, with --resume.",
    "evaluate": "Begin anew with a smaller --batch and --overwrite.",
}


class _InterruptedError(BaseException):
    """Ctrl-C or a polite kill. No KeyboardInterrupt, which the command-line library would turn into its own exit."""


def _interrupt(number: int, _: FrameType | None) -> None:
    # Once is enough: a second signal must not cut the clean-up short.
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise _InterruptedError(number)


def main() -> None:
    """Run the command line; every expected failure is one message and its exit code."""
    # Progress bars are our own; those of the libraries would break into them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except AsdmError as error:
        fail(error, as_json="--json" in sys.argv)
    except _InterruptedError as interruption:
        code = 128 + int(str(interruption))
        named = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        ended = AsdmError("interrupted; no half-written output is left", _GOES_ON.get(named))
        fail(ended, as_json="--json" in sys.argv, code=code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        named = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        hint = _LESS_AT_ONCE.get(
            named,
            "Ask for less at once, as far as this command has these: --dtype bf16, a smaller --batch or --image-size, "
            "and where something is fitted fewer --calibration-triples.",
        )
        fail(AsdmError("memory ran out", hint, ExitCode.ENVIRONMENT), as_json="--json" in sys.argv)
