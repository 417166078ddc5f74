"""`evaluate`, by the commands of its guide: files, figures, resuming, several processes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from stand_ins import save_alexnet, save_clip, save_inception

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.evaluation.instruments import Weights
from asdm_compress.evaluation.record import NAMES, load_evaluation
from asdm_compress.evaluation.weights import weights_place
from asdm_compress.models.source import LoadOptions
from asdm_compress.sampling.schedulers import scheduler_like
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.scenes.draw import draw_scenes
from asdm_compress.scenes.world import sample_scene
from asdm_compress.workflows import evaluate as workflow
from asdm_compress.workflows.evaluate import run_evaluate
from asdm_compress.workflows.evaluation_input import EvaluateSettings
from asdm_compress.workflows.evaluation_run import prepare_run
from asdm_compress.workflows.progress import Silent
from asdm_compress.workflows.training_run import DistillSettings, check_places

GUIDE = Path(__file__).parents[1] / "tools" / "guides" / "evaluate.md"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
SMALL = {"images": 4, "steps": 2}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def followed(tmp_path_factory, cli_in):
    """A folder in which all commands of the guide have been run, in order."""
    folder = tmp_path_factory.mktemp("guide")
    captions = [caption.text for caption in sample_captions(5, 8)]
    (folder / "captions.txt").write_text("\n".join(captions))
    save_clip(folder / "clip")
    environment = {**os.environ, "ASDM_COMPRESS_CACHE": str(folder / "cache"), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    for command in commands():
        if command[0] == "accelerate":
            shared = [*ACCELERATE, command[1], "--main_process_port", "0", *command[2:]]
            result = subprocess.run(
                shared, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
            )
        else:
            result = cli_in(folder, *command[1:])
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
    return folder


def test_the_guide_leaves_whole_folders(followed):
    assert len(commands()) == 5
    for name, pairs in (("evaluation", 6), ("fewer", 4), ("scored", 4), ("shared", 4)):
        found = load_evaluation(followed / name / "eval.json")
        assert len(found.pairs) == pairs
        assert not (followed / f"{name}.run").exists()
        for pair in found.pairs:
            for image in (pair.teacher_image, pair.model_image):
                with Image.open(followed / name / image) as picture:
                    assert picture.size == (128, 128)
        assert {m.name for m in found.measures} <= {name for names in NAMES.values() for name in names}


def test_every_figure_has_its_n_and_interval(followed):
    found = load_evaluation(followed / "evaluation" / "eval.json")
    for measure in found.measures:
        for estimate in (measure.teacher, measure.model, measure.change):
            if estimate is not None:
                assert estimate.n >= 1
                assert estimate.low <= estimate.high
                assert estimate.method == "exact" or estimate.n in (
                    (600,) if measure.name == "recall" else (2, 3, 4, 6)
                )
    psnr = found.find("psnr")
    assert psnr.model.n == 6
    assert psnr.model.value == pytest.approx(sum(pair.psnr for pair in found.pairs) / 6)
    speed = found.find("seconds_per_image", "with VAE")
    assert speed.teacher.n == speed.model.n == 3 == len(found.timings["loop"]["model"])
    accuracy = found.find("prompt_accuracy")
    assert accuracy.teacher.value == pytest.approx(sum(pair.teacher_right for pair in found.pairs) / 6)
    assert [found.find("prompt_accuracy", f"{n} object{'s' * (n > 1)}").model.n for n in (1, 2, 3)] == [2, 2, 2]
    assert found.find("parameters").change.value < 0.5
    assert found.find("macs", "one image").model.value == 3 * found.find("macs", "one UNet pass").model.value
    assert found.find("frechet", reference="teacher").model.value > 0
    assert found.teacher.name == "mini-sd"
    assert found.model.is_recipe_student


def test_the_protocol_card_says_what_it_takes_to_repeat(followed):
    card = (followed / "evaluation" / "protocol.md").read_text(encoding="utf-8")
    found = load_evaluation(followed / "evaluation" / "eval.json")
    for text in (
        found.protocol.prompts_sha256,
        found.protocol.sampler,
        "3 steps",
        "1000 to 1005",
        found.protocol.extractors[0].sha256,
        found.model.weights,
        found.command,
    ):
        assert text in card


def test_a_model_samples_as_its_teacher_does_but_for_what_it_predicts(followed):
    assert load_evaluation(followed / "scored" / "eval.json").model.sampling is None
    v = DPMSolverMultistepScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", solver_order=3)
    euler = EulerDiscreteScheduler(timestep_spacing="trailing", beta_start=0.001)
    found = scheduler_like(euler, v)
    assert isinstance(found, EulerDiscreteScheduler)
    assert (found.config.prediction_type, found.config.beta_schedule) == ("v_prediction", "scaled_linear")
    assert (found.config.timestep_spacing, found.config.beta_start) == ("trailing", v.config.beta_start)


def test_a_model_that_inherits_does_less(followed):
    found = load_evaluation(followed / "scored" / "eval.json")
    assert found.model.inherit == "uniform:2"
    assert found.teacher.inherit is None
    assert found.find("macs", "one image").change.value < 0.9
    assert found.find("macs", "one UNet pass").change.value == 1
    assert found.find("psnr").model.value < 60
    assert found.find("seconds_per_image", "with VAE") is None  # --repeats 0
    assert found.timings == {}


def test_prompts_of_ones_own_have_no_claims_and_a_clip_score(followed):
    found = load_evaluation(followed / "scored" / "eval.json")
    assert found.find("prompt_accuracy") is None
    score = found.find("clip_score")
    assert score.model.value == pytest.approx(sum(pair.model_clip for pair in found.pairs) / 4, abs=1e-5)
    assert -1 < score.model.low <= score.model.high < 1
    assert [extractor.name for extractor in found.protocol.extractors] == ["clip"]
    assert found.protocol.prompts == "captions.txt"


def evaluate(out, settings, model="mini-sd"):
    return run_evaluate(model, out, LoadOptions(), settings, Silent())


def plain_figures(evaluation):
    return {(m.name, m.part, m.extractor, m.reference): m.model.value for m in evaluation.measures}


def test_what_is_done_is_not_done_again_and_two_processes_find_the_same(followed, tmp_path, monkeypatch):
    """A run that is stopped goes on with the chunks that are there, and refuses those of another evaluation.

    It has the student's UNet alone, inside the teacher's pipeline: the same figures as the student's folder, which two
    processes have shared.
    """
    settings = EvaluateSettings("mini-sd", changes=SMALL, repeats=0, batch=2, keep_images=2)
    student, chunk, done = str(followed / "student" / "unet"), workflow.measure_pairs, []

    def stopping(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments[3])
        return chunk(*arguments)

    monkeypatch.setattr(workflow, "measure_pairs", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "out", settings, student)
    assert not (tmp_path / "out").exists()
    kept = sorted((tmp_path / "out.run" / "chunks").iterdir())
    assert [path.name for path in kept] == ["000000.safetensors"]
    assert load_file(kept[0])["psnr"].shape == (2,)
    begun = json.loads((tmp_path / "out.run" / "settings.json").read_text())
    # Another process has diffusers' own remarks in another order.
    assert begun["sampler"][0]["config"] and not any(name.startswith("_") for name in begun["sampler"][0]["config"])
    with pytest.raises(AsdmError, match="begun with other settings") as caught:
        evaluate(tmp_path / "out", replace(settings, changes={**SMALL, "steps": 3}), student)
    assert "--overwrite" in caught.value.hint

    def counted(*arguments):
        done.append(arguments[3])
        return chunk(*arguments)

    monkeypatch.setattr(workflow, "measure_pairs", counted)
    ours = plain_figures(evaluate(tmp_path / "out", settings, student))
    assert done == [range(2), range(2, 4)]
    assert sorted(p.name for p in (tmp_path / "out" / "images" / "model").iterdir()) == ["000000.png", "000001.png"]
    shared = load_evaluation(followed / "shared" / "eval.json")
    assert shared.machine.processes == 2
    theirs = plain_figures(shared)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """What a user brings for the published protocol: captions, reference images, weights."""
    folder = tmp_path_factory.mktemp("brought")
    captions = [{"id": i, "image_id": i, "caption": c.text} for i, c in enumerate(sample_captions(6, 12))]
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
    (folder / "photographs").mkdir()
    import numpy as np

    rng = np.random.default_rng(0)
    for i, pixels in enumerate(draw_scenes([sample_scene(rng) for _ in range(5)])):
        array = (pixels.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(array).resize((96 + 8 * i, 80)).save(folder / "photographs" / f"{i}.jpg")
    save_inception(folder / "inception.pth")
    save_alexnet(folder / "alexnet.pth")
    save_clip(folder / "clip")
    return folder


def published(brought, **changes):
    return EvaluateSettings(
        "mini-sd",
        "uniform:2",
        "bk-sdm",
        {"images": 4, "steps": 2, "image_size": 128, "view_size": 64, **changes},
        brought / "captions.json",
        brought / "photographs",
        Weights(brought / "inception.pth", brought / "clip", brought / "clip", brought / "alexnet.pth"),
        0,
        2,
        0,
    )


def test_a_published_protocol_on_weights_of_the_right_shape(brought, tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    found = evaluate(tmp_path / "out", published(brought))
    names = {(m.name, m.extractor, m.reference) for m in found.measures}
    for one in (
        ("frechet", "inception", "photographs"),
        ("kernel", "inception", "photographs"),
        ("precision", "inception", "photographs"),
        ("recall", "inception", "photographs"),
        ("inception_score", "inception", None),
        ("cmmd", "cmmd-clip", "photographs"),
        ("clip_score", "clip", None),
        ("lpips", None, "teacher"),
    ):
        assert one in names
    protocol = found.protocol
    sampled = (protocol.name, protocol.sampler, protocol.unet_calls, protocol.guidance)
    assert sampled == ("bk-sdm", "PNDMScheduler", 3, 7.5)
    assert (protocol.seed, protocol.measured_size, protocol.reference.count) == (1234, 64, 5)
    assert "JPEG quality 75" in protocol.resize_filter
    assert "images: 4; published: 30000" in protocol.departures
    assert any("ViT-g/14" in departure for departure in protocol.departures)
    assert {e.name for e in protocol.extractors} == {"inception", "clip", "cmmd-clip", "lpips-alex"}
    # The reference is measured once: its features are in the cache.
    kept = list((tmp_path / "cache" / "references").rglob("*.safetensors"))
    assert len(kept) == 1
    assert load_file(kept[0])["inception"].shape == (5, 2048)
    # The same by its statistics.
    features = load_file(kept[0])["inception"].double().numpy()
    import numpy as np

    np.savez(tmp_path / "real.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    weights = replace(published(brought).weights, cmmd=None, lpips=None, clip=None)
    settings = replace(published(brought), reference=tmp_path / "real.npz", weights=weights, protocol="own")
    as_published = {"sampler": "pndm", "guidance": 7.5, "seed": 1234, "view_jpeg": 75}
    settings = replace(settings, changes={**settings.changes, **as_published})
    again = evaluate(tmp_path / "again", settings)
    distance = found.find("frechet", reference="photographs").model.value
    assert again.find("frechet", reference="real.npz").model.value == pytest.approx(distance, rel=1e-3)


def test_what_is_missing_is_named_with_its_place(brought, tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    settings = published(brought)
    without = {
        "needs prompts": replace(settings, prompts=None),
        "needs reference": replace(settings, reference=None),
        "Inception network of FID is missing": replace(settings, weights=replace(settings.weights, inception=None)),
        "CLIP model is missing": replace(settings, weights=replace(settings.weights, clip=None)),
        "LPIPS is not at": replace(settings, weights=replace(settings.weights, lpips=tmp_path / "nowhere.pth")),
        "nothing measures the reference": replace(
            settings, protocol="own", weights=Weights(), changes={**settings.changes, "view_size": None}
        ),
        "--resize is the size": replace(settings, protocol="own", weights=Weights(), reference=None),
        "has 6 captions": replace(settings, changes={**settings.changes, "images": None}),
        "no multiple of 64": replace(settings, changes={**settings.changes, "image_size": 100}),
    }
    for words, one in without.items():
        with pytest.raises(AsdmError, match=words) as caught:
            evaluate(tmp_path / "out", one)
        if "is missing" in words:
            assert caught.value.exit_code == ExitCode.ENVIRONMENT
            place = "weights-inception-2015-12-05-6726825d.pth" if "Inception" in words else "clip"
            assert str(weights_place(place)) in caught.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.raises(AsdmError, match="does not say what it was made of"):
        evaluate(tmp_path / "out", EvaluateSettings(None))


def test_an_evaluation_and_a_training_do_not_replace_what_the_other_has_begun(tmp_path):
    run = tmp_path / "out.run"
    run.mkdir()
    (run / "settings.yaml").write_text("steps: 4\n", encoding="utf-8")
    with pytest.raises(AsdmError, match="holds a training"):
        prepare_run(run, {"seed": 1}, overwrite=True)
    (run / "settings.yaml").rename(run / "settings.json")
    with pytest.raises(AsdmError, match="holds an evaluation"):
        check_places(tmp_path / "out", run, "student", DistillSettings(overwrite=True))
    (run / "settings.json").write_text("{}", encoding="utf-8")
    prepare_run(run, {"seed": 1}, overwrite=True)
    assert json.loads((run / "settings.json").read_text(encoding="utf-8")) == {"seed": 1}
