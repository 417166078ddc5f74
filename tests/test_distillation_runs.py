"""Whole trainings by the command line: exact resumption after kills, two processes as one, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from command_lines import LAUNCH
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Base, Costs, EditEntry, Evidence, Recipe, dump_recipe, load_recipe
from asdm_compress.distillation.checkpoints import Checkpoints
from asdm_compress.distillation.probe import relative_error
from asdm_compress.distillation.trainer import LoopSettings
from asdm_compress.models.families import architecture
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.source import LoadOptions
from asdm_compress.workflows.distill import run_distill
from asdm_compress.workflows.progress import Silent
from asdm_compress.workflows.training_run import DistillSettings
from asdm_compress.workflows.training_section import choose_training

EDITS = {"mid_block": "drop", "up_blocks.1.attentions.1": "conv1x1*4@timestep", "down_blocks.1.layers.1": "drop"}
COSTS = Costs(latency=1.0, macs=1, params=1)
EVIDENCE = Evidence(  # of a small cut, after which the experts train first
    teacher=COSTS, predicted=COSTS, measured=COSTS, measured_latency_ratio=1.0, solved_for=["latency=0.7x"],
    predicted_damage=0.001, measured_damage=0.001, held_out_damage=0.001, damage_bound=0.001, proven_optimal=True,
)  # fmt: skip
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
SMALL = [
    "--teacher", "teacher", "--data-size", "24", "--steps", "8", "--batch", "4", "--probe-every", "0",
    "--log-every", "2", "--learning-rate", "2e-3", "--warmup", "2", "--device", "cpu", "--threads", "1", "-q",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(pipeline, tmp_path_factory):
    """A folder with a tiny teacher, its student, and an uninterrupted training of it, all on disk."""
    folder = tmp_path_factory.mktemp("distill")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 32, 32), norm_num_groups=4, cross_attention_dim=96,
        attention_head_dim=2,
    )  # fmt: skip
    for name, part in (("teacher", unet), ("student", assemble(unet, Plan(EDITS)))):
        parts = {**pipeline.components, "unet": part}
        save_pipeline(StableDiffusionPipeline(**parts, requires_safety_checker=False), folder / name)
    recipe = Recipe(
        asdm_recipe=1,
        base=Base(model="teacher", architecture=architecture(unet)),
        edits=[EditEntry(site=site, edit=edit) for site, edit in EDITS.items()],
        evidence=EVIDENCE,
    )
    (folder / "student" / "recipe.yaml").write_text(dump_recipe(recipe))
    result = distill(folder, "whole", "--json")
    assert result.returncode == 0, result.stderr
    return folder


def environment(folder):
    return {**os.environ, "ASDM_COMPRESS_CACHE": str(folder / "cache"), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def command(out, *more):
    options = [o for o in SMALL if not ("--json" in more and o == "-q")]
    return [sys.executable, "-m", "asdm_compress", "distill", "student", "--out", out, *options, *more]


def distill(folder, out, *more):
    return subprocess.run(
        command(out, *more), cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )


def trained(folder, out):
    return load_file(folder / out / WEIGHTS)


def lines(folder, out):
    return [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def test_a_trained_student_opens_as_its_own_kind_and_says_how_it_was_trained(place):
    import asdm_compress

    before, after = trained(place, "student"), trained(place, "whole")
    assert set(before) == set(after)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * len(before)
    recipe = load_recipe(place / "whole" / "recipe.yaml")
    assert recipe.distillation is not None
    assert (recipe.distillation.steps, recipe.distillation.batch, recipe.distillation.preset) == (8, 4, "mini-sd")
    assert recipe.provenance["distilled"]["steps"] == 8
    logged = lines(place, "whole")
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    assert {"loss", "output", "feature", "gradient_norm", "learning_rate"} <= set(logged[0])
    assert [line["trains"] for line in logged] == ["experts", "all", "all", "all"]
    (use,) = logged[-1]["expert_use"].values()
    assert use == pytest.approx([0.25] * 4, abs=0.15)
    pipeline = load_pipeline(str(place / "whole"))
    assert type(pipeline.unet) is asdm_compress.AssembledUNet2DConditionModel
    card = (place / "whole" / "README.md").read_text()
    assert "distill student" in card
    assert "stays was trained against the base model" in card
    assert "keeps the base model's weights" not in card


def test_a_training_killed_in_a_save_and_elsewhere_ends_bit_identical(place):
    """Killed soon after it comes further than before, until one kill has fallen into the writing of a checkpoint."""
    folder = place / "killed.run" / "checkpoints"
    kills, in_a_save, reached = 0, False, 1
    while True:
        more = ["--save-every", "1", *(["--resume"] if folder.exists() else [])]
        with subprocess.Popen(
            command("killed", *more), cwd=place, env=environment(place), stderr=subprocess.PIPE, text=True
        ) as process:
            while process.poll() is None and not (kills >= 2 and in_a_save):
                # After a third kill anywhere, only the writing itself is waited for.
                is_time = kills < 2 or any(folder.glob(".writing-*"))
                if is_time and (Checkpoints(folder).last() or 0) > reached:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills, reached = kills + 1, Checkpoints(folder).last()
                    in_a_save = in_a_save or any(folder.glob(".writing-*"))
                time.sleep(0.001)
            _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert kills >= 2
    assert in_a_save, "no kill fell into a save"
    assert (place / "killed" / WEIGHTS).read_bytes() == (place / "whole" / WEIGHTS).read_bytes()
    assert [line["step"] for line in lines(place, "killed")] == [2, 4, 6, 8]
    assert len(Checkpoints(place / "killed.run" / "checkpoints").steps()) == 2
    for ours, theirs in zip(lines(place, "killed"), lines(place, "whole"), strict=True):
        assert ours["loss"] == theirs["loss"]


def launch(folder, program, *more, **variables):
    """In two processes."""
    return subprocess.run(
        [sys.executable, *LAUNCH, *program, *more],
        cwd=folder,
        env={**environment(folder), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def check_as_whole(place, name):
    """Sums over rows are taken in another order: equal to a thousandth of the way that the weights have come."""
    start, one, two = (trained(place, n) for n in ("student", "whole", name))
    moved = sum(float((one[n] - start[n]).double().square().sum()) for n in one)
    apart = sum(float((one[n] - two[n]).double().square().sum()) for n in one)
    assert moved > 0
    assert apart < 1e-6 * moved
    for ours, theirs in zip(lines(place, name), lines(place, "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)


def test_two_processes_with_half_the_batch_equal_one_with_the_whole(place):
    # With a tracker, which has to end before the processes part.
    result = launch(place, ["-m"], *command("two", "--tracker", "tensorboard")[2:])
    assert result.returncode == 0, result.stderr
    check_as_whole(place, "two")


def test_shards_of_a_student_end_where_the_whole_one_does(place, monkeypatch):
    """Weights, averages and states spread over two processes (FSDP), in two passes a step, and gone on with."""
    more = ["--micro-batch", "1", "--save-every", "4", "--gradient-checkpointing"]
    result = launch(place, ["-m"], *command("shards", *more, "--shard")[2:])
    assert result.returncode == 0, result.stderr
    check_as_whole(place, "shards")
    checkpoint = place / "shards.run" / "checkpoints" / "step-00000004" / "shards"
    assert len(list(checkpoint.glob("*.distcp"))) == 2
    before = trained(place, "shards")
    shutil.rmtree(place / "shards")
    # As `accelerate launch --use_fsdp` asks for it.
    result = launch(place, ["-m"], *command("shards", *more, "--resume")[2:], ACCELERATE_USE_FSDP="true")
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(before[name], tensor) for name, tensor in trained(place, "shards").items())
    # Whole, it cannot go on from there, and says so.
    changes = {"optimiser.learning_rate": 2e-3, "optimiser.warmup_steps": 2, "probe_every": 0}
    shutil.rmtree(place / "shards")
    with pytest.raises(AsdmError, match="step-00000004 is of a training in several processes, with --shard, and this"):
        run(place, monkeypatch, out="shards", changes=changes, resume=True)


def test_an_error_of_one_process_ends_the_others_who_wait_for_it(place):
    """The second process alone does not find its data, when the first waits for it to have encoded its share."""
    (place / "program.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv += ['--data', 'nowhere']\n"
        "from asdm_compress.cli.main import main\n"
        "main()\n"
    )
    began = time.monotonic()
    result = launch(place, ["program.py"], *command("lost")[3:])
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ")] == [
        "Error: there are no training data at nowhere"
    ]
    assert time.monotonic() - began < 300  # no collective has had to run out of patience, which is days
    assert not (place / "lost").exists()


def test_a_probe_keeps_the_best(place):
    result = distill(
        place, "probed", "--probe-every", "4", "--probe-prompts", "2", "--micro-batch", "2", "--json",
        "--trains", "all", "--gradient-checkpointing",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    probes = [line for line in lines(place, "probed") if "latent_error" in line]
    assert [line["step"] for line in probes] == [0, 4, 8]
    best = min(probes, key=lambda line: line["damage"])
    assert printed["outcome"]["best_step"] == best["step"]
    assert len(list((place / "probed.run" / "best").iterdir())) == 1  # none is left of those that were the best before
    assert printed["outcome"]["first"]["damage"] == pytest.approx(probes[0]["damage"])
    kept = load_file(place / "probed.run" / "best" / f"step-{best['step']:08d}.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in trained(place, "probed").items())
    assert len(printed["pairs"]) > 10
    forecast = printed["forecast"]
    parameters = sum(t.numel() for t in trained(place, "probed").values())
    assert forecast["memory_bytes"]["weights"] == 4 * parameters
    assert forecast["memory_bytes"]["encoders"] > 0
    assert forecast["memory_bytes"]["total"] > 16 * parameters


def test_one_picture_that_turned_out_another_does_not_decide_the_latent_error():
    wanted = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    near, nearer = 1.02 * wanted, 1.0001 * wanted
    nearer[0] = -wanted[0]
    assert (nearer - wanted).square().sum() > 100 * (near - wanted).square().sum()
    assert relative_error(nearer, wanted) < relative_error(near, wanted)
    assert relative_error(near, wanted) == pytest.approx(0.02**2, rel=1e-4)
    assert 0 < relative_error(wanted, wanted) < 1e-11


def run(folder, monkeypatch, student="student", out="new", **values):
    """In this process, for what ends before or soon after the first step."""
    AcceleratorState._reset_state(True)  # which holds the precision of the training before
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(folder / "cache"))
    changes = {"data.size": 24, "steps": 8, "batch": 4, **values.pop("changes", {})}
    values = {"teacher": "teacher", "mixed_precision": "no", **values}
    settings = DistillSettings(changes=changes, **values)
    return run_distill(student, Path(out), LoadOptions(), settings, Silent())


def test_a_training_that_harms_gives_back_what_it_was_given(place, monkeypatch):
    changes = {  # at a rate that is far too high, though nothing overflows
        "optimiser.learning_rate": 0.01, "optimiser.schedule": "constant", "optimiser.warmup_steps": 0, "trains": "all",
        "probe_every": 4, "probe_prompts": 2,
    }  # fmt: skip
    result = run(place, monkeypatch, out="harmed", changes=changes)
    assert result.outcome.last.damage > result.outcome.first.damage
    assert result.outcome.best_step == 0
    before, after = trained(place, "student"), trained(place, "harmed")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert "The weights are those from before the training" in "\n".join(result.lines())


def test_a_teacher_whose_sampler_takes_more_passes_is_probed_with_another(place, monkeypatch):
    """Stable Diffusion 1.x comes with PNDM."""
    teacher = load_pipeline(str(place / "teacher"), LoadOptions())
    teacher.scheduler = PNDMScheduler.from_config(teacher.scheduler.config, skip_prk_steps=True)
    save_pipeline(teacher, place / "pndm")
    changes = {"steps": 1, "probe_every": 1, "probe_prompts": 2}
    result = run(place, monkeypatch, out="by-pndm", teacher="pndm", changes=changes)
    assert 0 < result.outcome.last.latent_error < math.inf
    assert (
        load_pipeline(str(place / "by-pndm"), LoadOptions()).scheduler.config
        == load_pipeline(str(place / "student"), LoadOptions()).scheduler.config
    )


def test_a_dry_run_forecasts_and_writes_nothing(place, monkeypatch):
    result = run(place, monkeypatch, out="dry", dry_run=True)
    memory = result.forecast.memory
    parameters = sum(t.numel() for t in trained(place, "student").values())
    assert (memory.weights, memory.gradients, memory.optimiser) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert memory.averages == memory.weights
    assert memory.teacher == 4 * sum(t.numel() for t in trained(place, "teacher").values())
    assert memory.activations > 0
    assert result.forecast.seconds == pytest.approx(8 * result.forecast.seconds_per_step)
    assert result.items > 0
    with pytest.raises(AsdmError, match="no training data"):
        run(place, monkeypatch, out="dry", dry_run=True, changes={"data.source": "nowhere"})
    assert not {p.name for p in place.iterdir()} & {"dry", "dry.run"}


def test_what_cannot_be_trained_is_refused(place, monkeypatch):
    (place / "begun.run").mkdir(exist_ok=True)
    with pytest.raises(AsdmError, match="holds a training that was begun"):
        run(place, monkeypatch, out="begun")
    with pytest.raises(AsdmError, match="there is no training to go on with"):
        run(place, monkeypatch, resume=True)
    with pytest.raises(AsdmError, match=r"it has no recipe\.yaml"):
        run(place, monkeypatch, "teacher")
    with pytest.raises(AsdmError, match="does not fit the recipe"):
        run(place, monkeypatch, teacher="mini-sd")
    with pytest.raises(AsdmError, match="is a UNet alone"):
        run(place, monkeypatch, teacher="teacher/unet")
    with pytest.raises(AsdmError, match="unknown schedule 'steep'"):
        run(place, monkeypatch, changes={"optimiser.schedule": "steep"})
    (place / "other.run").mkdir()
    (place / "other.run" / "settings.yaml").write_text((place / "whole.run" / "settings.yaml").read_text())
    with pytest.raises(AsdmError, match="another training: it has `warmup_steps: 2`"):
        run(place, monkeypatch, out="other", resume=True)
    recipe = place / "student" / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("model: teacher", "model: ./long-gone"))
    try:
        with pytest.raises(AsdmError, match="the student's teacher cannot be opened") as caught:
            run(place, monkeypatch, teacher=None)
    finally:
        recipe.write_text(text)
    assert "--teacher" in str(caught.value.hint)
    assert not (place / "new.run").exists()


def test_a_diverged_training_goes_on_with_a_lower_rate_and_a_tracker_hears_of_it(place, monkeypatch):
    """The hint of the error is followed; nothing else of the training may be another."""
    high = {"optimiser.learning_rate": 1e30, "trains": "all", "optimiser.warmup_steps": 5, "probe_every": 0}
    loop = LoopSettings(save_every=1, log_every=1)
    with pytest.raises(AsdmError, match=r"no number any more at step \d") as caught:
        run(place, monkeypatch, out="mended", changes=high, loop=loop)
    assert not (place / "mended").exists()
    assert "--resume and a lower --learning-rate" in str(caught.value.hint)
    # The second step's rate has broken the weights, which the third step's loss has shown after they were saved.
    assert f"last good checkpoint is of step {Checkpoints(place / 'mended.run' / 'checkpoints').last()}" in str(
        caught.value
    )
    low = {**high, "optimiser.learning_rate": 1e-3}
    with pytest.raises(AsdmError, match="another training: it has `seed: 0`"):
        run(place, monkeypatch, out="mended", changes={**low, "seed": 1}, loop=loop, resume=True)
    result = run(
        place, monkeypatch, out="mended", changes=low, loop=loop, resume=True, trackers=("tensorboard",),
    )  # fmt: skip
    assert result.outcome.steps == 8
    rates = [line["learning_rate"] for line in lines(place, "mended")]
    assert max(rates[1:]) <= 1e-3
    assert all(math.isfinite(line["loss"]) for line in lines(place, "mended"))
    assert list((place / "mended.run").rglob("events.out.tfevents.*"))
    with pytest.raises(AsdmError, match="the tracker wandb is not installed"):
        run(place, monkeypatch, out="untold", trackers=("wandb",))


def test_other_optimisers_precisions_and_losses_train(place, monkeypatch):
    changes = {
        "optimiser.name": "adamw-fused", "losses.trajectory": 0.1, "losses.trajectory_steps": 2, "steps": 2,
        "losses.random_conditioning": 5.0, "losses.feature": 0, "trains": "around-cuts", "probe_every": 1,
    }  # fmt: skip
    (place / "captions.txt").write_text("a red circle\na blue ring\na white cross\na green square\n")
    (place / "probe.txt").write_text("a red ring\na blue circle\na green square\n")
    more = {"data.source": "captions.txt", "data.sampling_steps": 2, "probe_captions": "probe.txt", "probe_prompts": 2}
    result = run(place, monkeypatch, out="others", changes={**changes, **more}, mixed_precision="bf16")
    assert result.items == 4
    assert result.outcome.steps == 2
    assert not result.pairs
    recipe = load_recipe(place / "others" / "recipe.yaml")
    assert (recipe.distillation.data.sampling_steps, recipe.distillation.probe_every) == (2, 1)
    assert recipe.distillation.probe_captions == "probe.txt"
    assert choose_training(recipe, None, None, {}).probe_captions is None  # the file may not be where it is trained on
    assert recipe.provenance["distilled"]["mixed_precision"] == "bf16"
    assert (place / "others" / "grid.png").stat().st_size > 1000
    assert {t.dtype for t in trained(place, "others").values()} == {torch.float32}
    with pytest.raises(AsdmError, match="need the package bitsandbytes") as caught:
        run(place, monkeypatch, out="eight", changes={"optimiser.name": "adamw-8bit"})
    assert caught.value.exit_code == 4


def test_own_captions_of_a_probe_are_none_of_the_data(place, monkeypatch):
    images = place / "images"
    images.mkdir()
    for name, caption in (("a", "a red ring"), ("b", "a blue circle")):
        Image.new("RGB", (32, 32), "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(caption)
    (place / "lines.txt").write_text("a red ring\na green square\n")
    (place / "probed.txt").write_text("a red ring\na white cross\n")
    for source in ("images", "lines.txt"):
        changes = {"data.source": source, "data.size": 2, "probe_captions": "probed.txt", "probe_every": 1}
        with pytest.raises(
            AsdmError, match=r"1 of the captions of probed\.txt are trained on, the first is `a red ring`"
        ):
            run(place, monkeypatch, out="choosy", changes=changes)
    with pytest.raises(AsdmError, match=r"the prompts file nowhere\.txt cannot be read"):
        run(place, monkeypatch, out="choosy", changes={**changes, "probe_captions": "nowhere.txt"})
    assert not (place / "choosy").exists()
    assert not (place / "choosy.run").exists()


def test_lora_trains_little_and_leaves_a_plain_student(place, monkeypatch):
    changes = {"trains": "lora", "optimiser.learning_rate": 1e-2, "probe_every": 0}
    result = run(place, monkeypatch, out="lora", changes=changes)
    before, after = trained(place, "student"), trained(place, "lora")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".to_" in name and ".attn" in name for name in moved)
    assert result.forecast.trained < 0.3 * sum(t.numel() for t in before.values())
    torch.rand(7)  # wherever the generator of all else stands
    run(place, monkeypatch, out="lora-again", changes=changes)
    again = trained(place, "lora-again")
    assert all(torch.equal(after[name], again[name]) for name in after)
