"""What the benches of feature inheritance have found, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from documents.figures import RESULTS, decibels, percent, results, share, source, table

BENCH: Final = ("inheritance", "bench_inheritance")
NAMES: Final = {"calibrated": "**calibrated (ours)**"}
FEWER_CACHE: Final = "DeepCache in fewer steps"
RIVALS: Final = {  # what ours is over, in a cell, and what it is called
    "over_best_cache": "a cache",
    "over_cache_in_fewer_steps": "a cache in fewer steps",
    "over_fewer_steps": "fewer steps",
}
CELLS: Final = 4 * 3 * 3  # samplers, numbers of steps, times
AIM: Final = 6.0  # dB over the best cache
ALONE: Final = "search alone"


def inheritance_against() -> str:
    """Ours, the best cache, it in fewer steps, and the best of fewer steps, for every sampler and time."""
    found = results("inheritance")
    lines = []
    for cell in found["summary"]:
        rows = {row["role"]: row for row in _rows(found, cell) if not row["role"].startswith(ALONE)}
        ours, cache = rows["calibrated"], rows.get(cell.get("best_cache", ""))
        fewer = next((r for r in rows.values() if r["way"] == cell.get("fewer_steps")), None)
        lines.append(
            [
                f"{cell['sampler']}, {cell['steps']}",
                f"{cell['budget']}x",
                _reached(ours),
                "–" if cache is None else f"{cache['role']}: {_reached(cache)}",
                "–" if cache is None else _difference(cell, "over_best_cache"),
                "–" if cache is None else _time(cell),
                _reached(rows.get(FEWER_CACHE)),
                "–" if FEWER_CACHE not in rows else _difference(cell, "over_cache_in_fewer_steps"),
                _reached(fewer),
                "–" if fewer is None else _difference(cell, "over_fewer_steps"),
            ]
        )
    titles = (
        "sampler, steps", "time asked for", "calibrated", "best cache of others", "ours nearer by",
        "time for its PSNR", FEWER_CACHE, "ours nearer by", "fewer steps, best sampler", "ours nearer by",
    )  # fmt: skip
    return f"{table(titles, lines)}\n\n{_measured(found)}"


def inheritance_short() -> str:
    """Ours, the strongest cache, DeepCache in fewer steps, and the strongest of fewer steps, for the README."""
    found = results("inheritance")
    lines = []
    for cell in found["summary"]:
        rows = {row["role"]: row for row in _rows(found, cell)}
        fewer = next((r for r in rows.values() if r["way"] == cell.get("fewer_steps")), None)
        lines.append(
            [
                _named(cell),
                *(_reached(rows.get(role)) for role in ("calibrated", cell.get("best_cache"), FEWER_CACHE)),
                _reached(fewer),
            ]
        )
    titles = (
        "full run, time asked for", "calibrated", "best cache of others", FEWER_CACHE, "fewer steps, best sampler",
    )  # fmt: skip
    return f"{table(titles, lines)}\n\n{_measured(found)}"


def inheritance_setting() -> str:
    """On what it was measured."""
    found = results("inheritance")
    settings, machine = found["settings"], found["machine"]
    load = found.get("load_by_cell", found["other_load_cores"]).values()
    timed = [row for row in found["rows"] if "wall_share" in row]
    twice = [
        [row["share"] for row in _rows(found, cell) if row["role"].startswith("fewer steps")]
        for cell in found["summary"]
    ]
    apart = max((max(shares) / min(shares) - 1 for shares in twice if len(shares) > 1), default=0.0)
    pairs, clock = timed[0]["pairs"], median(abs(row["wall_share"] / row["share"] - 1) for row in timed)
    chosen_on = settings.get("validation_prompts", settings["prompts"])  # once as many as were measured on
    return (
        f"{pairs} test prompts and seeds, chosen on {chosen_on} others, one image at a time on "
        f"{machine['threads']} thread of {machine['device']}, each time the median ratio of the thread's processor "
        f"time in {settings['repeats']} runs in turns with the full run; other processes used up to "
        f"{max(load):.1f} cores meanwhile. On the clock the ratios differ by {percent(clock)} in the median; how sure "
        f"they are is told by the same number of full steps timed twice, which came out up to {percent(apart)} apart "
        f"({source(*BENCH)})"
    )


def inheritance_all() -> str:
    """Every way that was tried in the middle one of the times."""
    found = results("inheritance")
    budgets = sorted({cell["budget"] for cell in found["summary"]})
    middle = budgets[len(budgets) // 2]
    lines = []
    for cell in found["summary"]:
        if cell["budget"] != middle:
            continue
        for row in _rows(found, cell):
            if row["role"].startswith(ALONE) or "psnr" not in row:
                continue
            lines.append(
                [
                    f"{row['sampler']}, {row['steps']}",
                    NAMES.get(row["role"], row["role"]),
                    row["way"] if row["role"] != "calibrated" else "",
                    share(row["share"]),
                    "" if row.get("macs_share") is None else share(row["macs_share"]),
                    f"{row['psnr']:.1f} ± {row['psnr_interval']:.1f} dB",
                    f"{row['ssim']:.3f}",
                    f"{row['right']} (full run {row['full_right']})",
                    f"{row['frechet_to_full']:.2f}",
                ]
            )
    titles = ("sampler, steps", "", "way", "time", "MACs", "PSNR", "SSIM", "captions right", "Fréchet to full run")
    return table(titles, lines)


def inheritance_parts() -> str:
    """Ours without one ingredient at a time."""
    found = results("inheritance")
    rows = [row for row in found["rows"] if row["role"].startswith(ALONE)]
    if not rows:
        return f"Not measured yet (`tools/{BENCH[1]}.py` without `--no-ablations`)."
    lines = []
    for row in rows:
        whole = next(
            r for r in rows if r["role"] == ALONE and (r["sampler"], r["steps"]) == (row["sampler"], row["steps"])
        )
        without = row["role"].removeprefix(f"{ALONE}, ").replace("dynamic program", "any search: linear forecasts")
        lines.append(
            [
                f"{row['sampler']}, {row['steps']}, {row['budget']}x",
                "everything" if row is whole else without,
                share(row["share"]),
                f"{row['psnr']:.1f} ± {row['psnr_interval']:.1f} dB",
                "" if row is whole else _against(row, whole),
            ]
        )
    return table(("sampler, steps, time asked for", "search", "time", "PSNR", "against everything"), lines)


def _against(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if "over_everything" not in row:  # of before intervals of differences were kept
        return f"{row['psnr'] - whole['psnr']:+.1f} dB"
    mean, half = row["over_everything"]
    return f"{mean:+.1f} ± {half:.1f} dB"


def inheritance_predictions() -> str:
    """Predicted against measured time and planned against executed MACs of our schedules."""
    found = results("inheritance")
    cells, ours = found["summary"], [row for row in found["rows"] if row["role"] == "calibrated"]
    off = [abs(cell["time_off"]) for cell in cells]
    equal = sum(cell["macs_as_planned"] for cell in cells)
    full = sum(_equal(row) for row in ours)
    held = [row["sd15_mib_per_sample"] for row in ours]
    return (
        f"the predicted time of the calibrated schedules ({len(cells)}) on `mini-sd` is off by {percent(median(off))} "
        f"in the median and by {percent(max(off))} at most, on a machine that others used meanwhile; planned and "
        f"executed MACs are equal in {equal} of {len(cells)}, and in {full} of {len(ours)} where the same schedules "
        f"are gone through at the size of Stable Diffusion 1.5. There they hold at most {max(held):.1f} MiB per "
        f"sample in half precision ({source(*BENCH)})"
    )


def inheritance_full_size() -> str:
    """Predicted against measured time at the size of Stable Diffusion 1.5."""
    if not (RESULTS / "inheritance_full_size.json").exists():
        return f"Not measured yet (`tools/{BENCH[1]}.py --full-size`)."
    found = results("inheritance_full_size")
    rows = [
        [
            row["schedule"],
            share(row["predicted_share"]),
            share(row["share"]),
            percent(abs(row["off"])),
            "equal" if _equal(row) else "not equal",
            f"{row['sd15_mib_per_sample']:.1f} MiB",
        ]
        for row in found["rows"]
    ]
    titles = ("schedule", "time predicted", "measured", "off", "MACs planned and executed", "held per sample")
    return (
        f"{table(titles, rows)}\n\n{found['steps']} steps, of which the full run takes {found['full_seconds']:.0f} s "
        f"on {found['machine']['threads']} thread of {found['machine']['device']} "
        f"({source('inheritance_full_size', BENCH[1])})."
    )


def inheritance_overhead() -> str:
    """What the run time costs by itself, and what it holds."""
    if not (RESULTS / "inheritance_overhead.json").exists():
        return "What the run time costs by itself is not measured yet (`tools/bench_inheritance_overhead.py`)"
    found = results("inheritance_overhead")
    held = {row["rule"]: row["mib_per_sample"] for row in found["held"]}
    full, small = found.get("sd15 bf16"), found["mini-sd"]
    text = (
        f"With everything computed the run time costs {small['whole_microseconds_per_step']:.0f} µs a step on `mini-sd`"
    )
    if full is not None:
        text += f", which is {100 * full['whole_share_of_a_step']:.4f} % of a step of Stable Diffusion 1.5 in bfloat16"
    return (
        f"{text}. A sample of that size in half precision holds {held['uniform:3,branch=0,forecast=hold']:.1f} MiB at "
        f"the outermost cut and {held['uniform:3,branch=0']:.1f} with a linear forecast; DeepCache 0.1.1 holds "
        f"{found['deepcache_mib_per_sample']} whatever the branch "
        f"({source('inheritance_overhead', 'bench_inheritance_overhead')})"
    )


def inheritance_pictures() -> str:
    """Of one of the schedules: what every step does, and its pictures beside those of others."""
    shown = {
        "inheritance_steps.svg": "Parts of the UNet over steps: computed, held, forecast",
        "inheritance_grid.png": "Full run, ours, DeepCache and fewer steps at the same prompts and seeds",
    }
    return "\n\n".join(f"![{text}]({{results}}/{name})" for name, text in shown.items() if (RESULTS / name).exists())


def inheritance_misfits() -> str:
    """In how many of the cells the re-created schedules fit into the time."""
    found = results("inheritance")
    cells = len(found["summary"])
    fits = {name: sum(row["role"] == name for row in found["rows"]) for name in ("Faster Diffusion", "T-GATE")}
    return " and ".join(f"{name} in {count or 'none'} of {cells}" for name, count in fits.items())


def inheritance_deepcache() -> str:
    """DeepCache's own package beside our schedule of the same settings."""
    rows = [row for row in results("inheritance")["rows"] if row["role"] == "DeepCache 0.1.1 itself"]
    return "; ".join(
        f"under {row['sampler']} with {row['steps']} steps DeepCache 0.1.1 itself takes {row['their_seconds']:.3f} s "
        f"for what is `{row['way']}` here in {row['our_seconds']:.3f} s, and the latents differ by at most "
        f"{row['largest_difference']:.2g}"
        for row in rows
    )


