"""An evaluation as tables for the terminal, and its protocol card as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from rich.table import Table

from asdm_compress.core.units import format_bytes, format_count, format_seconds
from asdm_compress.evaluation.record import Estimate, Evaluation, Measure, OwnSampling

_TITLES: Final = {
    "pairs": "Model against teacher, the same prompts and seeds",
    "content": "What the images show",
    "distances": "Distances between sets of images",
    "speed": "Speed, in turns",
    "memory": "Memory",
    "size": "Size",
}


def measure_tables(evaluation: Evaluation) -> list[Table]:
    """One table per group of measures, with the 95 % intervals."""
    tables = []
    for group, title in _TITLES.items():
        rows = [measure for measure in evaluation.measures if measure.group == group]
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in ("teacher", "model", "change", "n"):
            table.add_column(name, justify="right")
        for measure in rows:
            table.add_row(label(measure), *cells(measure))
        tables.append(table)
    return tables


def label(measure: Measure) -> str:
    """A measure's title with what of it is meant."""
    parts = [measure.part or "", f"to {measure.reference}" if measure.group == "distances" else ""]
    if measure.group == "distances":
        parts.append(f"{measure.extractor}")
    return ", ".join([measure.title, *(part for part in parts if part)])


def cells(measure: Measure) -> tuple[str, str, str, str]:
    """Teacher, model, change and n of a measure as text."""
    show = shower(measure.unit)
    change = "" if measure.change is None else _change(measure.change, measure.change_kind == "ratio", show)
    known = measure.model or measure.teacher or measure.change
    return shown(measure.teacher, show), shown(measure.model, show), change, "" if known is None else str(known.n)


def shower(unit: str) -> Callable[[float], str]:
    """How values of a unit are written."""
    known: dict[str, Callable[[float], str]] = {
        "s": format_seconds,
        "B": format_bytes,
        "MACs": format_count,
        "dB": lambda value: f"{value:.2f} dB",
    }
    return known.get(unit, lambda value: format_count(value) if value >= 1e4 else f"{value:.4g}")


def shown(estimate: Estimate | None, show: Callable[[float], str]) -> str:
    """An estimate with its interval."""
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None or estimate.method == "exact":
        return show(estimate.value)
    return f"{show(estimate.value)} [{show(estimate.low)}, {show(estimate.high)}]"


def _change(estimate: Estimate, is_ratio: bool, show: Callable[[float], str]) -> str:
    if is_ratio:
        return shown(estimate, lambda value: f"{value:.3f}x")

    def signed(value: float) -> str:
        return f"+{show(value)}" if value > 0 else ("0" if value == 0 else f"-{show(-value)}")

    return shown(estimate, signed)


def _own_sampling(found: OwnSampling) -> str:
    return f"{found.sampler}, {found.steps} steps, {found.unet_calls} calls of the UNet"


def protocol_card(evaluation: Evaluation) -> str:
    """The protocol card, Markdown: all that it takes to make the figures again."""
    protocol, machine = evaluation.protocol, evaluation.machine
    inherit = f", inheriting by `{evaluation.model.inherit}`" if evaluation.model.inherit else ""
    size = f"{protocol.image_size} px"
    if protocol.measured_size:
        size += f", measured at {protocol.measured_size} px ({protocol.resize_filter})"
    reference = "none"
    if protocol.reference:
        found = protocol.reference
        count = f"{found.count} images, " if found.count else ""
        reference = f"{found.name} ({found.kind}, {count}SHA-256 `{found.sha256}`)"
    rows = [
        ("protocol", protocol.name),
        ("model", f"`{evaluation.model.name}`, {evaluation.model.unet_class} `{evaluation.model.weights}`{inherit}"),
        ("teacher", f"`{evaluation.teacher.name}`, {evaluation.teacher.unet_class} `{evaluation.teacher.weights}`"),
        ("prompts", f"{protocol.prompt_count} of {protocol.prompts}, SHA-256 `{protocol.prompts_sha256}`"),
        ("sampler", f"{protocol.sampler}, {protocol.steps} steps, {protocol.unet_calls} calls of the UNet"),
        *([("the model's sampler", _own_sampling(evaluation.model.sampling))] if evaluation.model.sampling else []),
        ("guidance", f"{protocol.guidance:g}"),
        ("seeds", f"{protocol.seed} to {protocol.seed + protocol.prompt_count - 1}, one per image, drawn on the CPU"),
        ("images", size),
        ("reference", reference),
        *(("extractor", f"{e.name}: {e.weights}, SHA-256 `{e.sha256}`") for e in protocol.extractors),
        ("machine", f"{machine.device}, {machine.dtype}, {machine.threads} threads, {machine.processes} processes"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
    ]
    lines = ["# Protocol card", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""]
    if protocol.departures:
        lines += [f"Departures from the published protocol `{protocol.name}`:", ""]
        lines += [f"- {departure}" for departure in protocol.departures] + [""]
    intervals = (
        "Intervals are 95 %: of means and medians by bootstrap over images or turns, of few by Student or between two "
        "of them, of shares after Wilson; of set distances the spread of resampled images around the figure, the "
        "reference held fixed."
    )
    return "\n".join([*lines, intervals, "", "```bash", evaluation.command, "```", ""])
