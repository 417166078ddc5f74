"""What the bench of distillation has found, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from documents.figures import decibels, percent, results, small, source, table

_QUIET: Final = 0.15  # cores that other programs may use beside a timing, as `measuring.py` has it


def distill_recovery() -> str:
    """Where every arm begins, what it ends with, and how soon ours is there."""
    found = results("distill")
    lines = []
    for budget, rows in found["recovery"].items():
        verdict = found["verdicts"].get(budget, {})
        for row in rows:
            first, last = row["curve"][0], _kept(row)
            soon = verdict.get(f"share of the steps to where {row['name']} ends", {}).get("psnr", "")
            lines.append(
                [
                    budget,
                    row["name"],
                    f"{small(first['damage'])} → {small(row['curve'][-1]['damage'])}",
                    f"{decibels(first['psnr'])} → {decibels(row['curve'][-1]['psnr'])}",
                    f"{first['frechet']:.2f} → {row['curve'][-1]['frechet']:.2f}",
                    f"step {row['kept']}: {decibels(last['psnr'])}, {last['student_right']} of {last['pairs']} right",
                    soon if soon == "" else "never" if soon is None else percent(soon),
                ]
            )
    titles = (
        "budget", "student", "damage", "PSNR", "Fréchet distance", "weights that are kept",
        "ours has the last PSNR after",
    )  # fmt: skip
    return table(titles, lines) + "\n\n" + _how(found)


def distill_line() -> str:
    """What a short training does for our students, in a sentence."""
    found = results("distill")
    parts = []
    for budget, rows in found["recovery"].items():
        row = next(row for row in rows if row["name"] == "ours")
        first, last = row["curve"][0], _kept(row)
        parts.append(
            f"at {budget} damage {small(first['damage'])} → {small(last['damage'])}, "
            f"{decibels(first['psnr'])} → {decibels(last['psnr'])}"
        )
    training = found["training"]
    return (
        f"{training['steps']} steps of {training['batch']} images, with the weights of the best probe: "
        f"{'; '.join(parts)} ({source('distill', 'bench_distill')})"
    )


def distill_parts() -> str:
    """What ours comes to without a part of it, at the last step."""
    found = results("distill")
    lines = []
    for budget, rows in found["parts"].items():
        whole = [row for row in found["recovery"].get(budget, []) if row["name"] == "ours"]
        for row in (*whole, *rows):
            first, last = row["curve"][0], row["curve"][-1]
            lines.append(
                [
                    budget,
                    row["name"],
                    *(
                        f"{show(first[measure])} → {show(last[measure])}"
                        for measure, show in (("damage", small), ("latent_error", small), ("psnr", decibels))
                    ),
                ]
            )
    if not lines:
        return "Not measured on `mini-sd` as it is (`tools/bench_distill.py --parts all`)."
    return table(("budget", "training", "damage", "error of the latents", "PSNR"), lines)


def distill_overhead() -> str:
    """The trainer against a bare loop."""
    found = results("distill")["overhead"]
    return (
        f"the trainer takes {found['trainer']:.2f} steps in the time of {found['bare loop']:.2f} of a bare loop of the "
        f"same passes, {percent(found['share'])}{_beside(found)} ({source('distill', 'bench_distill')})"
    )


def distill_full_size() -> str:
    """Steps of full-size Stable Diffusion."""
    found: Mapping[str, Any] = results("distill_full_size")
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    lines = [
        [
            str(row["batch"]),
            f"{row['seconds_per_step']:.1f} s",
            f"{row['images_per_second']:.3f}",
            f"{row['images_per_second_without_cache']:.3f}",
            f"{row['peak_gib']:.1f} GiB",
            f"{row['expected_gib']:.1f} GiB",
        ]
        for row in rows
    ]
    titles = ("batch", "step", "images per second", "without the cache", "peak memory", "foretold")
    return table(titles, lines) + (
        f"\n\n{found['model']} in {found['dtype']}, {found['machine']['device']}{_beside(found)} "
        f"({source('distill_full_size', 'bench_distill_full_size')})."
    )


def _beside(found: Mapping[str, Any]) -> str:
    """That others used the machine meanwhile, where they did."""
    load = found.get("other_load_cores", 0.0)
    return f", while other programs used {load:.1f} cores" if load > _QUIET else ""


def _kept(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point of a curve whose weights the arm ends with."""
    found: Mapping[str, Any] = next(point for point in row["curve"] if point["step"] == row["kept"])
    return found


def _how(found: Mapping[str, Any]) -> str:
    training = found["training"]
    teacher = found["recovery"]["0.5x"][0]["curve"][0]
    return (
        f"From the first to the last of {training['steps']} steps of {training['batch']} images out of "
        f"{training['data']['size']}, on {found['prompts']} held-out captions and seeds, of which the teacher gets "
        f"{teacher['teacher_right']} wholly right ({source('distill', 'bench_distill')})."
    )
