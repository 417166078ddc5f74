"""Checkpoint files in the LDM layout: Stable Diffusion's families at small widths, with diffusers as the oracle.

The fixtures are those of `tools/make_fixtures.py`, which also makes them at full size: see the slow tests.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe, find_recipe, load_recipe
from asdm_compress.core.units import parse_budget
from asdm_compress.models.clip_tokenizer import clip_tokenizer
from asdm_compress.models.families import FAMILIES, architecture
from asdm_compress.models.layout import config_of, read_layout
from asdm_compress.models.ldm import unet_to_ldm
from asdm_compress.models.loading import load_pipeline, load_unet
from asdm_compress.models.resolve import resolve
from asdm_compress.models.single_file import _text_facts
from asdm_compress.models.source import LoadOptions
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.workflows.apply import SlotStart, Writing, run_apply
from asdm_compress.workflows.assemble import Target, run_assemble
from asdm_compress.workflows.export import run_export
from asdm_compress.workflows.plan import PlanSettings
from asdm_compress.workflows.profile import run_profile
from asdm_compress.workflows.progress import Silent

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from make_fixtures import make, pack

OWN = LoadOptions(dtype=None)
V = LoadOptions(dtype=None, prediction_type="v_prediction")
PREFIX = "model.diffusion_model."
NARROW = 32

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is a (checkpoint|UNet) of", "ignore:it (is taken to predict|predicts)"
)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Narrow pipelines, each as a folder and as a file of the same numbers."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("sd15", "sd21"):
        make(name, folder / name, torch.float16, 2 * NARROW if name == "sd21" else NARROW)
        pack(folder / name, folder / f"{name}.safetensors")
    return folder


def changed(source: Path, target: Path, change: Mapping[str, Tensor | None], metadata=None) -> Path:
    """A copy of a file with tensors added, replaced or (None) left out."""
    weights = load_file(source) | dict(change)
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    if target.suffix == ".ckpt":
        torch.save({"state_dict": kept, "global_step": 3}, target)
    else:
        save_file(kept, target, metadata=metadata)
    return target


def same_weights(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("name", "options"), [("sd15", OWN), ("sd21", V)])
def test_a_file_opens_as_the_pipeline_it_was_packed_from(made, name, options):
    """Oracles: the diffusers folder of the same numbers, and diffusers' own reader of such files."""
    found = load_pipeline(str(made / f"{name}.safetensors"), options)
    wanted = load_pipeline(str(made / name), OWN)
    theirs = StableDiffusionPipeline.from_single_file(
        made / f"{name}.safetensors", config=str(made / name), local_files_only=True, torch_dtype=torch.float16
    )
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(found, part), getattr(wanted, part)), part
        assert same_weights(getattr(found, part), getattr(theirs, part)), part
    for key in ("attention_head_dim", "cross_attention_dim", "block_out_channels", "use_linear_projection"):
        one, other = found.unet.config[key], wanted.unet.config[key]
        assert (list(one) if isinstance(one, tuple) else one) == other
    for key in ("hidden_act", "num_attention_heads", "num_hidden_layers", "eos_token_id", "layer_norm_eps"):
        assert getattr(found.text_encoder.config, key) == getattr(wanted.text_encoder.config, key)
    words = ["a photo of a cat", "", "ünïcode, it's  1234 <|endoftext|> 日本!"]
    ids = [p.tokenizer(words, padding="max_length").input_ids for p in (found, wanted)]
    assert ids[0] == ids[1]
    assert found.scheduler.config["prediction_type"] == wanted.scheduler.config["prediction_type"]
    assert found.unet.config["sample_size"] == wanted.unet.config["sample_size"]
    with torch.no_grad():
        texts = [p.to(torch.float32).encode_prompt(words[:1], "cpu", 1, True) for p in (found, wanted)]
    assert torch.equal(texts[0][0], texts[1][0])
    assert torch.equal(texts[0][1], texts[1][1])


def test_the_tokenizer_gives_the_known_ids():
    """Ids that OpenAI's and OpenCLIP's tokenizers are known to give; 2.x pads with an exclamation mark."""
    tokenizer = clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("").input_ids == [49406, 49407]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (49407, 77)
    padded = clip_tokenizer("!")("a cat!", padding="max_length").input_ids
    assert padded == [49406, 320, 2368, 0, 49407, *[0] * 72]


