"""Counts against published figures and other counters; the profile's own laws."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly.options import find_options, teacher_costs
from asdm_compress.assembly.plan import Plan, edited
from asdm_compress.assembly.search import costs_of
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.tree import meta_copy
from asdm_compress.profiling.counting import count
from asdm_compress.profiling.crosscheck import cross_check
from asdm_compress.profiling.latency import time_side_by_side
from asdm_compress.profiling.profile import (
    ProfileSettings,
    check_fingerprint,
    fingerprint,
    load_profile,
    profile,
    random_inputs,
)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs", "conv_linear"),
    [
        ("sd15", 859_520_964, 401.64, 338.6),
        ("sd21-base", 865_910_724, 402.1, 339.1),
        ("sd21", 865_910_724, 1074.6, 760.5),
    ],
)
def test_full_size_counts_are_the_published_ones(name, parameters, gmacs, conv_linear):
    family = FAMILIES[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**family.unet_config)
    macs = count(unet, 1, family.image_size // 8, family.image_size // 8, 77).macs[""]
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert macs.total / 1e9 == pytest.approx(gmacs, rel=2e-4)
    assert macs.conv_linear / 1e9 == pytest.approx(conv_linear, rel=2e-4)
    # Of two samples at once torch makes other products out of linear layers; their kind stays what it is.
    two = count(unet, 2, family.image_size // 8, family.image_size // 8, 77).macs[""]
    assert (two.conv_linear, two.attention) == (2 * macs.conv_linear, 2 * macs.attention)


def test_sd15_splits_into_kinds_of_work(sd15_on_meta):
    macs = count(sd15_on_meta, 1, 64, 64, 77).macs[""]
    assert [round(v / 1e9, 2) for v in (macs.convolution, macs.linear, macs.attention)] == [221.97, 116.64, 63.03]


def test_counts_grow_with_the_batch_and_add_up_over_blocks(unet, mini_profile):
    one, two = (count(unet, batch, 16, 16, 40) for batch in (1, 2))
    blocks = [s for s in mini_profile.sites if s.level == "block"]
    assert two.macs[""].total == 2 * one.macs[""].total
    assert sum(s.macs for s in blocks) == mini_profile.macs == two.macs[""].total
    assert sum(s.parameters for s in blocks) == mini_profile.parameters


def test_children_add_up_to_their_parents(mini_profile):
    for parent in mini_profile.sites:
        children = [s for s in mini_profile.sites if s.parent == parent.path]
        if children and parent.kind not in ("resnet", "downsampler", "upsampler"):
            assert sum(s.macs for s in children) == parent.macs, parent.path
            assert sum(s.parameters for s in children) == parent.parameters, parent.path


def test_peak_memory_is_at_least_what_must_be_held(unet):
    peaks = count(unet, 2, 16, 16, 40).peak_bytes
    widest = 2 * 256 * unet.config["block_out_channels"][0] * 4
    assert peaks[""] == max(peaks.values()) > 2 * widest


def test_peak_memory_is_what_the_allocator_sees_up_to_kernel_workspace(unet, inputs):
    """Oracle: torch's own memory profiler on real CPU tensors."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch.no_grad():
        unet(*inputs)
        with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            unet(*inputs)
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert count(unet, 2, 16, 16, 40).peak_bytes[""] == pytest.approx(peak, rel=0.25)


def test_another_counter_agrees_where_conventions_meet(unet):
    sample, timestep, text = random_inputs(unet, ProfileSettings(text_tokens=40))
    macs = count(unet, 2, 16, 16, 40).macs[""]
    before = set(unet.state_dict())
    for check in cross_check(unet, sample, timestep, text):
        assert check.macs[""] == pytest.approx(macs.conv_linear, rel=0.02), check.counter
    assert set(unet.state_dict()) == before


def test_no_site_takes_longer_than_what_it_is_part_of(mini_profile):
    for parent in mini_profile.sites:
        for i, seconds in enumerate(parent.latency_samples):
            inside = [s.latency_samples[i] for s in mini_profile.sites if s.parent == parent.path and s.kind != "layer"]
            assert sum(inside) <= seconds * (1 + 1e-9), parent.path
    assert 0 < mini_profile.explained <= 1


def test_every_sample_is_kept(mini_profile):
    assert len(mini_profile.latency_samples) == 3
    assert all(len(s.latency_samples) == 3 for s in mini_profile.sites)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_predicted_counts_of_any_plan_are_those_of_the_built_student(unet, mini_profile, data):
    options = find_options(unet, mini_profile)
    chosen, taken = [], set()
    for option in data.draw(st.lists(st.sampled_from(options), max_size=15)):
        if not option.atoms & taken:
            chosen.append(option)
            taken |= option.atoms
    student = edited(meta_copy(unet), Plan({o.site: o.edit for o in chosen}))
    predicted = costs_of(chosen, teacher_costs(mini_profile))
    assert sum(p.numel() for p in student.parameters()) == predicted["params"]
    assert count(student, 2, 16, 16, 40).macs[""].total == predicted["macs"]


def test_a_profile_says_what_it_was_made_with(unet, mini_profile):
    wide = ProfileSettings(192, 4, 40, channels_last=True, repeats=2)
    mark = fingerprint(unet, wide, "mini-sd")
    assert ProfileSettings.of(mini_profile.model_copy(update={"fingerprint": mark}), 2) == wide


def test_profiles_are_saved_and_read_and_refused_for_other_settings(unet, mini_profile, tmp_path):
    path = tmp_path / "profile.json"
    mini_profile.save(path)
    assert load_profile(path) == mini_profile
    other = mini_profile.fingerprint.model_copy(update={"batch": 1, "dtype": "bfloat16"})
    check_fingerprint(mini_profile.fingerprint, mini_profile.fingerprint)
    with pytest.raises(
        AsdmError, match="dtype: float32 in the profile, bfloat16 here; batch: 2 in the profile, 1 here"
    ):
        check_fingerprint(other, mini_profile.fingerprint)
    whole = path.read_text()
    path.write_text(whole.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(AsdmError, match="schema version 9"):
        load_profile(path)
    path.write_text(whole.replace('"batch": 2', '"batch": "two"', 1))
    with pytest.raises(AsdmError, match=r"profile\.json: fingerprint\.batch: .*integer"):
        load_profile(path)
    path.write_text("[]")
    with pytest.raises(AsdmError, match="schema version None"):
        load_profile(path)


def test_an_image_size_that_does_not_fit_is_refused(unet):
    with pytest.raises(AsdmError, match="multiple of 8"):
        profile(unet, replace(ProfileSettings(), image_size=100))


def test_undisturbed_seconds_of_one_thread_are_those_in_which_it_had_the_core():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (own,) = time_side_by_side([lambda: time.sleep(0.05)], 2, torch.device("cpu"), undisturbed=True)
        (passed,) = time_side_by_side([lambda: time.sleep(0.05)], 2, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert max(own) < 0.03
    assert min(passed) >= 0.05