def _rows(found: Any, cell: Any) -> Sequence[dict[str, Any]]:
    where = (cell["sampler"], cell["steps"], cell["budget"])
    return [row for row in found["rows"] if (row["sampler"], row["steps"], row.get("budget")) == where]


def _measured(found: Any) -> str:
    cells = found["summary"]
    lost = {_named(c): [what for over, what in RIVALS.items() if c.get(over, 0.0) < 0] for c in cells}
    nearer = "".join(f"; at {cell} {' and '.join(who)} came nearer" for cell, who in lost.items() if who)
    over = [c["over_best_cache"] for c in cells if "over_best_cache" in c]
    short = [f"{_named(c)} ({c['over_best_cache']:+.1f})" for c in cells if c.get("over_best_cache", AIM) < AIM]
    return (
        f"The bench goes through {CELLS} combinations of sampler, steps and time; measured so far: {len(cells)}, of "
        f"which the calibrated schedule came nearest in {len(cells) - sum(map(bool, lost.values()))}{nearer}. Over the "
        f"best cache of others it is by {min(over):.1f} to {max(over):.1f} dB, {median(over):.1f} in the median; the "
        f"aim was {AIM:.0f} dB, which it falls short of at {'; '.join(short) or 'none'}."
    )


def _named(cell: Any) -> str:
    return f"{cell['sampler']}, {cell['steps']} steps, {cell['budget']}x"


def _reached(row: Any) -> str:
    return "–" if row is None else f"{decibels(row['psnr'])} at {share(row['share'])}"


def _difference(cell: Any, what: str) -> str:
    return f"{cell[what]:+.1f} ± {cell[what + '_interval']:.1f} dB"


def _time(cell: Any) -> str:
    if "time_for_the_same_psnr" in cell:
        return f"{cell['time_for_the_same_psnr']:.2f} of its time"
    if "time_for_the_same_psnr_below" in cell:
        return f"under {cell['time_for_the_same_psnr_below']:.2f} of its time"
    return "not reached"


def _equal(row: Any) -> bool:
    return bool(row["sd15_planned_macs"] == row["sd15_executed_macs"])
