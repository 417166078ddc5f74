"""What slots and kept modules are fitted for: what they replace, what is behind them, a block's output, or the UNet's.

    python tools/bench_targets.py       # writes tools/results/targets.json

BK-SDM-base's removals on `mini-sd` with a convolution in every hole. `own part` fits every slot to what the removed
modules gave out, on the teacher's activations; `in order` fits it to the teacher's hidden state, on the student's
activations (the default without refit); `in order, refitted` also solves anew what stays (the default). From there
`block` goes on: all slots and refitted projections of a block together, for the block's outputs (hidden state and skip
connections), by quasi-Gauss-Newton steps (L-BFGS) on the calibration triples, stopped when held-out prompts get worse.
`output` does the same from `in order, refitted` for the damage itself, with all fitted weights of the student together,
for a few rounds. All damages are on prompts that nothing was fitted on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from measuring import Bench, measured
from mini_sd.weights import bundled_weights
from rival_plans import BK_PATTERNS
from torch import Tensor

from asdm_compress.assembly.calibration import Calibration, record
from asdm_compress.assembly.damage import compare_predictions, measure_plan, predictions
from asdm_compress.assembly.option_fit import fit_options
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.defaults import CALIBRATION_PROMPTS
from asdm_compress.evaluation.quality import assess
from asdm_compress.models.edits import SlotWeights
from asdm_compress.models.expert_conv import Moment
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.models.walk import State, Step, start, steps_of, take
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.run import GuidedInputs
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.workflows.assemble import with_unet

EDIT = "conv3x3*8@timestep"
PROMPTS, UNSEEN = 24, SamplingSettings(seed=80_000)
ROUNDS, BATCH = 12, 64
FEW_ROUNDS = 3  # where all of the UNet is run
SCALE = 100.0  # of damages, without which the first step of L-BFGS is tiny


def main() -> None:
    """Alone on the machine: fits are timed too."""
    with measured("targets", __doc__) as bench:
        bench.facts |= {"edit": EDIT, "prompts": PROMPTS, "mini_sd": bundled_weights()}
        measure(bench)


def measure(bench: Bench) -> None:
    """Fit for every target and measure."""
    pipeline = load_pipeline("mini-sd", LoadOptions())
    pipeline.set_progress_bar_config(disable=True)
    teacher = pipeline.unet
    seen = [c.text for c in sample_captions(CALIBRATION_PROMPTS, 1, held_out=False)]
    captions = sample_captions(PROMPTS, 5_151)
    calibration = record(pipeline, seen, SamplingSettings())
    others = record(pipeline, [c.text for c in captions], UNSEEN, band_weights=calibration.band_weights)
    pictures = sample(pipeline, [c.text for c in captions], UNSEEN)
    plan = Plan(dict.fromkeys(BK_PATTERNS["bk-sdm-base"].edits, EDIT))

    def keep(target: str, student: UNet2DConditionModel, damage: float, began: float) -> None:
        seconds = round(time.perf_counter() - began, 1)
        images = sample(with_unet(pipeline, student), [c.text for c in captions], UNSEEN)
        quality = assess(pictures, images, captions)
        bench.add({"target": target, "damage": damage, "psnr": quality.as_json()["psnr"], "fit_seconds": seconds})

    began = time.perf_counter()
    fits: dict[str, SlotWeights] = {"own part": _own_parts(teacher, plan, calibration)}
    own = fits["own part"]
    keep("own part", assemble(teacher, plan, own), measure_plan(teacher, plan, others, own).total, began)
    for name, refit in (("in order", "none"), ("in order, refitted", "full")):
        began = time.perf_counter()
        fits[name] = fit_plan(teacher, plan, calibration, refit=refit)  # type: ignore[arg-type]
        keep(name, assemble(teacher, plan, fits[name]), measure_plan(teacher, plan, others, fits[name]).total, began)
    student = assemble(teacher, plan, fits["in order, refitted"])
    began = time.perf_counter()
    found = _refine_output(teacher, student, _trained_names(student, fits["in order, refitted"]), calibration)
    keep("output", student, compare_predictions(teacher, student, others).total, began)
    bench.rows[-1] |= found
    student = assemble(teacher, plan, fits["in order, refitted"])
    began = time.perf_counter()
    kept = _refine(teacher, student, _trained_names(student, fits["in order, refitted"]), calibration)
    keep("block", student, compare_predictions(teacher, student, others).total, began)
    bench.rows[-1]["blocks"] = kept


def _own_parts(teacher: UNet2DConditionModel, plan: Plan, calibration: Calibration) -> SlotWeights:
    """Every slot fitted alone, to the removed modules' own output on the teacher's activations."""
    options = [Option(site, edit, frozenset({site}), {}) for site, edit in plan.edits.items()]
    weights: dict[str, Mapping[str, Tensor]] = {}
    for group, found in fit_options(teacher, options, calibration):
        for option in group:
            weights |= found[option.name]
    return weights


def _trained_names(student: UNet2DConditionModel, weights: SlotWeights) -> set[str]:
    """The student's tensors that a fit has made, without the routers'."""
    names = set(student.state_dict())
    made = {f"{path}.{part}{name}" for path, tensors in weights.items() for name in tensors for part in ("", "slot.")}
    return {name for name in names & made if "router" not in name}


def _refine(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, trained: set[str], calibration: Calibration
) -> dict[str, Any]:
    """Go on from a fitted student, block by block in network order; what each block's error came down to."""
    rows = calibration.inputs.rows()
    held_out = (calibration.prompts % 4 == 3).repeat_interleave(2)
    weight = torch.tensor(calibration.band_weights)[calibration.bands].repeat_interleave(2)
    blocks: dict[str, list[str]] = {}
    for step in steps_of(student):
        blocks.setdefault(step.path.rsplit(".", 2)[0], []).append(step.path)
    with torch.no_grad():
        theirs, ours = start(teacher, *rows), start(student, *rows)
    done: dict[str, Any] = {}
    for block, paths in blocks.items():
        with torch.no_grad():
            for step in (s for s in steps_of(teacher) if s.path in paths):
                theirs = take(step, theirs)
        steps = [s for s in steps_of(student) if s.path in paths]
        names = [name for name in trained if name.startswith(f"{block}.")]
        if names:
            parameters = [p for name, p in student.named_parameters() if name in names]
            done[block] = _refine_block(steps, parameters, ours, theirs, weight, held_out)
            print(block, done[block], flush=True)
        with torch.no_grad():
            for step in steps:
                ours = take(step, ours)
    return done


