"""Recovery by distillation: our plans and recipe against others' at equal steps and data, and what each part is worth.

    python tools/bench_distill.py                   # alone on the machine; see --help for a part of it
    python tools/bench_distill.py --quick           # minutes: whether everything runs; its figures mean little
    python tools/bench_distill.py --arms ours,laptop --budgets 0.5 --set optimiser.learning_rate=1e-4

Every arm has the same images, batches, steps and optimiser, and a learning rate by the same rule from the damage that
it starts with (`rate_for`): published rates are for UNets a hundred times as large. The curves are of averaged weights
on held-out prompts. As in `asdm-compress distill`, what an arm ends with are the weights of the probe of least damage,
that before training included; its prompts are others than those whose pictures are judged. (That rule was chosen when
the first curves were seen: by the latents' error before.) After each arm tools/results/distill.json and distill.svg are
written; a run goes on where one with the same settings has stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from distill_arms import BUDGETS, Arm, Arms, mini_training
from measuring import RESULTS, LoadMeter, Resumable, check_alone
from mini_sd.weights import bundled_weights

from asdm_compress.core.distillation import Distillation, changed
from asdm_compress.core.files import cache_folder
from asdm_compress.distillation.batches import Batches
from asdm_compress.distillation.cache import LatentCache, cached
from asdm_compress.distillation.encoding import Encoder
from asdm_compress.distillation.features import FeatureUNet
from asdm_compress.distillation.losses import loss_terms, noise_scheduler, weighted_sum
from asdm_compress.distillation.pairs import find_pairs
from asdm_compress.distillation.probe import Probe, ProbeResult
from asdm_compress.distillation.selection import choose_parameters, phases_of, units_around_cuts
from asdm_compress.distillation.sources import CaptionSource, SceneSource
from asdm_compress.distillation.trainer import LoopSettings, Subjects, Trainer
from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import to_tensor
from asdm_compress.evaluation.quality import assess, scene_features
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.workflows.assemble import with_unet

SAMPLING = SamplingSettings(25, 5.0, seed=70_000)
HELD_OUT_SEED = 4_242
PROBE_PROMPTS = 16
IMAGE_FREE_SHARE = 8  # of so many items the teacher makes one: sampling is what it costs


@dataclass
class Judge(Probe):
    """A probe that also reads pictures, of prompts of its own; `curve` keeps what it has found, by calls."""

    pipeline: StableDiffusionPipeline
    count: int
    curve: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        captions = sample_captions(self.count + PROBE_PROMPTS, HELD_OUT_SEED)
        self.captions, choosing = captions[: self.count], captions[self.count :]
        super().__init__(self.pipeline, [c.text for c in choosing], replace(SAMPLING, steps=10))
        self.pictures = sample(self.pipeline, [c.text for c in self.captions], SAMPLING)
        self.features = scene_features(to_tensor(self.pictures.images))

    def measure(self, student: UNet2DConditionModel) -> ProbeResult:
        """As the training's own probe, with the pictures' worth noted down."""
        found = super().measure(student)
        training = student.training
        student.eval()
        pictures = sample(with_unet(self.pipeline, student), [c.text for c in self.captions], SAMPLING)
        student.train(training)
        quality = assess(self.pictures, pictures, self.captions).as_json()
        distance = frechet_distance(scene_features(to_tensor(pictures.images)), self.features)
        self.curve.append({"damage": found.damage, "latent_error": found.latent_error, **quality, "frechet": distance})
        return found


class Bench:
    """The teacher, and the data that everybody trains on."""

    def __init__(self, arguments: argparse.Namespace, training: Distillation) -> None:
        self.arguments = arguments
        self.pipeline = load_pipeline("mini-sd", LoadOptions())
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher = self.pipeline.unet
        self.arms = Arms(self.pipeline, training, arguments.work, arguments.rivals_rate)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.source = SceneSource(arguments.items)
        self.images = cached(self.source, Encoder(self.pipeline), "refuse")
        self._judge: Judge | None = None

    @property
    def judge(self) -> Judge:
        """Made when it is first needed: the teacher samples for it."""
        self._judge = self._judge or Judge(self.pipeline, self.arguments.prompts)
        return self._judge

    def cache(self, arm: Arm) -> LatentCache:
        """The data of an arm."""
        if not arm.captions_only:
            return self.images
        count = max(64, self.arguments.items // IMAGE_FREE_SHARE)
        texts = tuple(item.caption for item in self.source.read(0, count, 8) if hasattr(item, "caption"))
        encoder = Encoder(self.pipeline, SamplingSettings(25, 5.0), makes_images=True)
        return cached(CaptionSource(texts), encoder, "refuse")

    def subjects(self, arm: Arm, training: Distillation) -> Subjects:
        """What the trainer takes."""
        student = arm.start()
        pairs = find_pairs(student, self.teacher, arm.plan, training.losses.features) if training.losses.feature else ()
        noising = noise_scheduler(self.pipeline.scheduler.config)
        batches = Batches(self.cache(arm), training, int(noising.config.num_train_timesteps))
        phases = phases_of(training, student, arm.damage)
        around = units_around_cuts(student, self.teacher, arm.plan)
        ours, theirs = tuple(p.student for p in pairs), tuple(p.teacher for p in pairs)
        return Subjects(student, self.teacher, noising, batches, phases, ours, theirs, around)

    def run(self, arm: Arm, points: int) -> dict[str, Any]:
        """Train it, and judge it at the start and at so many points on the way."""
        training = arm.training
        judge = self.judge
        judge.curve.clear()
        began = time.monotonic()
        every = max(1, training.steps // points)
        training = changed(training, {"probe_every": every})
        loop = LoopSettings(save_every=10**9, log_every=min(10, every))
        with tempfile.TemporaryDirectory() as folder:
            Trainer(self.subjects(arm, training), training, loop, Path(folder), self.accelerator, judge).train()
        steps = [0, *range(every, training.steps + 1, every)]
        steps += [training.steps] if steps[-1] != training.steps else []
        curve = [{"step": step, **row} for step, row in zip(steps, judge.curve, strict=True)]
        return {"seconds": round(time.monotonic() - began, 1), "curve": curve}

    def overhead(self, steps: int) -> dict[str, float]:
        """Steps per second of the trainer, and of a bare loop of the same passes on one batch that lies ready.

        Between the end of the first and that of the last step; by turns, and of each the best of three: what other
        programs take is in the others.
        """
        arm = next(self.arms.recovery(BUDGETS[0]))
        training = changed(arm.training, {"steps": steps, "trains": "all", "probe_every": 0})
        loop = LoopSettings(save_every=10**9)
        seconds: dict[str, list[float]] = {"trainer": [], "bare loop": []}
        for _ in range(3):
            subjects = self.subjects(arm, training)
            ended: list[float] = []

            def report(done: int, total: int, text: str, ended: list[float] = ended) -> None:
                ended.append(time.perf_counter())

            seconds["bare loop"].append(_bare_loop(subjects, training, self.accelerator.device))
            with tempfile.TemporaryDirectory() as folder:
                Trainer(subjects, training, loop, Path(folder), self.accelerator, report=report).train()
            seconds["trainer"].append(ended[-1] - ended[0])
        rates = {name: (steps - 1) / min(taken) for name, taken in seconds.items()}
        return {**rates, "share": rates["trainer"] / rates["bare loop"]}


def main() -> None:
    """Run the arms that are asked for and are not in the results yet."""
    arguments = _arguments()
    changes = {name: yaml.safe_load(value) for name, value in (one.split("=", 1) for one in arguments.set)}
    training = changed(mini_training(arguments.steps, arguments.batch, arguments.items), changes)
    settings = {
        "training": training.model_dump(mode="json", exclude_none=True),
        **{name: getattr(arguments, name) for name in ("prompts", "points", "rivals_rate")},
        "mini_sd": bundled_weights(),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Resumable("distill", __doc__ or "", device, arguments.out, setting=settings).begin()
    result = results.facts = {"recovery": {}, "parts": {}, **results.facts}
    bench = Bench(arguments, training)
    for section, budget, arm in _wanted(bench, arguments):
        rows = result[section].setdefault(f"{budget}x", [])
        if any(row["name"] == arm.name for row in rows):
            continue
        points = arguments.points if section == "recovery" else 1  # what a part is worth shows in the end
        rows.append({"name": arm.name, **bench.run(arm, points)})
        print(json.dumps({"budget": budget, "name": arm.name, **kept(rows[-1])}), flush=True)
        _write(results)
    if arguments.overhead_steps and "overhead" not in result:
        meter = LoadMeter()
        found = bench.overhead(arguments.overhead_steps)
        result["overhead"] = {**found, "other_load_cores": round(meter.others(), 2)}
        print(json.dumps({"overhead": result["overhead"]}), flush=True)
    _write(results)
    print(json.dumps(result["verdicts"], indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, items and prompts, into a temporary file")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--prompts", type=int, default=150, help="held-out prompts that pictures are judged on")
    parser.add_argument("--points", type=int, default=8, help="points of a curve, that of the start apart")
    parser.add_argument("--budgets", help="0.7,0.5 by default; `none` for the parts or the overhead alone")
    parser.add_argument("--arms", help="names with commas, of the recovery; all by default")
    parser.add_argument("--parts", help="of what is left out, names with commas, or all")
    parser.add_argument("--overhead-steps", type=int, default=20, help="0 for none")
    parser.add_argument("--rivals-rate", type=float, help="their learning rate, if not by the rule that ours is")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as losses.task=1")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of distill.json")
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "bench-distill", help="where fitted students stay"
    )
    arguments = parser.parse_args()
    check_alone()
    if arguments.quick:
        arguments.steps, arguments.batch, arguments.items, arguments.overhead_steps = 8, 4, 64, 3
        arguments.prompts, arguments.points = 8, 2
        if arguments.out == RESULTS:
            arguments.out = Path(tempfile.mkdtemp())
    return arguments


def _wanted(bench: Bench, arguments: argparse.Namespace) -> Iterator[tuple[str, float, Arm]]:
    budgets = {None: BUDGETS, "none": ()}.get(arguments.budgets)
    if budgets is None:
        budgets = tuple(map(float, arguments.budgets.split(",")))
    for budget in budgets:
        for arm in bench.arms.recovery(budget):
            if arguments.arms is None or arm.name in arguments.arms.split(","):
                yield "recovery", budget, arm
    if arguments.parts:
        for budget, arm in ((share, arm) for share in BUDGETS for arm in bench.arms.parts(share)):
            if arguments.parts == "all" or arm.name in arguments.parts.split(","):
                yield "parts", budget, arm


def _write(results: Resumable) -> None:
    result = results.facts
    for row in (row for section in ("recovery", "parts") for rows in result[section].values() for row in rows):
        row["kept"] = kept(row)["step"]
    result["verdicts"] = {budget: verdict(rows) for budget, rows in result["recovery"].items()}
    results.write()
    draw(result, results.path.with_suffix(".svg"))


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far ours is from the teacher, and at what share of the steps it has reached where each rival ends.

    That is the rival's last step: which weights to keep is our rule, not theirs.
    """
    named = {row["name"]: row for row in rows}
    if "ours" not in named:
        return {}
    ours, last = named["ours"]["curve"], kept(named["ours"])
    found: dict[str, Any] = {
        "points below the teacher": 100 * (last["teacher_right"] - last["student_right"]) / last["pairs"]
    }
    for name, row in named.items():
        if name == "ours":
            continue
        end = row["curve"][-1]
        found[f"share of the steps to where {name} ends"] = {
            measure: _share_to_reach(ours, measure, end[measure], sign)
            for measure, sign in (("psnr", 1), ("frechet", -1), ("student_right", 1), ("latent_error", -1))
        }
    return found


