"""What the benches of switching and of one budget over everything have found, in words and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Final

from scipy.stats import t as student_t

from documents.figures import decibels, percent, results, share, small, source, table

Row = Mapping[str, Any]
OURS: Final = "all together"
NOT_RUN: Final = "All together has not been measured yet."
EQUAL: Final = 0.05  # that two times may differ by to be called equal
RIVALS: Final = ("full model", "DeepCache", "T-Stitch")
SLOWER: Final = 1.01  # times: what is this much slower counts as of the same time
POINT: Final = 0.01  # of the target: captions right, Fréchet distance over the full run's, times as fast
DISTANCE: Final = 1.05
TIMES: Final = 4.0


def frontier_setting() -> str:
    """What was measured, on what."""
    found = results("frontier")
    reference, prompts = found["reference"], found["prompts"]
    by_quality = any(row["criterion"] == "quality" for row in found["rows"])
    quality = f", for quality on {found['quality_prompts']}" if by_quality else ""
    return (
        f"{found['test_prompts']} held-out captions and seeds; the full run is {reference['scheduler']} with "
        f"{reference['steps']} steps; schedules were measured on {prompts['calibration']} other prompts "
        f"and chosen on {prompts['validation']} more{quality} "
        f"({source('frontier', 'bench_frontier')})"
    )


def frontier() -> str:
    """Everything that was reported, by time."""
    found = results("frontier")
    reference = found["reference"]
    lines = [["the full run", "1.000x", "", "", f"{reference['right']}", f"{reference['frechet']:.2f}"]]
    for row in sorted(found["rows"], key=lambda row: -row["image_share"]):
        lines.append(
            [
                f"{_named(row)}: {row['way']}", share(row["image_share"]), _interval(row["psnr_each"]),
                small(row["latent_error"]), str(row["right"]), f"{row['frechet']:.2f}",
            ]
        )  # fmt: skip
    titles = ("way", "time", "PSNR", "error of the latents", f"captions right, of {reference['count']}", "Fréchet")
    return table(titles, lines)


def frontier_outer() -> str:
    """Where all together is on the outer side, and where it is not."""
    rows = results("frontier")["rows"]
    near = (row for row in rows if row["role"] == OURS and row["criterion"] == "fidelity")
    ours = sorted(near, key=lambda row: -row["image_share"])
    if not ours:
        return NOT_RUN
    said = []
    for row in ours:
        best = max(_as_fast(rows, row), key=lambda other: other["psnr"], default=None)
        if best is None:
            said.append(f"{share(row['image_share'])}: {decibels(row['psnr'])}, and nothing else is as fast")
            continue
        gain = [a - b for a, b in zip(row["psnr_each"], best["psnr_each"], strict=True)]
        said.append(
            f"{share(row['image_share'])}: {fmean(gain):+.1f} dB (± {_half_width(gain):.1f}) against "
            f"{best['role']} ({best['way']})"
        )
    return "All together in PSNR, pair by pair, against the best rival that takes no longer: " + "; ".join(said) + "."


def frontier_target() -> str:
    """Whether four times faster at the full run's quality is reached."""
    found = results("frontier")
    if all(row["role"] != OURS for row in found["rows"]):
        return NOT_RUN
    reference = found["reference"]
    good = [row for row in found["rows"] if _is_as_good(row, reference)]
    rivals = [row["image_share"] for row in good if row["role"] in RIVALS]
    margin = f"within {percent(POINT)} of the full run's captions and {percent(DISTANCE - 1)} of its Fréchet distance"
    chosen = [row for row in found["rows"] if row["role"] == OURS and row["criterion"] == "quality"]
    if not chosen:
        near = [row for row in good if row["role"] == OURS]
        return (
            f"Ways chosen for quality have not been measured by the bench yet; of those chosen for nearness "
            f"{len(near) or 'none'} is {margin}."
        )
    ours = [row for row in good if row in chosen]
    other = f"the fastest rival that is, takes {share(min(rivals))}" if rivals else "no rival is"
    if not ours:
        return f"Of {len(chosen)} ways that all together chose for quality none is {margin}; {other}."
    fastest = min(ours, key=lambda row: row["image_share"])
    times = 1 / fastest["image_share"], 1 / fastest["loop_share"]
    reached = "reached" if min(times) >= TIMES else "missed"
    off = [100 * (a - b) for a, b in zip(fastest["right_each"], reference["right_each"], strict=True)]
    return (
        f"Of {len(chosen)} way{'s' * (len(chosen) > 1)} that all together chose for quality, on other captions, the "
        f"fastest that is {margin} "
        f"is {times[0]:.1f} times as fast per image, text encoder and VAE included, and {times[1]:.1f} times without "
        f"({fastest['way']}; {fastest['right']} captions right where the full run has {reference['right']}, by "
        f"{fmean(off):+.1f} ± {_half_width(off):.1f} points, Fréchet distance {fastest['frechet']:.2f} and "
        f"{reference['frechet']:.2f}; the target of {TIMES:g} is {reached}); {other}."
    )


