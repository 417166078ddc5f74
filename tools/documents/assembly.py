"""What the benches of assembly have found, in words and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from documents.figures import decibels, minutes, percent, results, share, small, source, table, value

MINI_SD: Final = Path(__file__).parents[2] / "asdm_compress" / "models" / "mini_sd"
OURS: Final = "ours"
BUDGETS: Final = (0.9, 0.8, 0.7, 0.6, 0.5)
_PRECISIONS: Final = {"float32": "fp32", "bfloat16": "bf16"}
REFITTED_KNAPSACK: Final = "drop-only knapsack, with our refit"
# Cuts of others with what stays solved anew by us are no rivals.
REFITTED: Final = ("with our refit", "refitted", "ours")


def main_job() -> str:
    """The README's first command."""
    found = results("assemble_mini_sd")
    row = next(r for r in found["rows"] if r["budget"] == 0.7)
    evidence, quality = row["evidence"], row["quality"]
    costs = {what: evidence["measured"][what] / evidence["teacher"][what] for what in ("macs", "params")}
    predicted = evidence["predicted"]["latency"] / evidence["teacher"]["latency"]
    return (
        f"asked for 0.7x, the student takes {share(evidence['measured_latency_ratio'])} of the teacher's time "
        f"(predicted {share(predicted)}), {share(costs['macs'])} of its MACs and {share(costs['params'])} of its "
        f"parameters, after {len(row['edits'])} edits. Its damage was predicted as "
        f"{small(evidence['predicted_damage'])}, measured as {small(evidence['measured_damage'])} and is "
        f"{small(evidence['held_out_damage'])} on held-out prompts; {quality['pairs']} images of held-out prompts "
        f"and seeds are {decibels(quality['psnr'])} from the teacher's. All of it took {minutes(row['seconds'])} on "
        f"two CPU cores ({source('assemble_mini_sd', 'bench_assemble')})."
    )


def main_job_duration() -> str:
    """How long the README's first command takes."""
    row = next(r for r in results("assemble_mini_sd")["rows"] if r["budget"] == 0.7)
    return f"{row['seconds'] / 60:.0f} minutes"


def against_others() -> str:
    """Ours and the best rival of every budget."""
    rows = results("assembly")["rows"]
    lines = []
    for budget in sorted({r["budget"] for r in rows if r["budget"] and r["budget"] < 1}, reverse=True):
        here = [r for r in rows if r["budget"] == budget and "damage" in r]
        ours = next((r for r in here if r["maker"] == OURS), None)
        rivals = [r for r in here if not r["maker"].startswith(OURS) and not r["maker"].endswith(REFITTED)]
        if ours is None or not rivals:
            continue
        best, nearest = min(rivals, key=lambda r: r["damage"]), max(rivals, key=lambda r: r["psnr"])
        lines.append(
            [
                f"{budget}x",
                f"{share(ours['latency_ratio'])}, {small(ours['damage'])}, {decibels(ours['psnr'])}",
                f"{best['maker']}: {share(best['latency_ratio'])}, {small(best['damage'])}, {decibels(best['psnr'])}",
                f"{best['damage'] / ours['damage']:.1f} times",
                f"{ours['psnr'] - nearest['psnr']:+.1f} dB",
            ]
        )
    titles = ("budget", "ours: latency, damage, PSNR", "the best of theirs", "less damage", "nearer the teacher")
    return table(titles, lines)


def all_plans() -> str:
    """Every row of the bench of plans."""
    rows = [r for r in results("assembly")["rows"] if r["maker"] != "teacher"]
    rows.sort(key=lambda r: (-(r["budget"] or 0), r.get("damage", float("inf"))))
    return table(
        ("budget", "plan", "latency", "damage, held out", "PSNR", "captions right", "Fréchet to teacher"),
        [_plan_row(row) for row in rows],
    )


def sharing() -> str:
    """What `shared` saves by itself."""
    found = results("shared")
    parts = [
        f"`{row['model']}` at {row['pixels']} px in {_PRECISIONS[row['dtype']]} {share(value(row['latency_ratio']))} "
        f"of the time and {share(row['macs_ratio'])} of the MACs"
        for row in found["rows"]
    ]
    return f"{'; '.join(parts)} ({source('shared', 'bench_shared')}, {found['machine']['processor']})"


