"""`optimize --criterion quality`: pictures judged by what they show, not by their nearness to others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from stand_ins import save_clip

from asdm_compress.evaluation.distances import frechet_distance
from asdm_compress.evaluation.fidelity import to_tensor
from asdm_compress.evaluation.instruments import Instruments, Weights
from asdm_compress.evaluation.quality import scene_features
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.scenes.reader import load_reader
from asdm_compress.scenes.verdict import judge as verdict_of
from asdm_compress.scheduling.rollouts import Judge, Score
from asdm_compress.scheduling.ways import Way
from asdm_compress.scheduling.worth import OTHER_SEEDS, QualityJudge, Worth, best_of
from asdm_compress.workflows.candidates import Candidate, Criterion, best_within, frontier_of
from asdm_compress.workflows.report import write_report

QUICK = (
    "optimize", "mini-sd", "--criterion", "quality", "--steps", "4", "--repeats", "2", "--json",
    "--calibration-prompts", "1", "--validation-prompts", "4", "--test-prompts", "3",
)  # fmt: skip
SAME = (0.9, 0.8, 1.0, 0.7)


def candidate(share, shown, distance, psnr=20.0):
    worth = None if shown is None else Worth(shown, distance)
    return Candidate("role", Way(f"{share}", 4, 0.0), share, Score((psnr,), (0.5,)), worth=worth)


def test_of_those_that_show_as_much_the_nearest_is_best():
    shows_most, near, shows_less = Worth(SAME, 9.0), Worth((0.9, 0.8, 0.9, 0.7), 1.0), Worth((0.1, 0.0, 0.2, 0.0), 0.1)
    assert best_of([shows_most, near, shows_less]) == 1
    assert shows_less.is_behind(shows_most)
    assert not near.is_behind(shows_most)
    assert near.is_as_good_as(Worth(SAME, 0.9))
    assert not Worth(SAME, 1.0, farther=True).is_as_good_as(Worth(SAME, 0.9))
    assert not shows_less.is_as_good_as(shows_most)


def test_what_takes_too_long_is_neither_best_nor_on_the_frontier():
    tried = [
        candidate(0.6, None, 0.0, psnr=60.0), candidate(0.5, SAME, 1.0), candidate(0.4, SAME, 2.0),
        candidate(0.3, SAME, 3.0), candidate(0.35, SAME, 4.0),
    ]  # fmt: skip
    best = best_within(tried, 0.5)
    assert best == 1
    assert [c.share for c in frontier_of(tried)] == [0.3, 0.4, 0.5]
    assert best_within(tried, 0.2) is None
    by_nearness = [candidate(0.3, None, 0.0, 30.0), candidate(0.4, None, 0.0, 20.0), candidate(0.5, None, 0.0, 40.0)]
    assert best_within(by_nearness, 0.45) == 0
    assert [c.share for c in frontier_of(by_nearness)] == [0.3, 0.5]


@pytest.mark.parametrize(
    ("name", "own", "counts"),
    [
        ("fidelity", None, (8, 16, 32)), ("fidelity", 20, (8, 16, 32)), ("quality", None, (8, 128, 128)),
        ("quality", 20, (6, 7, 7)), ("quality", 400, (8, 128, 128)), ("quality", 2, (1, 1, 1)),
    ],
)  # fmt: skip
def test_quality_takes_many_prompts_and_of_few_leaves_some_to_measure_on(name, own, counts):
    assert Criterion(name).prompts(8, own) == counts


def test_the_frontier_ends_with_the_best():
    """What is as good as what shows most, and nearer, is not surely less than it, whatever comes between them."""
    shows_most = candidate(0.5, (1.0, 0.9, 1.0, 0.9), 3.0)
    nearer = candidate(0.4, (1.0, 0.7, 0.9, 0.9), 2.0)
    first = candidate(0.3, (0.7, 0.6, 0.7, 0.6), 1.0)
    tried = [shows_most, nearer, first]
    best = best_within(tried, 1.0)
    assert best is not None
    assert frontier_of(tried)[-1] is tried[best] is nearer
    assert frontier_of(tried)[0] is first


def test_the_reader_says_what_pictures_are_worth(pipeline, tmp_path):
    captions = sample_captions(5, 11)
    settings, way = SamplingSettings(4, 4.0, 3), Way("two steps", 2, 0.0)
    judge = Judge(pipeline, [c.text for c in captions], settings, tmp_path)
    opened = Instruments(Weights(), reads_scenes=True, device=torch.device("cpu"))
    quality = QualityJudge(judge, opened, captions)
    found = quality.worth(way)
    pictures = to_tensor(judge.pictures_of(way))
    verdicts = [verdict_of(c, seen) for c, seen in zip(captions, load_reader().read(pictures), strict=True)]
    assert found.shown == pytest.approx([sum(v.right.values()) / sum(v.of.values()) for v in verdicts])
    others = Judge(pipeline, judge.prompts, SamplingSettings(4, 4.0, 3 + OTHER_SEEDS))
    reference = scene_features(to_tensor(others.pictures))
    assert found.distance == pytest.approx(frechet_distance(scene_features(pictures), reference), rel=1e-4)
    assert quality.full.distance == pytest.approx(
        frechet_distance(scene_features(to_tensor(judge.pictures)), reference), rel=1e-4
    )
    # The same pictures were scored, and all of it is known to another run.
    [scores], [worths] = (list(tmp_path.glob(f"{name}-*.jsonl")) for name in ("scores", "worth"))
    before = scores.read_bytes(), worths.read_bytes()
    with worths.open("a", encoding="utf-8") as file:
        file.write('{"way": "cut sho')
    again = QualityJudge(Judge(pipeline, judge.prompts, settings, tmp_path), opened, captions)
    assert again.worth(way) == found
    assert again.judge.score(way) == judge.score(way)
    assert (scores.read_bytes(), worths.read_bytes().partition(b'{"way": "cut')[0]) == before


@pytest.fixture(scope="module")
def judged(cli_in, tmp_path_factory):
    """A folder with what `optimize` left in `fast`, and what it printed."""
    folder = tmp_path_factory.mktemp("judged")
    result = cli_in(folder, *QUICK, "-b", "latency=0.6x", "--out", "fast")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_the_best_is_chosen_by_what_its_pictures_are_worth(judged):
    folder, content = judged
    assert content["criterion"] == "quality"
    within = [entry for entry in content["tried"] if entry["share"] <= 0.6]
    assert within
    assert all((entry["worth"] is not None) == (entry["share"] <= 0.6) for entry in content["tried"])
    assert content["best"] in within
    assert all(entry["worth"]["pictures"] == 4 and entry["test_worth"]["pictures"] == 3 for entry in within)
    # None shows more and is nearer too.
    best = content["best"]["worth"]
    assert not any(e["worth"]["shown"] > best["shown"] and e["worth"]["distance"] < best["distance"] for e in within)
    assert {"joint", "calibrated"} <= {entry["role"] for entry in content["tried"]}
    assert (folder / "fast/frontier.svg").read_text(encoding="utf-8").count("claims that hold")
    assert content["reference"]["test_worth"]["pictures"] == 3


def test_the_report_says_what_chose(judged):
    folder, content = judged
    report = write_report(folder / "fast").report
    rows = report.section("optimize").as_json()["tables"][0]["rows"]
    column = "claims that hold and Fréchet distance, test"
    [best] = [row for row in rows if row[""] == "best"]
    assert best[column] == pytest.approx(content["best"]["test_worth"]["shown"])
    assert rows[-1]["role"] == "the full run"
    assert rows[-1][column] == pytest.approx(content["reference"]["test_worth"]["shown"])
    assert "claims that hold" in report.verdict[0]


def test_own_prompts_are_judged_by_a_clip_model(cli, tmp_path):
    save_clip(tmp_path / "clip")
    prompts = [
        f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue", "green", "white")
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    own = ("--prompts", "prompts.txt", "-b", "latency=0.6x", "--guidance", "1")
    result = cli(*QUICK, *own, "--clip", "clip", "--out", "fast")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["judged_by"] == ["CLIP score", "CMMD"]
    assert all(-1 <= e["worth"]["shown"] <= 1 for e in content["tried"] if e["worth"])
    assert np.isfinite(content["best"]["worth"]["distance"])
    for arguments, said in (
        (own, "--clip"),
        (("-b", "latency=0.6x", "--clip", "gone"), "CLIP"),
        (("-b", "latency=0.6x", "--validation-prompts", "1"), "fewer than 2"),
    ):
        refused = cli(*QUICK, *arguments, "--out", "none")
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr
        assert said in refused.stdout  # where --json tells errors too
        assert not (tmp_path / "none").exists()


def test_criteria_that_do_not_go_together_end_with_two(cli, tmp_path):
    for arguments, said in (
        (("--criterion", "beauty"), "fidelity or quality"),
        (("--clip", "x"), "--criterion quality"),
    ):
        refused = cli("optimize", "mini-sd", "-b", "latency=0.5x", *arguments, "--out", "none")
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr
        assert said in refused.stderr
        assert not (tmp_path / "none").exists()