def _refine_output(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel, trained: set[str], calibration: Calibration
) -> dict[str, Any]:
    """Go on from a fitted student with all fitted weights, for the damage; what held-out prompts' came down to."""
    wanted = predictions(teacher, calibration)
    held_out = calibration.prompts % 4 == 3
    energies = wanted.square().flatten(1).sum(1)
    of_band = torch.zeros(len(calibration.band_weights)).index_add(0, calibration.bands, energies)
    weight = (torch.tensor(calibration.band_weights) / of_band)[calibration.bands]

    def error(chosen: Tensor, backward: bool) -> float:
        total = 0.0
        for part in chosen.nonzero()[:, 0].split(BATCH // 2):
            given = calibration.inputs
            inputs = GuidedInputs(given.samples[part], given.timesteps[part], given.texts[part], given.guidance)
            found = inputs.guided(student(*inputs.rows(), return_dict=False)[0])
            loss = ((found - wanted[part]).square().flatten(1).sum(1) * weight[part]).sum() * SCALE
            if backward:
                loss.backward()
            total += float(loss.detach())
        return total * len(chosen) / int(chosen.sum())

    for parameter in student.parameters():
        parameter.requires_grad_(False)
    return _descend([p for name, p in student.named_parameters() if name in trained], error, held_out, FEW_ROUNDS)


def _refine_block(
    steps: Sequence[Step], parameters: Sequence[Tensor], ours: State, theirs: State, weight: Tensor, held_out: Tensor
) -> dict[str, Any]:
    def error(chosen: Tensor, backward: bool) -> float:
        total = 0.0
        for part in chosen.nonzero()[:, 0].split(BATCH):
            state = _rows(ours, part)
            known = len(state.skips)
            for step in steps:
                state = take(step, state)
            wanted = _rows(theirs, part)
            pairs = [(state.hidden, wanted.hidden), *zip(state.skips[known:], wanted.skips[known:], strict=False)]
            loss = sum(((a - b).square().mean((1, 2, 3)) * weight[part]).sum() / b.square().mean() for a, b in pairs)
            assert isinstance(loss, Tensor)
            if backward:
                loss.backward()
            total += float(loss.detach())
        return total / float(weight[chosen].sum())

    return _descend(parameters, error, held_out)


def _descend(
    parameters: Sequence[Tensor], error: Callable[[Tensor, bool], float], held_out: Tensor, most: int = ROUNDS
) -> dict[str, Any]:
    """Lower `error(rows, backward)` of the rows that are not held out until that of those gets no better."""
    with torch.no_grad():
        best, before = (error(held_out, False),) * 2
    kept = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.contiguous()  # L-BFGS flattens gradients, which lie as the weights do
    optimizer = torch.optim.LBFGS(parameters, lr=1.0, max_iter=4, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            return error(~held_out, True)

    rounds = 0
    for _ in range(most):
        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            now = error(held_out, False)
        if now >= best * 0.999:
            break
        best, rounds = now, rounds + 1
        kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.requires_grad_(False)
            parameter.copy_(value)
    return {"before": before, "after": best, "rounds": rounds}


def _rows(state: State, rows: Tensor) -> State:
    given = state.conditioning
    moment = Moment(given.moment.timesteps[rows])
    conditioning = replace(given, time_embedding=given.time_embedding[rows], text=given.text[rows], moment=moment)
    return State(state.hidden[rows], tuple(skip[rows] for skip in state.skips), conditioning)


if __name__ == "__main__":
    main()
