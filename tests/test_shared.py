"""What both guidance branches have in common is computed once."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st

from asdm_compress.assembly.calibration import Effort, record
from asdm_compress.assembly.controlnet import controlnet_from
from asdm_compress.assembly.damage import measure_plan
from asdm_compress.assembly.option_fit import measure_options
from asdm_compress.assembly.options import find_options
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.plan_fit import fit_plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.edits import edited_copy, legal_edits
from asdm_compress.models.ldm import unet_to_ldm
from asdm_compress.models.saving import save_pipeline
from asdm_compress.models.stock_form import stock_form
from asdm_compress.profiling.counting import count_macs
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.profiling.slot_costs import places_of, slot_costs
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions

RESNET = "down_blocks.0.resnets.0"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SHARED = {RESNET: "shared", ATTENTION: "shared"}


def shared_places(unet):
    return [path for path, edits in legal_edits(unet).items() if "shared" in edits]


class Rows:
    """How many rows of a batch the modules of a UNet were given when it ran."""

    def __init__(self, unet, *paths):
        self.seen = {path: [] for path in paths}
        for path in paths:
            unet.get_submodule(path).register_forward_pre_hook(
                lambda _, x, path=path: self.seen[path].append(len(x[0]))
            )


@pytest.fixture
def twin(unet):
    return assemble(unet, Plan(SHARED))  # with modules of its own, on which hooks are put


@pytest.fixture
def guided(inputs):
    sample, timestep, text = inputs
    return sample[:1].repeat(2, 1, 1, 1), timestep if timestep.ndim == 0 else timestep[0], text[:2]


def test_the_places_are_those_before_the_text(unet, sd15_on_meta):
    assert shared_places(unet) == shared_places(sd15_on_meta) == [RESNET, ATTENTION]
    with torch.device("meta"):
        late = UNet2DConditionModel(
            **{
                **unet.config, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                                                    "DownBlock2D"),
            }
        )  # fmt: skip
    first = [f"down_blocks.{i}.resnets.{j}" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert shared_places(late) == [*first, "down_blocks.1.attentions.0.transformer_blocks.0.attn1"]
    with pytest.raises(AsdmError, match="not possible"):
        assemble(unet, Plan({"up_blocks.3.resnets.0": "shared"}))
    with pytest.raises(AsdmError, match="cannot be shared"):
        assemble(unet, Plan({"down_blocks.0.layers.0": "shared"}))


@torch.no_grad()
def test_equal_halves_are_computed_once_and_others_as_always(unet, twin, guided):
    rows = Rows(twin, f"{RESNET}.conv1", f"{ATTENTION}.to_q", "down_blocks.0.resnets.1.conv1")
    expected, found = unet(*guided)[0], twin(*guided)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert [*rows.seen.values()] == [[1], [1], [2]]
    sample, timestep, text = guided
    other = torch.cat([sample[:1], sample[1:] + 1e-3])
    assert torch.equal(twin(other, timestep, text)[0], unet(other, timestep, text)[0])
    times = torch.tensor([500, 501])
    assert torch.equal(twin(sample, times, text)[0], unet(sample, times, text)[0])
    three = sample[:1].repeat(3, 1, 1, 1), timestep, text[:1].repeat(3, 1, 1)
    assert torch.equal(twin(*three)[0], unet(*three)[0])
    # Of other times the ResNet is computed in full, and what comes out of it has no equal halves any more.
    assert [seen[1:] for seen in rows.seen.values()] == [[2, 2, 3]] * 3


@settings(max_examples=20, deadline=None)
@given(images=st.integers(1, 3), seed=st.integers(0, 99), same=st.booleans())
def test_it_is_the_same_function_of_any_batch(unet, images, seed, same):
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(images, 4, 8, 8, generator=generator)
    batch = torch.cat([half, half if same else half.flip(3)])
    text = torch.randn(2 * images, 5, unet.config["cross_attention_dim"], generator=generator)
    with torch.no_grad():
        expected, found = (model(batch, 300, text)[0] for model in (unet, edited_copy(unet, SHARED)))
    assert torch.allclose(found, expected, atol=1e-5)


def test_in_training_and_compiled_everything_is_computed(unet, twin, guided):
    assert torch.equal(twin(*guided)[0], unet(*guided)[0])
    ours, theirs = twin.get_submodule(RESNET), unet.get_submodule(RESNET)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=True)
        for rows in (2, 3, 4):
            hidden, embedding = torch.randn(1, 32, 8, 8).repeat(rows, 1, 1, 1), torch.randn(1, 128).repeat(rows, 1)
            assert torch.equal(compiled(hidden, embedding), theirs(hidden, embedding))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch have better ways, and say so
            traced = torch.jit.trace(ours, (hidden, embedding), check_trace=False)
        others = torch.randn(4, 32, 8, 8), torch.randn(4, 128)
        assert torch.equal(traced(*others), theirs(*others))
        rows = Rows(twin, f"{RESNET}.conv1")
        ours.train()(hidden, embedding)
        assert [*rows.seen.values()] == [[4]]
        ours.eval()


@torch.no_grad()
def test_a_processor_of_others_sees_the_whole_batch(twin, guided):
    class Perturbed(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return torch.cat([hidden_states[:1], super().__call__(attn, hidden_states[1:], *args, **kwargs)])

    rows = Rows(twin, ATTENTION, f"{ATTENTION}.to_q")
    twin.get_submodule(ATTENTION).set_processor(Perturbed())
    twin(*guided)
    assert [*rows.seen.values()] == [[2], [1]]


@pytest.fixture(scope="module")
def options(unet, mini_profile):
    """Those of sharing, by their sites."""
    places = {"shared": places_of(unet, [])["shared"]}
    slots = slot_costs(unet, places, ProfileSettings(text_tokens=40, repeats=2), mini_profile)
    return {o.site: o for o in find_options(unet, mini_profile, places, slots) if o.edit == "shared"}


def test_costs_say_half_of_what_is_shared(unet, twin, options):
    macs = [count_macs(model, 2, 16, 16, 40) for model in (unet, twin)]
    for path in SHARED:
        assert macs[1][path].total * 2 == macs[0][path].total
    alone = [count_macs(model, 1, 16, 16, 40)[""].total for model in (unet, twin)]
    assert alone[0] == alone[1]
    assert set(options) == set(SHARED)
    assert options[RESNET].savings["macs"] == macs[1][RESNET].total and options[RESNET].savings["params"] == 0
    assert "shared" not in places_of(unet, [], exact=False)


def test_neither_errors_nor_fits_know_of_it(pipeline, unet, options):
    prompts = [c.text for c in sample_captions(6, 9)]
    calibration = record(pipeline, prompts, SamplingSettings(steps=4), 2, effort=Effort(12, 2))
    assert measure_plan(unet, Plan(SHARED), calibration).total == 0
    assert fit_plan(unet, Plan(SHARED), calibration, refit="full") == {}
    found = measure_options(unet, list(options.values()), calibration, refit=True)
    assert [damage.total for damage in found.values()] == [0, 0]
    cut = {"mid_block": "drop", "down_blocks.0.attentions.0.transformer_blocks.0.ff": "narrow0.5"}
    fits = [fit_plan(unet, Plan(edits), calibration, refit="full") for edits in (cut, {**SHARED, **cut})]
    assert fits[0].keys() == fits[1].keys()
    for path, tensors in fits[0].items():
        assert all(torch.equal(tensor, fits[1][path][name]) for name, tensor in tensors.items())
    students = [assemble(unet, Plan(edits), fits[0]) for edits in (cut, {**SHARED, **cut})]
    assert all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in students), strict=True))


def test_a_pipeline_draws_the_same_pictures_and_a_file_has_the_stock_names(pipeline, unet, cli, tmp_path):
    student = assemble(unet, Plan(SHARED))
    whole = StableDiffusionPipeline(**{**pipeline.components, "unet": student}, requires_safety_checker=False)
    save_pipeline(whole, tmp_path / "student")
    back = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    assert dict(back.unet.config["edits"]) == SHARED
    rows = Rows(back.unet, f"{RESNET}.conv1")
    prompts, setting = [c.text for c in sample_captions(2, 5)], SamplingSettings(steps=4)
    back.set_progress_bar_config(disable=True)
    found, expected = (sample(p, prompts, setting).latents for p in (back, pipeline))
    assert (
        torch.allclose(found, expected, atol=1e-3) and rows.seen[f"{RESNET}.conv1"][1:] == [2] * 4
    )  # behind what warms up
    assert type(stock_form(student)) is UNet2DConditionModel
    assert type(controlnet_from(student)) is ControlNetModel
    beside = assemble(unet, Plan({**SHARED, "mid_block": "conv1x1"}))
    assert stock_form(beside) is beside
    result = cli("export", "student", "--format", "ldm", "--out", "all.safetensors", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tensors"] > len(unet_to_ldm(unet))