def kept(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point of an arm's curve whose weights the trainer keeps: the first of least damage."""
    return min(row["curve"], key=lambda point: point["damage"])


def _share_to_reach(curve: Sequence[Mapping[str, Any]], measure: str, value: float, sign: int) -> float | None:
    """The share of the steps after which a curve is as good as a value; None where it never is."""
    return next((p["step"] / curve[-1]["step"] for p in curve if sign * p[measure] >= sign * value), None)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The curves: one row per budget, one column per measure."""
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    columns = (("psnr", "PSNR to the teacher, dB"), ("frechet", "Fréchet distance"), ("student_right", "prompts right"))
    tables = [(f"{s}, {b}", rows) for s in ("recovery", "parts") for b, rows in result[s].items() if rows]
    if not tables:
        return
    figure, axes = plt.subplots(len(tables), 3, figsize=(12, 3.4 * len(tables)), squeeze=False)
    for line, (title, rows) in zip(axes, tables, strict=True):
        for axis, (key, label) in zip(line, columns, strict=True):
            for row in rows:
                axis.plot([p["step"] for p in row["curve"]], [p[key] for p in row["curve"]], label=row["name"])
            axis.set(xlabel="steps", ylabel=label, title=title)
        line[0].legend(frameon=False, fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _bare_loop(subjects: Subjects, training: Distillation, device: torch.device) -> float:
    """Seconds of all steps but the first."""
    student = subjects.student.to(device).train()
    parameters = [parameter for _, parameter in choose_parameters(student, "all", ())]
    ours, theirs = FeatureUNet(student, subjects.student_places), FeatureUNet(subjects.teacher, subjects.teacher_places)
    optimiser = torch.optim.AdamW(parameters, lr=1e-6)
    batch = next(subjects.batches.of(0, device))
    began = 0.0
    for step in range(training.steps):
        loss = weighted_sum(loss_terms(ours, theirs, batch, subjects.noising, training.losses), training.losses)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        began = time.perf_counter() if step == 0 else began
    seconds = time.perf_counter() - began
    ours.release()
    theirs.release()
    return seconds


if __name__ == "__main__":
    main()
