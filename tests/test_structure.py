"""Sites, edits and the walk: what the UNet is made of and what taking parts out does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly.plan import Plan, edited, place
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.edits import apply_edits, edited_copy, legal_edits, removable_levels
from asdm_compress.models.sites import find_sites
from asdm_compress.models.tree import meta_copy, sharing_copy
from asdm_compress.models.walk import finish, shared_prefix, start, steps_of, take


@torch.no_grad()
def predict(unet, inputs):
    return unet(*inputs, return_dict=False)[0]


def random_edits(data, unet):
    legal = legal_edits(unet)
    sites = data.draw(st.lists(st.sampled_from(sorted(legal)), unique=True, max_size=12))
    inside = [s for s in sites if not any(s.startswith(f"{other}.") for other in sites)]
    return {site: data.draw(st.sampled_from(legal[site])) for site in inside}


def test_blocks_hold_every_parameter_once(unet):
    sites = find_sites(unet)
    modules = [m for s in sites if s.level == "block" for m in s.modules]
    names = [
        f"{path}.{name}"
        for path in modules
        if path not in ("time_proj", "conv_act")
        for name, _ in unet.get_submodule(path).named_parameters()
    ]
    assert sorted(names) == sorted(name for name, _ in unet.named_parameters())


def test_sites_form_a_tree_with_real_modules(unet):
    sites = find_sites(unet)
    paths = [s.path for s in sites]
    assert len(set(paths)) == len(paths)
    for site in sites:
        assert site.parent is None or paths.index(site.parent) < paths.index(site.path)
        assert all(unet.get_submodule(m) is not None for m in site.modules)
    levels = [s.level for s in sites]
    assert {level: levels.count(level) for level in set(levels)} == {
        "block": 12, "layer": 22, "unit": 44, "sub-unit": 84,
    }  # fmt: skip


def test_the_walk_is_bit_identical_to_the_stock_forward(unet, inputs):
    with torch.no_grad():
        assert torch.equal(finish(steps_of(unet), start(unet, *inputs)), predict(unet, inputs))


def test_the_walk_handles_sizes_that_do_not_halve_evenly(unet, inputs):
    sample = torch.randn(2, 4, 20, 12, generator=torch.Generator().manual_seed(0))
    odd = (sample, *inputs[1:])
    with torch.no_grad():
        assert torch.equal(finish(steps_of(unet), start(unet, *odd)), predict(unet, odd))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_edited_copies_run_leave_the_original_alone_and_share_its_weights(unet, inputs, data):
    before = predict(unet, inputs)
    edits = random_edits(data, unet)
    twin = edited_copy(unet, edits)
    after = predict(twin, inputs)
    assert after.shape == before.shape
    assert torch.equal(predict(unet, inputs), before)
    originals = {p.data_ptr() for p in unet.parameters()}
    assert all(p.data_ptr() in originals for p in twin.parameters())
    if not edits:
        assert torch.equal(after, before)
    with torch.no_grad():
        steps, changed = steps_of(unet), steps_of(twin)
        begin = shared_prefix(steps, changed)
        assert begin == len(steps) or edits
        assert torch.equal(finish(changed, start(twin, *inputs)), after)


def test_every_legal_edit_keeps_the_shapes(unet):
    sample = torch.empty(1, 4, 16, 16, device="meta")
    text = torch.empty(1, 40, unet.config["cross_attention_dim"], device="meta")
    blank = meta_copy(unet)
    for path, edits in legal_edits(unet).items():
        for edit in edits:
            twin = edited_copy(blank, {path: edit})
            assert twin(sample, torch.empty((), device="meta"), text).sample.shape == sample.shape, path


def test_illegal_edits_are_named(unet):
    with pytest.raises(AsdmError, match=r"no unit or sub-unit 'down_blocks\.7"):
        apply_edits(edited_copy(unet, {}), {"down_blocks.7.resnets.0": "drop"})
    with pytest.raises(AsdmError, match=r"not possible at down_blocks\.1\.resnets\.0"):
        place(unet, Plan({"down_blocks.1.resnets.0": "drop"}))
    with pytest.raises(AsdmError, match="overlap"):
        place(unet, Plan({"mid_block": "drop", "mid_block.resnets.0": "drop"}))
    with pytest.raises(AsdmError, match="overlap"):
        place(unet, Plan({"levels.3": "drop", "up_blocks.0.resnets.1": "drop"}))
    with pytest.raises(AsdmError, match=r"levels\.2 cannot be removed"):
        place(unet, Plan({"levels.2": "drop"}))
    with pytest.raises(AsdmError, match="cannot be edited"):
        place(unet, Plan({"conv_in": "drop"}))


def test_levels_can_go_only_where_widths_meet(unet, sd15_on_meta):
    assert removable_levels(unet) == (3,)
    assert removable_levels(sd15_on_meta) == (3,)


def test_a_sharing_copy_is_the_same_function_of_the_same_weights(unet, inputs):
    twin = sharing_copy(unet)
    assert torch.equal(predict(twin, inputs), predict(unet, inputs))
    twin.mid_block = None
    assert unet.mid_block is not None
    assert all(a is b for a, b in zip(twin.conv_in.parameters(), unet.conv_in.parameters(), strict=True))


def test_removing_a_level_or_the_mid_block_runs(unet, inputs):
    for site in ("levels.3", "mid_block"):
        twin = edited(unet, Plan({site: "drop"}))
        assert predict(twin, inputs).shape == inputs[0].shape
        assert not torch.equal(predict(twin, inputs), predict(unet, inputs))


@torch.no_grad()
@pytest.mark.parametrize("plan", [{}, {"mid_block": "drop"}, {"down_blocks.3.resnets.1": "drop"}], ids=str)
def test_freeu_is_the_same_step_by_step_and_leaves_a_kept_state_alone(unet, inputs, plan):
    """diffusers scales the hidden state in place, which may be a skip connection at once."""
    student = assemble(unet, Plan(plan))
    plain = student(*inputs, return_dict=False)[0]
    student.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    expected = student(*inputs, return_dict=False)[0]
    steps = steps_of(student)
    middle = next(i for i, step in enumerate(steps) if step.path.startswith("up_blocks"))
    state = start(student, *inputs)
    for step in steps[:middle]:
        state = take(step, state)
    assert torch.equal(finish(steps[middle:], state), expected)
    assert torch.equal(finish(steps[middle:], state), expected), "the kept state has changed"
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_a_hook_on_an_edited_copy_is_none_of_the_originals(unet):
    before = (len(unet._forward_hooks), len(unet._forward_pre_hooks))
    twin = edited_copy(unet, {"mid_block.attentions.0": "drop"})
    twin.register_forward_hook(lambda *_: None, always_call=True)
    twin.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    assert (len(unet._forward_hooks), len(unet._forward_pre_hooks)) == before
    assert len(twin._forward_hooks) == before[0] + 1