def refitted_cuts() -> str:
    """Where another search's cuts come to with our refit, beside our own plans."""
    rows = {(r["budget"], r["maker"]): r for r in results("assembly")["rows"] if r["budget"] and "damage" in r}
    ahead, behind = [], []
    for budget in BUDGETS:
        ours, theirs = (rows.get((budget, maker)) for maker in (OURS, REFITTED_KNAPSACK))
        if ours is not None and theirs is not None:
            before = theirs["damage"] < ours["damage"]
            times = ours["damage"] / theirs["damage"] if before else theirs["damage"] / ours["damage"]
            taking = f"in {share(theirs['latency_ratio'])}, ours in {share(ours['latency_ratio'])}"
            (ahead if before else behind).append(f"{times:.1f} times at {budget}x, {taking}")
    found = []
    if behind:
        found.append(f"have more damage than our plan ({'; '.join(behind)})")
    if ahead:
        found.append(f"have less than it ({'; '.join(ahead)})")
    return " and ".join(found)


def plans_note() -> str:
    """Where the rows are from."""
    found = results("assembly")
    runs = found["command"].count(";") + 1
    return (
        f"Measured in {runs} runs on one core of {found['machine']['processor']}; other programs used "
        f"{found['other_load_cores']:.1f} cores meanwhile, which disturbs timings: each row's latency is measured anew "
        "at its end"
    )


def _plan_row(row: dict[str, Any]) -> list[object]:
    budget = f"{row['budget']}x" if row["budget"] else ""
    if "damage" not in row:
        return [budget, row["maker"], f"at best {share(row['fastest'])}" if "fastest" in row else "none", *[""] * 4]
    return [
        budget, row["maker"], share(row["latency_ratio"]), small(row["damage"]), decibels(row["psnr"]),
        row["student_right"], f"{row['frechet_to_teacher']:.2f}",
    ]  # fmt: skip


def plans_setting() -> str:
    """What the rows of the bench of plans are measured on."""
    found = results("assembly")
    teacher = next(r for r in found["rows"] if r["maker"] == "teacher")
    return (
        f"damage on {found.get('damage_prompts', found['prompts'])} held-out captions and seeds, pictures of "
        f"{found['prompts']} of them ({source('assembly', 'bench_assembly')}), of which the teacher itself gets "
        f"{teacher['teacher_right']} wholly right{_still_to_come(found['rows'])}"
    )


def _still_to_come(rows: Sequence[Mapping[str, Any]]) -> str:
    """The budgets that the bench has not come to."""
    missing = [f"{budget}x" for budget in BUDGETS if all(row["budget"] != budget for row in rows)]
    return f"; not measured on this machine: {', '.join(missing)}" if missing else ""


def predictions() -> str:
    """How far predictions were from measurements."""
    ours = [r for r in results("assembly")["rows"] if r["maker"] == OURS and "damage" in r]
    off = [r["measured_damage"] / r["predicted_damage"] - 1 for r in ours]
    unseen = [r["damage"] / r["measured_damage"] for r in ours]
    time = [r["latency_ratio"] / r["predicted_latency_ratio"] - 1 for r in ours]
    return (
        f"predicted damages were off by {min(off):+.0%} to {max(off):+.0%}, the whole plan's damage on the held-out "
        f"captions was {min(unseen):.2f} to {max(unseen):.2f} times what had been measured on the calibration's own, "
        f"and predicted latencies were off by {min(time):+.1%} to {max(time):+.1%}"
    )


def full_size() -> str:
    """Single plans at the size of Stable Diffusion 1.5."""
    found = results("full_size")
    return table(
        ("budget", "predicted", "measured", "off", "peak memory"),
        [
            [
                f"{r['budget']}x", share(r["predicted_latency_ratio"]), share(r["measured_latency_ratio"]),
                f"{r['off']:+.1%}", f"{r['peak_gib']:.1f} GiB",
            ]
            for r in found["plans"]
        ],
    )  # fmt: skip


def full_size_setting() -> str:
    """How long the parts of a search take at the size of Stable Diffusion 1.5."""
    found = results("full_size")
    return (
        f"profiling every site took {found['profile_seconds']:.0f} s and timing every convolution and narrowing in its "
        f"place {found['slot_costs_seconds']:.0f} s ({source('full_size', 'bench_full_size')})"
    )


def full_size_fits() -> str:
    """How long single fits take there."""
    fits = results("full_size")["fits"]
    each = "; ".join(f"`{f['edit']}` at `{f['site']}` {f['seconds']:.0f} s" for f in fits)
    return f"{each}; {max(f['peak_gib'] for f in fits):.1f} GiB at most"


def starts() -> str:
    """What the convolutions of slots may start from."""
    rows = results("starts")["rows"]
    return table(
        ("start", "slot", "damage", "PSNR", "fit"),
        [
            [
                r["start"], "–" if r["edit"] == "drop" else f"`{r['edit']}`", small(r["damage"]), decibels(r["psnr"]),
                f"{r['fit_seconds']:.0f} s" if r["fit_seconds"] else "",
            ]
            for r in rows
        ],
    )  # fmt: skip


