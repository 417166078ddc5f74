"""The training loop: phases, micro-batches, averages, logs, probes and checkpoints, on whatever accelerate finds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from asdm_compress.core.distillation import Distillation
from asdm_compress.core.errors import AsdmError, is_out_of_memory
from asdm_compress.core.files import output_file
from asdm_compress.distillation.batches import Batches
from asdm_compress.distillation.checkpoints import Checkpoints
from asdm_compress.distillation.engine import Engine, ShardedEngine
from asdm_compress.distillation.experts import ExpertUse
from asdm_compress.distillation.features import FeatureUNet
from asdm_compress.distillation.journal import Journal
from asdm_compress.distillation.losses import loss_terms, weighted_sum
from asdm_compress.distillation.optimisers import make_optimiser
from asdm_compress.distillation.probe import Probe, ProbeResult
from asdm_compress.distillation.selection import Phase, choose_parameters
from asdm_compress.distillation.state import TrainingState

BEST = "best"
_EXTRAS = "rates.pt"
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What changes how a training is run and not what comes out of it, rounding apart; counts are of steps.

    `sharded` spreads weights, gradients, averages and the optimiser's states over the processes.
    """

    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class Subjects:
    """Who is trained, by whom, on what, where their features are compared in pairs, and the units `around` cuts."""

    student: UNet2DConditionModel
    teacher: UNet2DConditionModel | None
    noising: DDPMScheduler
    batches: Batches
    phases: tuple[Phase, ...]
    student_places: tuple[str, ...] = ()
    teacher_places: tuple[str, ...] = ()
    around: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended: the steps taken, the first, the last and the best probe, and the seconds of this call.

    The weights are those of the best. `expert_use` is by slot the last share of the rows that each of several experts
    was given.
    """

    steps: int
    first: ProbeResult | None
    last: ProbeResult | None
    best: ProbeResult | None
    best_step: int | None
    seconds: float
    expert_use: Mapping[str, Sequence[float]] = field(default_factory=dict)


Report = Callable[[int, int, str], None]


class Trainer:
    """One training in a folder: `checkpoints/`, `best/` and `metrics.jsonl`. `train` goes on where it stopped.

    Of several processes the first alone needs the probe; `probed` is called with the step after each. `student` is,
    once it is trained and on the first process, what came out.
    """

    def __init__(
        self,
        subjects: Subjects,
        settings: Distillation,
        loop: LoopSettings,
        folder: Path,
        accelerator: Accelerator,
        probe: Probe | None = None,
        report: Report = lambda done, total, text: None,
        probed: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.subjects, self.settings, self.loop, self.folder = subjects, settings, loop, folder
        self.accelerator, self.probe, self.report, self.probed = accelerator, probe, report, probed
        self.checkpoints = Checkpoints(folder / "checkpoints", loop.keep)
        self.journal = Journal(folder, accelerator)
        self.state = TrainingState()
        self.engine = ShardedEngine(accelerator) if loop.sharded else Engine(accelerator)
        student = subjects.student
        self.engine.begin(student)
        student.to(accelerator.device).train()
        if loop.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self.wrapped = FeatureUNet(student, subjects.student_places)
        self.experts = ExpertUse(student)
        trained = [choose_parameters(student, phase.trains, subjects.around) for phase in subjects.phases]
        self.engine.place(self.wrapped, {name for names in trained for name, _ in names})
        self.teacher = FeatureUNet(subjects.teacher, subjects.teacher_places) if subjects.teacher is not None else None
        self.ema = self._new_average()
        self.student = student
        self.started = time.monotonic()
        self.last: ProbeResult | None = None
        self._waiting: list[dict[str, Tensor]] = []
        self._line = ""
        self._unsound: int | None = None  # the first of the last steps whose losses are beyond belief
        self._use: dict[str, list[float]] = {}

    def train(self) -> Outcome:
        """Take all the steps that are left; the student ends with the best averaged weights that a probe has seen.

        Raises AsdmError when the loss stops being a number or runs away, naming the last good checkpoint.
        """
        if self.accelerator.is_main_process:
            self.checkpoints.tidy()
        self.accelerator.wait_for_everyone()
        resumed = self.checkpoints.last()
        if resumed is not None:
            self._load_state(resumed)
        self.journal.forget_after(self.state.step if resumed else -1)
        self.began_at = self.state.step
        if resumed is None and self.settings.probe_every:
            found = self._probe()
            self.state.first = (found.latent_error, found.damage)
        for phase in self.subjects.phases:
            if self.state.step < phase.last:
                self._run_phase(phase, resumed if resumed == self.state.step else None)
        self._finish()
        seconds = time.monotonic() - self.started
        state = self.state
        first = None if state.first is None else ProbeResult(*state.first)
        best = None if state.best_step is None else ProbeResult(state.best_error, state.best_damage)
        return Outcome(state.step, first, self.last, best, state.best_step, seconds, self._use)

    def _run_phase(self, phase: Phase, resumed: int | None) -> None:
        accelerator, loop = self.accelerator, self.loop
        named = choose_parameters(self.subjects.student, phase.trains, self.subjects.around)
        parameters = [parameter for _, parameter in named]
        plain = make_optimiser(parameters, self.settings.optimiser)
        name, warmup = _warming(self.settings.optimiser.schedule, self.settings.optimiser.warmup_steps, phase)
        rates = get_scheduler(name, plain, num_warmup_steps=warmup, num_training_steps=phase.last - phase.first)
        model, optimiser = self.engine.prepare(self.wrapped, plain, loop.compile)
        if resumed is not None and phase.first <= resumed:
            with _readable(self.checkpoints.path(resumed)):
                self.engine.load(self.checkpoints.path(resumed), self.subjects.student, optimiser)
            _resume_rates(rates, plain, self._extras["rates"], self.settings.optimiser.learning_rate)
        self._rates, self._parameters, self._phase, self._optimiser = rates, parameters, phase, optimiser
        for step in range(self.state.step, phase.last):
            if step % loop.save_every == 0 and step not in (0, resumed):
                self._save(step)
            self._step(model, optimiser, step)
            done = step + 1
            if done % loop.log_every == 0 or done == self.settings.steps:
                self._log()
            if self.settings.probe_every and (done % self.settings.probe_every == 0 or done == self.settings.steps):
                self._probe()
        accelerator.free_memory()
        self.subjects.student.zero_grad(set_to_none=True)

    def _step(self, model: Any, optimiser: Any, step: int) -> None:
        """One step of the optimiser on this process's rows, in as many passes as they need."""
        losses = self.settings.losses
        parts = list(self.subjects.batches.of(step, self.accelerator.device))
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(parts):
            last = number == len(parts) - 1
            with self.engine.passing(model, last):
                with self.accelerator.autocast():
                    terms = loss_terms(model, self.teacher, batch, self.subjects.noising, losses)
                    loss = weighted_sum(terms, losses)
                self.accelerator.backward(loss / len(parts))
            for name, value in {**terms, "loss": loss}.items():
                sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + value.detach() / len(parts)
        norm = self.engine.clip(self._parameters, self.settings.optimiser.clip)
        optimiser.step()
        self.subjects.student.zero_grad(set_to_none=True)
        if not self.accelerator.optimizer_step_was_skipped:
            self._rates.step()
        if str(self.accelerator.mixed_precision) == "fp16":
            # A scale that was too large once is no divergence. A fused optimiser leaves its step out without a word.
            norm = torch.where(norm.isfinite(), norm, 0.0)
        self.ema.step(self.subjects.student.parameters())
        self.state.step = step + 1
        # Reading values waits for the device, so that is left to the log.
        self._waiting.append({**sums, "gradient_norm": norm.detach().to(self.accelerator.device)})
        self.report(self.state.step, self.settings.steps, self._line)

    def _settle(self) -> None:
        """Read what was kept, the mean over all processes."""
        if not self._waiting:
            return
        names = list(self._waiting[0])
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row in self._waiting])
        table = self.accelerator.reduce(table, "mean")
        first = self.state.step - len(self._waiting)
        for number, row in enumerate(table.double().tolist(), start=first):
            terms = dict(zip(names, row, strict=True))
            self.state.add(terms)
            if self.state.is_sound(terms["loss"]):
                self._unsound = None
            elif self._unsound is None:
                self._unsound = number
        self._waiting.clear()

    def _log(self) -> None:
        self._settle()
        means = self.state.means()
        self.state.judge(means["loss"] + 0 * means["gradient_norm"], self._last_good)
        seconds = time.monotonic() - self.started
        rate = (self.state.step - self.began_at) * self.settings.batch / seconds
        self._line = f"loss {means['loss']:.4g}, {rate:.3g} images/s"
        record: dict[str, Any] = {
            "step": self.state.step, "trains": self._phase.trains, **{k: float(f"{v:.6g}") for k, v in means.items()},
            "learning_rate": self._rates.get_last_lr()[0], "images_per_second": round(rate, 3),
        }  # fmt: skip
        shares = self.experts.shares()
        if shares:
            record["expert_use"] = self._use = shares
        self.journal.write(record)

    def _probe(self) -> ProbeResult:
        """Measure the averaged weights, keep them where they are the best so far, and tell all processes.

        The best are those of least damage: it is a mean over far more than the latents that a few prompts end at.
        """
        error = torch.zeros(2, device=self.accelerator.device, dtype=torch.float64)
        with self.engine.averaged(self.subjects.student, self.ema) as student, self.experts.paused():
            if self.accelerator.is_main_process:
                assert self.probe is not None
                found = self.probe.measure(student)
                error += torch.tensor([found.latent_error, found.damage], device=error.device, dtype=error.dtype)
                if found.damage < self.state.best_damage:
                    self._save_best(self.state.step, student)
                self.probed(self.state.step)
                record = {"step": self.state.step, "latent_error": found.latent_error, "damage": found.damage}
                self.journal.write(record)
        error = self.accelerator.reduce(error, "sum")
        result = ProbeResult(float(error[0]), float(error[1]))
        if result.damage < self.state.best_damage:
            self.state.best_damage, self.state.best_step = result.damage, self.state.step
            self.state.best_error = result.latent_error
            if self.accelerator.is_main_process:
                self._prune_best()
        self.last = result
        return result

    def _save_best(self, step: int, student: UNet2DConditionModel) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in student.state_dict().items()}
        with output_file(self._best(step)) as aside:
            save_file(weights, aside)

    def _best(self, step: int) -> Path:
        return self.folder / BEST / f"step-{step:08d}.safetensors"

    def _save(self, step: int) -> None:
        """A checkpoint of what comes before `step`, which counts once it is whole."""
        self._settle()
        if not all(map(math.isfinite, self.state.sums.values())):
            self.state.judge(float("nan"), self._last_good)
        if self._unsound is not None:
            return  # else it would in time push out the last good one, before that is judged
        aside = self.checkpoints.aside(step)
        with self.checkpoints.writing(step):
            if self.accelerator.is_main_process:
                aside.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.engine.save(aside, self.subjects.student, self._optimiser, self.ema)
            if self.accelerator.is_main_process:
                torch.save({"rates": self._rates.state_dict()}, aside / _EXTRAS)
                (aside / _STATE).write_text(json.dumps(self.state.as_content()), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.commit(step)
            self._prune_best()
        self.accelerator.wait_for_everyone()

    def _prune_best(self) -> None:
        """Leave the best weights that a checkpoint on the disk refers to, and those of now."""
        wanted = {self.state.best_step}
        for step in self.checkpoints.steps():
            wanted.add(_read_state(self.checkpoints.path(step)).best_step)
        names = {self._best(step).name for step in wanted if step is not None}
        for path in (self.folder / BEST).glob("*.safetensors"):
            if path.name not in names:
                path.unlink()

    def _load_state(self, step: int) -> None:
        self._extras = _read_extras(self.checkpoints.path(step))
        self.state = _read_state(self.checkpoints.path(step))
        with _readable(self.checkpoints.path(step)):
            self.engine.check(self.checkpoints.path(step))
            self.engine.load_average(self.checkpoints.path(step), self.subjects.student, self.ema)
        self.ema.optimization_step = step

    def _new_average(self) -> EMAModel:
        average = EMAModel(
            self.subjects.student.parameters(), decay=self.settings.ema_decay, use_ema_warmup=True,
            foreach=not self.loop.sharded,
        )  # fmt: skip
        average.to(self.accelerator.device)
        return average

    def _finish(self) -> None:
        """Put the best weights that a probe has seen into the student, or, without probes, the averaged ones."""
        self.experts.release()
        student = self.wrapped.release()
        if self.teacher is not None:
            self.teacher.release()
        self.accelerator.wait_for_everyone()
        best = self.state.best_step
        kept = best is not None and self._best(best).is_file()
        student = self.engine.finish(student, self.ema, load_file(self._best(best or 0)) if kept else None)
        student.eval().requires_grad_(False)
        if self.loop.gradient_checkpointing:
            student.disable_gradient_checkpointing()
        self.student = student

    def _last_good(self) -> str:
        """The newest checkpoint from which the training has gone on well. Those behind it are taken away."""
        if self._unsound is not None:
            # A step's loss is that of the weights before it: what was saved then was already broken.
            if self.accelerator.is_main_process:
                self.checkpoints.forget_from(self._unsound)
            self.accelerator.wait_for_everyone()
        last = self.checkpoints.last()
        return "no good checkpoint was written yet" if last is None else f"the last good checkpoint is of step {last}"


def _resume_rates(rates: Any, optimiser: torch.optim.Optimizer, kept: dict[str, Any], highest: float) -> None:
    """Go on with a schedule where it stopped, by a highest rate that may be another than before."""
    share = highest / kept["base_lrs"][0]
    rates.load_state_dict({**kept, "base_lrs": [highest], "_last_lr": [rate * share for rate in kept["_last_lr"]]})
    for group in optimiser.param_groups:
        group["initial_lr"] = highest
        group["lr"] = rates.get_last_lr()[0]


def _warming(schedule: str, warmup: int, phase: Phase) -> tuple[str, int]:
    """The schedule that diffusers knows by a name, and its warm-up steps: at most half of a phase's.

    What it calls constant never warms up.
    """
    warmup = min(warmup, (phase.last - phase.first) // 2)
    return "constant_with_warmup" if schedule == "constant" and warmup else schedule, warmup


def _read_state(folder: Path) -> TrainingState:
    with _readable(folder):
        return TrainingState(**json.loads((folder / _STATE).read_text(encoding="utf-8")))


def _read_extras(folder: Path) -> dict[str, Any]:
    with _readable(folder):
        extras: dict[str, Any] = torch.load(folder / _EXTRAS, map_location="cpu", weights_only=True)
        return extras


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise AsdmError(
            f"the checkpoint {folder} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "Remove it; --resume then goes on from the one before.",
        ) from error
