"""What installed packages of others and our calibrated schedule reach in the same time, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from documents.figures import decibels, results, share, source, table, value

_OURS: Final = "calibrated schedule"
_NAMES: Final = {"PyramidAttentionBroadcast": "Pyramid Attention Broadcast"}


def rivals_setting() -> str:
    """What was compared, and how."""
    found = results("rivals")
    setup, versions = found["setup"], found["packages"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    clock = "processor time" if setup["processor_time"] else "time"
    sampler = setup["scheduler"] or "the model's own sampler"
    return (
        f"{setup['steps']} steps of {sampler} at guidance {setup['guidance']:g}, one image, "
        f"{clock} of {found['machine']['threads']} thread on {found['machine']['processor']}; all chosen on "
        f"{setup['validation_prompts']} validation prompts, judged on {setup['test_prompts']} held-out captions and "
        f"seeds; {named} ({source('rivals', 'bench_rivals')})"
    )


def rivals_full() -> str:
    """The run that computes everything."""
    row = next(row for row in results("rivals")["rows"] if row["rival"] == "full run")
    return f"The full run takes {value(row['seconds']):.2f} s and gets {_right(row)} captions right"


def rivals() -> str:
    """For every budget ours and the best setting of every rival, the nearest to the full run first."""
    lines = []
    rows = [row for row in results("rivals")["rows"] if row["budget"] is not None]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        here = [row for row in rows if row["budget"] == budget]
        inside = sorted((row for row in here if "psnr" in row), key=lambda row: -value(row["psnr"]))
        lines += [[f"{budget:g}x", *_reached(row)] for row in inside]
        lines += [[f"{budget:g}x", *_too_slow(row)] for row in here if "psnr" not in row and "fastest" in row]
    titles = (
        "budget",
        "method",
        "best setting within it",
        "time",
        "PSNR",
        "SSIM",
        "captions right",
        "ours is nearer by",
    )
    return table(titles, lines)


def rivals_nearest() -> str:
    """For every budget who came nearest to the full run, and who next."""
    rows = [row for row in results("rivals")["rows"] if row["budget"] is not None and "psnr" in row]
    said = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        first, second = sorted((r for r in rows if r["budget"] == budget), key=lambda row: -value(row["psnr"]))[:2]
        nearest, next_one = (
            f"{'the ' if row['rival'] == _OURS else ''}{_name(row)} ({decibels(value(row['psnr']))})"
            for row in (first, second)
        )
        said.append(f"at {budget:g}x {nearest} came nearest, then {next_one}")
    return "; ".join(said)


def rivals_caches() -> str:
    """What diffusers' own caches do on a UNet."""
    lines = []
    for row in results("rivals")["refusals"]:
        if row["error"]:
            does = f"stops with `{row['error']}`"
        elif not row["changes"]:
            does = "runs, and changes nothing"
        else:
            does = "works"
        lines.append([f"`{row['cache']}`", row["hooks"], does])
    return table(("cache", "modules with a hook", "on the UNet, called as documented"), lines)


def _reached(row: Mapping[str, Any]) -> list[str]:
    setting = "" if row["rival"] == _OURS else f"{row['setting']} ({row['within']} of {row['tried']} kept it)"
    nearer = ""
    if "ours_over" in row:
        gain = row["ours_over"]
        nearer = f"{gain['value']:+.1f} dB ({gain['low']:+.1f} to {gain['high']:+.1f})"
    psnr = row["psnr"]
    return [
        f"**{_OURS}**" if row["rival"] == _OURS else _name(row),
        setting,
        f"{share(value(row['share']))}, {value(row['seconds']):.2f} s",
        f"{decibels(psnr['value'])} ({psnr['low']:.1f} to {psnr['high']:.1f})",
        f"{value(row['ssim']):.3f}",
        _right(row),
        nearer,
    ]


def _too_slow(row: Mapping[str, Any]) -> list[str]:
    setting = f"none of {row['tried']}; its fastest: {row['fastest']}"
    return [_name(row), setting, f"at best {share(row['fastest_share'])}", "", "", "", ""]


def _name(row: Mapping[str, Any]) -> str:
    return _NAMES.get(row["rival"], row["rival"])


def _right(row: Mapping[str, Any]) -> str:
    right = row["right"]
    return f"{round(right['value'] * right['n'])} of {right['n']}"