def frontier_switching() -> str:
    """Switching alone against T-Stitch's order."""
    rows = results("frontier")["rows"]
    lines, wins, equal = [], 0, 0
    budgets = sorted({row["budget"] for row in rows if row["role"] == "switching"}, reverse=True)
    for budget in budgets:
        ours, theirs = (
            next((row for row in rows if row["role"] == role and row["budget"] == budget), None)
            for role in ("switching", "T-Stitch")
        )
        if ours is None or theirs is None:
            continue
        ratio = theirs["latent_error"] / ours["latent_error"]
        logs = [math.log(b / a) for a, b in zip(ours["latent_error_each"], theirs["latent_error_each"], strict=True)]
        same = abs(theirs["image_share"] / ours["image_share"] - 1) <= EQUAL
        equal += same
        wins += same and ratio > 1
        middle, half = fmean(logs), _half_width(logs)
        lines.append(
            [
                f"{budget:g}x", f"{share(ours['image_share'])}, {small(ours['latent_error'])}",
                f"{share(theirs['image_share'])}, {small(theirs['latent_error'])}", f"{ratio:.2f} times",
                f"{math.exp(middle):.2f} ({math.exp(middle - half):.2f} to {math.exp(middle + half):.2f})",
            ]
        )  # fmt: skip
    if not lines:
        return "Not measured at a budget that T-Stitch's order of these students keeps."
    said = f"Of {len(lines)} budgets {equal} had times within 5 % of each other; in {wins} of those ours is the lower."
    titles = ("budget", "switching: time, error", "T-Stitch's order", "its error over ours", "of a single image")
    return table(titles, lines) + f"\n\n{said}"


def frontier_predicted() -> str:
    """Predicted times against measured ones."""
    rows = list({row["key"]: row for row in results("frontier")["rows"] if row["predicted_share"]}.values())
    off = sorted(row["image_share"] / row["predicted_share"] - 1 for row in rows)
    near = sum(abs(value) <= 0.05 for value in off)
    return (
        f"of {len(off)} ways the measured time of an image is {percent(off[0])} to {percent(off[-1])} off what was "
        f"predicted, {near} of them within 5 %"
    )


def members() -> str:
    """Students that were made together, and what their schedule comes to beside others in the same time."""
    found = results("frontier")["students"]
    if found is None:
        return "Not measured on `mini-sd` as it is (`tools/bench_frontier.py` without `--members`)."
    ladder, calibration, lineup = found["ladder"], found["calibration"], found["lineup"]
    chosen = " and ".join(share(ladder[i]["latency"]) for i in lineup["students"])
    steps = calibration["steps"]
    counted = ", ".join(f"{steps.count(name)} of `{name}`" for name in dict.fromkeys(steps))
    proof = "proven to be the least" if lineup["proven"] else "with a bound"
    lines = [
        [e["role"], e["way"], share(e["share"]), "" if e["latent_error"] is None else small(e["latent_error"]),
         f"{e['test']['psnr']:.1f} ± {e['test']['psnr_interval']:.1f} dB"]
        for e in calibration["entrants"]
    ]  # fmt: skip
    asked = calibration["goal"]["budget"].removeprefix("latency=")
    return (
        f"Asked for {asked}, the program took the students of {chosen} "
        f"from a ladder of {len(ladder)} between {share(ladder[0]['latency'])} and {share(ladder[-1]['latency'])} "
        f"({proof}), and the calibration gave them these steps: {counted}.\n\n"
        + table(("", "way", "time of the loop", "error of the latents", "PSNR"), lines)
    )


def _is_as_good(row: Row, reference: Mapping[str, Any]) -> bool:
    as_right = row["right"] >= reference["right"] - POINT * reference["count"]
    return bool(as_right and row["frechet"] <= DISTANCE * reference["frechet"])


def _named(row: Row) -> str:
    return str(row["role"]) + ("" if row["criterion"] == "fidelity" else ", chosen for quality")


def _as_fast(rows: Sequence[Row], ours: Row) -> list[Row]:
    return [row for row in rows if row["role"] in RIVALS and row["image_share"] <= ours["image_share"] * SLOWER]


def _interval(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {_half_width(values):.1f} dB"


def _half_width(values: Sequence[float]) -> float:
    """Half the width of a mean's 95 % interval (Student)."""
    return float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