@pytest.mark.parametrize(
    "text", ["The QUICK brown fox's", "naïve café – déjà vu", "1girl, (masterpiece:1.2)", "🙂🙂 ok"]
)
def test_the_tokenizer_merges_in_the_order_of_its_list(text):
    """Oracle: byte-pair encoding as its paper (1508.07909) has it, a merge at a time on one word."""
    import gzip

    from asdm_compress.models import clip_tokenizer as module

    lines = gzip.decompress(module._MERGES.read_bytes()).decode().splitlines()
    ranks = {tuple(line.split()): i for i, line in enumerate(lines)}
    tokenizer = clip_tokenizer()
    alphabet = module._byte_characters()
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    of_byte = dict(zip([*order, *(b for b in range(256) if b not in order)], alphabet, strict=True))
    wanted = []
    backend = tokenizer.backend_tokenizer
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
        pieces = [*word[:-1], word[-1] + "</w>"]
        assert set(word) <= set(of_byte.values())
        while len(pieces) > 1:
            best = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            joined, i = [], 0
            while i < len(pieces):
                if tuple(pieces[i : i + 2]) == best:
                    joined.append("".join(best))
                    i += 2
                else:
                    joined.append(pieces[i])
                    i += 1
            pieces = joined
        wanted += pieces
    assert tokenizer.tokenize(text) == wanted