def targets() -> str:
    """What slots may be fitted for."""
    said = {
        "own part": "the removed module's own part",
        "in order": "what the teacher has behind it, on the student's activations",
        "in order, refitted": "the same with what stays refitted, the default",
        "block": "each block's output, from there on, all its slots and projections jointly by L-BFGS, stopped by "
        "held-out prompts; not used",
        "output": "the damage itself, from the refitted on, all fitted weights jointly by a few rounds of it; not used",
    }
    return "\n".join(
        f"- {said[r['target']]}: {small(r['damage'])}, {decibels(r['psnr'])}, {r['fit_seconds']:.0f} s"
        for r in results("targets")["rows"]
    )


def narrowing() -> str:
    """What narrowing costs by the importance that it goes by."""
    found = results("narrowing")
    means = found["geometric_mean"]
    return (
        f"{len(found['rows'])} modules of `mini-sd`, each alone narrowed to half, geometric mean of the damages on "
        f"held-out prompts ({source('narrowing', 'bench_narrowing')}): {small(means['size, not refitted'])} by the "
        f"projections' size with nothing refitted, as a pruning library leaves it; with the next projection refitted "
        f"{small(means['size'])} by size, {small(means['taylor'])} by Taylor importance and "
        f"{small(means['reconstruction'])} by reconstruction, which a search uses."
    )


def experts() -> str:
    """What routing costs."""
    rows = results("experts")["rows"]
    by_time, by_features = ([value(r[key]) for r in rows] for key in ("timestep_ratio", "feature_ratio"))
    near = sum(ratio <= 1.03 for ratio in by_time)
    return (
        f"A slot of 8 experts against a plain convolution of the same shape, at the {len(rows)} shapes of SD 1.5's "
        f"levels in fp32 ({source('experts', 'bench_experts')}): routed by the timestep {min(by_time):.3f} to "
        f"{max(by_time):.3f} of its time ({near} of {len(rows)} within 3 %), routed by the features "
        f"{min(by_features):.2f} to {max(by_features):.2f}."
    )


def programs() -> str:
    """Which programs open which students, decided from their configs."""
    from make_programs import table as programs_table

    return programs_table()


def bundled_model() -> str:
    """What the bundled model draws."""
    found = results("mini_sd")
    counts = ("1 objects", "2 objects", "3 objects")
    read = found["reader_accuracy"]
    said = {
        f"prompt accuracy (everything that the caption says is right) at guidance {found['guidance']:g}": found[
            "prompt_accuracy"
        ],
        "the reader on the VAE's own reconstructions, the most that can be reached": read["vae_reconstructions"],
        "the reader on rendered scenes": read["rendered"],
    }
    return table(
        ("`mini-sd`, held-out captions, DPM-Solver++ with 25 steps", "one object", "two objects", "three objects"),
        [[what, *(percent(row[count]) for count in counts)] for what, row in said.items()],
    )


def bundled_distance() -> str:
    """How far the bundled model's pictures are from what they should be."""
    found = results("mini_sd")
    distance = found["frechet_distance"]
    return (
        f"Fréchet distance to rendered scenes in the reader's features: {distance['samples_to_rendered']:.2f}, against "
        f"{distance['vae_reconstructions_to_rendered']:.2f} for the VAE's reconstructions; VAE "
        f"{decibels(found['vae_psnr_db'])}. {found['captions_per_object_count']} captions per number of objects, each "
        f"with a combination never seen in training ({source('mini_sd', 'bench_mini_sd')})"
    )


def bundled_training() -> str:
    """How long the bundled model's UNet was trained."""
    facts = json.loads((MINI_SD / "training.json").read_text(encoding="utf-8"))
    return f"{facts['unet']['minutes']:.0f} minutes"


def matrix() -> str:
    """What works around a UNet."""
    found = results("matrix")
    subjects = list(found["plans"])
    return table(
        ("", *subjects),
        [[row["name"], *(_cell(row["cells"].get(who)) for who in subjects)] for row in found["rows"]],
    )


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if not cell["works"]:
        return f"no: {cell['error'] if 'error' in cell else cell.get('note') or _off(cell)}"
    words = ["yes"]
    if "difference" in cell:
        words.append(_off(cell))
    return ", ".join([*words, cell["note"]] if "note" in cell else words)


def _off(cell: dict[str, Any]) -> str:
    size = cell["difference"]
    return "exact" if size == 0 else f"{size:.2%}" if cell["relative"] else f"{size:.0e}"
