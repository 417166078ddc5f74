"""What is tried on prompts: kept, gone on with, and no longer than a way can still be the best."""

import copy
import json

import pytest
import torch

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import FULL, cut
from asdm_compress.inheritance.modes import parse_mode
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.scheduling import rollouts
from asdm_compress.scheduling.gains import measure_gains
from asdm_compress.scheduling.rollouts import Judge, Score, is_behind
from asdm_compress.scheduling.ways import Way

PROMPTS = ["a red ring", "a blue cross", "a green square above a red circle", "a white ring", "a cross", "a blue ring"]


def errors(score):
    """Mean squares: one value of a picture rounded otherwise, as in another batch, is 95 dB, and none is 100."""
    return [10 ** (-psnr / 10) for psnr in score.psnr]


def test_a_race_ends_as_all_scores_do_and_tries_less(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "LOOK", 2)
    settings = SamplingSettings(4, 1.0, 5)
    ways = [Way(mode, 4, 0.0, parse_mode(mode)) for mode in ("uniform:4,branch=0", "uniform:2,branch=0")]
    ways += [Way("two steps", 2, 0.0), Way("computed", 4, 0.0, Schedule((FULL,) * 4)), Way("one step", 1, 0.0)]
    told = []
    judge = Judge(pipeline, PROMPTS, settings, tmp_path, batch=4)
    running = judge.race(ways, progress=lambda done, total: told.append((done, total)))
    [kept] = tmp_path.glob("scores-*.jsonl")
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines() if line]
    tried = {line["name"]: len(line["psnr"]) for line in lines}
    whole = Judge(pipeline, PROMPTS, settings, batch=3)
    best = sorted(ways, key=lambda way: -whole.score(way).mean())
    assert running[0] is best[0]
    assert running == [way for way in best if way in running]
    assert told == sorted(told)
    assert told[-1] == (5 * 6, 5 * 6)
    for way in running:  # in batches as it would be in others
        assert errors(judge.score(way)) == pytest.approx(errors(whole.score(way)), rel=0.012, abs=1e-9)
    assert all(tried[way.name] == len(PROMPTS) for way in running)
    assert 0 < tried["one step"] < len(PROMPTS)
    # What dropped out is gone on with, by another run too.
    again = Judge(pipeline, PROMPTS, settings, tmp_path, batch=4)
    assert errors(again.score(ways[-1])) == pytest.approx(errors(whole.score(ways[-1])), rel=0.012, abs=1e-9)
    assert len(again.score(ways[0], 100).psnr) == len(PROMPTS)
    three = again.race(ways, leave=3)
    assert len(three) >= 3
    assert three[:3] == best[:3]
    assert again.race(ways, "ssim")[0] is max(ways, key=lambda way: whole.score(way).mean("ssim"))


def test_a_model_that_overflows_is_refused_and_nothing_of_it_kept(pipeline, tmp_path):
    """Pictures without numbers are all black, and so all alike."""
    broken = copy.deepcopy(pipeline)
    broken.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(AsdmError, match="latents are no numbers"):
        Judge(broken, PROMPTS[:2], SamplingSettings(2, 1.0, 5), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(AsdmError, match="latents are no numbers"):
        measure_gains(broken, encode(broken, PROMPTS[:2], 1.0), SamplingSettings(3, 1.0))


def test_a_way_that_overflows_is_far_from_the_full_run_and_stops_no_other(pipeline, monkeypatch):
    judge = Judge(pipeline, PROMPTS[:2], SamplingSettings(3, 1.0, 5))
    held, fine = Way("held", 3, 0.0, parse_mode("uniform:3,branch=0")), Way("all", 3, 0.0, Schedule((FULL,) * 3))
    sampled = Judge._sampled

    def overflowing(self, way, first, last):
        found = sampled(self, way, first, last)
        if way is held:
            found[0] = float("inf")
            found[1] = found[1].sign() * 1e38  # numbers, of which the VAE has none
        return found

    monkeypatch.setattr(Judge, "_sampled", overflowing)
    assert judge.race([held, fine])[0] is fine
    assert max(judge.score(held).psnr) < 30 < min(judge.score(fine).psnr)
    with pytest.raises(AsdmError, match="latents are no numbers"):
        judge.latents_of(held)


def test_gains_of_a_half_precision_model_are_measured_in_full(pipeline):
    half, seen = copy.deepcopy(pipeline), set()
    half.unet.to(torch.bfloat16)
    half.unet.register_forward_pre_hook(lambda _, x: seen.add(x[0].dtype))  # of its copies too
    found = measure_gains(half, encode(pipeline, PROMPTS[:2], 4.0), SamplingSettings(3, 4.0, 3))
    assert (seen, half.unet.dtype) == ({torch.float32}, torch.bfloat16)
    assert found.shape == (3,) and (found > 0).all()


def test_what_is_surely_behind_drops_out(pipeline, monkeypatch):
    monkeypatch.setattr(rollouts, "LOOK", 3)
    near, far = Score((40.0, 30.0, 41.0, 33.0), (1,) * 4), Score((20.0, 11.0, 20.5, 12.5), (1,) * 4)
    assert is_behind(far, near)
    assert not is_behind(near, far)
    assert not is_behind(near, near)
    assert not is_behind(Score((20.0, 60.0, 20.0, 33.0), (1,) * 4), near)  # by one prompt of four nobody is sure
    assert not is_behind(Score((1.0,), (1,)), Score((60.0,), (1,)))
    tried = []

    class Counting(Judge):
        def _sampled(self, way, first, last):
            tried.append((way.name, first, last))
            return super()._sampled(way, first, last)

    ways = [Way("computed", 4, 0.0, Schedule((FULL,) * 4)), Way("one step", 1, 0.0)]
    Counting(pipeline, PROMPTS, SamplingSettings(4, 1.0, 5), batch=8).race(ways)
    assert tried[1:] == [("computed", 0, 3), ("one step", 0, 3), ("computed", 3, 6)]


def test_what_was_tried_is_known_to_the_next_run_but_for_a_line_that_a_kill_cut_short(pipeline, tmp_path):
    settings = SamplingSettings(2, 1.0, 5)
    way = Way("held", 2, 0.0, Schedule((FULL, cut(0))))
    found = Judge(pipeline, ["a cross"], settings, tmp_path).score(way)
    [kept] = tmp_path.glob("scores-*.jsonl")
    lines = kept.read_text(encoding="utf-8")
    assert json.loads(lines)["psnr"] == list(found.psnr)
    kept.write_text(lines.replace("held", "kept") + lines[:20], encoding="utf-8")
    before = kept.read_text(encoding="utf-8")
    again = Judge(pipeline, ["a cross"], settings, tmp_path)
    assert again.score(way) == found
    assert kept.read_text(encoding="utf-8") == before  # nothing was added
    # Of another way a line of its own, behind the broken one; and through another VAE pictures are others.
    other = Way("full", 2, 0.0)
    assert again.score(other) != found
    assert Judge(pipeline, ["a cross"], settings, tmp_path).score(other) == again.score(other)
    vae = pipeline.vae
    try:
        pipeline.vae = copy.deepcopy(vae)
        pipeline.vae.decoder.conv_out.bias.data += 0.2
        assert Judge(pipeline, ["a cross"], settings, tmp_path).score(way) != found
    finally:
        pipeline.vae = vae