def test_floats_of_8_bits_are_read_as_the_fp16_that_they_are(made, tmp_path, recipe):
    weights = load_file(made / "sd15.safetensors")
    small = {n: t.to(torch.float8_e4m3fn) for n, t in weights.items() if n.startswith(PREFIX)}
    path = changed(made / "sd15.safetensors", tmp_path / "fp8.safetensors", small)
    found = load_pipeline(str(path), OWN)
    rounded = changed(
        made / "sd15.safetensors", tmp_path / "rounded.safetensors", {n: t.half() for n, t in small.items()}
    )
    assert same_weights(found.unet, load_unet(str(rounded), OWN))
    assert {p.dtype for p in found.unet.parameters()} == {torch.float16}
    open_recipe = load_recipe(recipe).model_copy(update={"base": Base(model="any", architecture={})})
    for name in ("fp8", "rounded"):
        source = str(tmp_path / f"{name}.safetensors")
        run_apply(open_recipe, source, Writing(tmp_path / name), OWN, SlotStart(), Silent())
    # What a recipe leaves open its student's says: a LoRA is renamed by it.
    assert load_recipe(tmp_path / "fp8" / "recipe.yaml").base.architecture == architecture(found.unet)
    assert same_weights(load_unet(str(tmp_path / "fp8"), OWN), load_unet(str(tmp_path / "rounded"), OWN))
    small[f"{PREFIX}out.2.bias"] = torch.full((4,), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(AsdmError, match=r"not all finite numbers: model\.diffusion_model\.out\.2\.bias"):
        load_unet(str(changed(path, tmp_path / "nan.safetensors", small)), OWN)


def test_what_a_2x_file_predicts_is_asked_for_and_not_guessed(made, tmp_path):
    path = made / "sd21.safetensors"
    with pytest.raises(AsdmError, match="does not say whether it predicts") as caught:
        load_pipeline(str(path), OWN)
    assert "--prediction-type epsilon" in str(caught.value.hint)
    base = load_pipeline(str(path), LoadOptions(dtype=None, prediction_type="epsilon"))
    assert base.scheduler.config["prediction_type"] == "epsilon"
    assert base.unet.config["sample_size"] == 64
    assert load_pipeline(str(path), V).unet.config["sample_size"] == 96
    # A UNet alone needs no answer: its costs and its surgery are the same.
    assert load_unet(str(path), OWN).config["sample_size"] == 64


def test_what_is_predicted_is_read_where_it_is_written(made, tmp_path):
    bare = made / "sd21.safetensors"
    path = tmp_path / "model.safetensors"
    path.symlink_to(bare)
    config = "model:\n  params:\n    linear_start: 0.00085\n{}    unet_config: {{}}\n"
    for line, kind in (('    parameterization: "v"\n', "v_prediction"), ("", "epsilon")):
        path.with_suffix(".yaml").write_text(config.format(line))
        source = resolve(str(path), OWN)
        assert source.prediction_type == kind
        assert any("model.yaml says" in note for note in source.notes)
    path.with_suffix(".yaml").write_text("model: []\n")
    asked = resolve(str(path), LoadOptions(prediction_type="epsilon"))  # which goes before what lies beside it
    assert not any("model.yaml" in note for note in asked.notes)
    with pytest.raises(AsdmError, match=r"model\.yaml is no config"):
        resolve(str(path), OWN)
    for i, (metadata, extra) in enumerate(
        [({"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}, {}), ({}, {"v_pred": torch.zeros(0)})]
    ):
        written = changed(bare, tmp_path / f"{i}.safetensors", extra, metadata)
        source = resolve(str(written), OWN)
        assert source.prediction_type == "v_prediction"
        assert source.unet_config["sample_size"] == 96
    assert resolve(str(made / "sd15.safetensors"), OWN).prediction_type == "epsilon"


class _Callback:
    """Stands for a class of the original training program."""


def test_ckpt_files_open_safely_with_all_that_original_ones_carry(made, tmp_path, monkeypatch):
    weights = load_file(made / "sd15.safetensors")
    extra = {
        "betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.99), "logvar": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(1),
    }  # fmt: skip
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    _Callback.__module__, _Callback.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = _Callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": {**weights, **extra}, "callbacks": {_Callback: {"best": torch.zeros(1)}}, "epoch": 5}
    torch.save(content, tmp_path / "model.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    found = load_pipeline(str(tmp_path / "model.ckpt"), OWN)
    wanted = load_pipeline(str(made / "sd15"), OWN)
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(found, part), getattr(wanted, part)), part


def test_files_with_a_part_alone_say_what_they_lack(made, tmp_path):
    weights = load_file(made / "sd15.safetensors")
    unet = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
    save_file(unet, tmp_path / "unet.safetensors")
    save_file({name.removeprefix(PREFIX): tensor for name, tensor in unet.items()}, tmp_path / "bare.safetensors")
    shutil.copy(made / "sd15" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "ours.safetensors")
    wanted = load_unet(str(made / "sd15"), OWN)
    for name in ("unet", "bare", "ours"):
        path = str(tmp_path / f"{name}.safetensors")
        assert same_weights(load_unet(path, OWN), wanted)
        with pytest.raises(AsdmError, match="no text encoder and no vae"):
            load_pipeline(path, OWN)


def test_damage_in_any_part_is_named(made, tmp_path):
    whole = made / "sd15.safetensors"
    key = "first_stage_model.decoder.conv_in.bias"
    cases = (
        ({key: None}, r"1 missing, the first is decoder\.conv_in\.bias"),
        ({key: torch.full((64,), float("nan"))}, r"not all finite numbers: decoder\.conv_in\.bias"),
        ({f"{PREFIX}out.2.bias": None}, r"1 missing, the first is conv_out\.bias"),
        ({f"{PREFIX}strange": torch.zeros(1)}, r"1 unexpected, the first is model\.diffusion_model\.strange"),
        ({f"{PREFIX}out.0.bias": torch.zeros(3)}, r"1 of another shape, the first is conv_norm_out\.bias"),
        ({"cond_stage_model.transformer.text_model.final_layer_norm.bias": None}, "1 missing"),
    )
    for change, message in cases:
        path = changed(whole, tmp_path / "damaged.safetensors", change)
        with pytest.raises(AsdmError, match=message):
            load_pipeline(str(path), OWN)


def test_of_open_clips_24_layers_the_last_is_left_out(tmp_path):
    """Stable Diffusion 2.x takes the last but one's output."""
    head = "cond_stage_model.model."
    stored = {
        f"{head}transformer.resblocks.{i}.mlp.c_fc.weight": torch.empty(4096, 1024, device="meta") for i in range(24)
    }
    stored[f"{head}token_embedding.weight"] = torch.empty(49408, 1024, device="meta")
    found = _text_facts(tmp_path, stored)
    assert found == {"vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                     "num_attention_heads": 16}  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("change", [
    {}, {"in_channels": 9}, {"layers_per_block": 1}, {"layers_per_block": (1, 2, 1, 2)},
    {"layers_per_block": 1, "mid_block_type": None}, {"mid_block_type": "UNetMidBlock2D"},
    {"down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
     "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D")},
])  # fmt: skip
@pytest.mark.parametrize("naming", ["diffusers", "ldm"])
def test_the_full_size_architecture_is_read_off_the_names(family, change, naming):
    config = {**FAMILIES[family].unet_config, **change}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    weights = unet.state_dict() if naming == "diffusers" else unet_to_ldm(unet)
    found = config_of(read_layout({name.removeprefix(PREFIX): tuple(t.shape) for name, t in weights.items()}))
    with torch.device("meta"):
        again = UNet2DConditionModel(**found)
    ours, theirs = again.state_dict(), unet.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert architecture(again) == {**architecture(unet), "layers_per_block": architecture(again)["layers_per_block"]}


@pytest.fixture
def recipe(made, tmp_path) -> Path:
    """Of a UNet like BK-SDM-Small's, for the narrow model."""
    unet = load_unet(str(made / "sd15"), OWN)
    sites = [f"down_blocks.{i}.layers.1" for i in range(4)] + [f"up_blocks.{i}.layers.1" for i in range(4)]
    entries = [EditEntry(site=site, edit="drop") for site in [*sites, "mid_block"]]
    text = dump_recipe(Recipe(asdm_recipe=1, base=Base(model="sd15", architecture=architecture(unet)), edits=entries))
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_the_commands_take_files_from_end_to_end(cli, made, recipe, tmp_path):
    """A file becomes a student's folder, that becomes a file, and that makes images, all without a folder given."""
    applied = cli("apply", str(recipe), str(made / "sd15.safetensors"), "--out", "student")
    assert applied.returncode == 0, applied.stderr
    assert "sd15.safetensors is a checkpoint of Stable Diffusion 1.x: 4 levels with 2-2-2-2 layers" in applied.stderr
    # Without a precision that is asked for, transformers takes the config's: it must be that of the other parts.
    assert json.loads((tmp_path / "student" / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    assert load_recipe(tmp_path / "student" / "recipe.yaml").base.model == "sd15.safetensors"
    student = StableDiffusionPipeline.from_pretrained(tmp_path / "student", dtype=torch.float16)
    whole = load_pipeline(str(made / "sd15"), OWN)
    assert same_weights(student.vae, whole.vae)
    assert same_weights(student.text_encoder, whole.text_encoder)
    assert json.loads((tmp_path / "student" / "model_index.json").read_text())["unet"][1] == "UNet2DConditionModel"
    exported = cli("export", "student", "--format", "ldm", "--out", "student.safetensors")
    assert exported.returncode == 0, exported.stderr
    back = load_pipeline(str(tmp_path / "student.safetensors"), OWN)
    assert back.unet.mid_block is None
    assert same_weights(back.unet, student.unet)
    arguments = ("--steps", "2", "--image-size", "64", "--dtype", "fp32")
    drawn = cli("generate", "student.safetensors", "a cat", *arguments, "--out", "images", "--json")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "images" / "image-0000-a-cat.png").is_file()


def test_a_bare_2x_file_is_asked_about_on_the_command_line(cli, made, tmp_path):
    arguments = ("generate", str(made / "sd21.safetensors"), "a cat", "--steps", "1", "--image-size", "64")
    refused = cli(*arguments)
    assert refused.returncode == 2
    assert "--prediction-type" in refused.stderr
    assert not (tmp_path / "images").exists()
    drawn = cli(*arguments, "--prediction-type", "v_prediction", "-q")
    assert (drawn.returncode, drawn.stdout, drawn.stderr) == (0, "", "")


@pytest.mark.parametrize("recipe", ["bk-sdm-base-v1", "bk-sdm-tiny-v1"])
def test_cut_unets_open_from_names_with_gaps_too(made, tmp_path, recipe):
    """As diffusers' own script writes them, and `export --format sdcpp`."""
    teacher = load_unet(str(made / "sd15"), OWN)
    student = assemble(teacher, Plan(load_recipe(find_recipe(recipe)).as_edits()))
    weights = unet_to_ldm(student, with_gaps=True)
    assert weights.keys() != unet_to_ldm(student).keys()
    save_file(weights, tmp_path / "gaps.safetensors")
    assert same_weights(load_unet(str(tmp_path / "gaps.safetensors"), OWN), student)


def test_costs_and_another_layout_come_straight_from_a_file(made, tmp_path):
    wanted = load_unet(str(made / "sd15"), OWN)
    path = str(made / "sd15.safetensors")
    settings = ProfileSettings(image_size=64, repeats=1, batch=1)
    found = run_profile(path, LoadOptions(), settings, Silent(), tmp_path / "profile")
    assert found.parameters == sum(p.numel() for p in wanted.parameters())
    assert found.fingerprint.text_tokens == 77
    result = run_export(path, tmp_path / "again.safetensors", "ldm", OWN, 25, None, Silent())
    one, other = load_file(path), load_file(result.out)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    # What weights do not tell goes along: this one predicts v.
    run_export(str(made / "sd21"), tmp_path / "v.safetensors", "ldm", OWN, 25, None, Silent())
    source = resolve(str(tmp_path / "v.safetensors"), OWN)
    assert source.prediction_type == "v_prediction"
    assert source.unet_config["sample_size"] == 96


def test_a_file_is_assembled_to_a_budget(made, tmp_path, monkeypatch):
    """Random weights: what is asked here is whether the way from a file to a student that keeps its budget is whole."""
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))
    settings = PlanSettings(
        ProfileSettings(image_size=64, repeats=1), SamplingSettings(steps=2, image_size=64), "ddim",
        ("a cat", "a dog"), calibration_prompts=1, held_out_prompts=1, bands=2, slot="none", narrow=(), refit="none",
        finest="unit",
    )  # fmt: skip
    limits = parse_budget(["params=0.8x"])
    target = Target(tmp_path / "student")
    found = run_assemble(str(made / "sd15.safetensors"), limits, target, LoadOptions(), settings, Silent())
    assert found is not None
    teacher, student = load_unet(str(made / "sd15"), OWN), load_unet(str(tmp_path / "student"), OWN)
    counts = [sum(p.numel() for p in net.parameters()) for net in (teacher, student)]
    assert counts[1] <= 0.8 * counts[0]
    assert found.recipe.base.model == "sd15.safetensors"
    assert found.is_stock == specify(teacher, Plan(found.recipe.as_edits())).is_stock
    assert {p.dtype for p in student.parameters()} == {torch.float16}
