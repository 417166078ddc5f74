"""Checkpoints written one tensor at a time: the bytes, the shards, and what `apply` makes of whole pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe, load_recipe
from asdm_compress.models.families import architecture
from asdm_compress.models.lazy import lazy_unet
from asdm_compress.models.loading import load_pipeline
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.models.streaming import Entry, reading, write_safetensors, write_sharded
from asdm_compress.reporting.card import CardContent, CountedCosts, render_card
from asdm_compress.workflows.publish import contents

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
PLAN = {"levels.3": "drop", "up_blocks.2.attentions.1.transformer_blocks.0.attn1": "drop"}


def entry(name, tensor):
    return Entry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


@settings(deadline=None, max_examples=30)
@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6), seed=st.integers(0, 99), data=st.data())
def test_what_is_written_is_read_back_by_safetensors(tmp_path_factory, shapes, seed, data):
    torch.manual_seed(seed)
    tensors = {}
    for i, shape in enumerate(shapes):
        tensors[f"layer.{i}.ε"] = (torch.randn(shape) * 3).to(data.draw(st.sampled_from(DTYPES)))
    path = tmp_path_factory.mktemp("files") / "file.safetensors"
    write_safetensors(path, [entry(name, tensor) for name, tensor in tensors.items()])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    write_safetensors(tmp_path / "f.safetensors", [entry("t", whole.T), entry("part", whole[1:3, ::2])])
    found = load_file(tmp_path / "f.safetensors")
    assert torch.equal(found["t"], whole.T)
    assert torch.equal(found["part"], whole[1:3, ::2])


def test_shards_open_in_diffusers(unet, tmp_path, inputs):
    unet.save_config(tmp_path)
    files = write_sharded(tmp_path, [entry(k, v) for k, v in unet.state_dict().items()], 9 * 2**20)
    assert len(files) > 3
    assert max(path.stat().st_size for path in files) < 9.1 * 2**20
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*inputs).sample, unet(*inputs).sample)
    with reading(tmp_path) as reader:
        assert set(reader.names()) == set(unet.state_dict())


@pytest.fixture
def recipe(unet, tmp_path):
    entries = [EditEntry(site=site, edit=edit) for site, edit in PLAN.items()]
    text = dump_recipe(
        Recipe(asdm_recipe=1, base=Base(model="mini-sd", architecture=architecture(unet)), edits=entries)
    )
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_apply_streams_the_student_that_assemble_builds(cli, recipe, tmp_path, dtype, inputs):
    result = cli("apply", str(recipe), "mini-sd", "--out", "student", "--dtype", dtype, "--json")
    assert result.returncode == 0, result.stderr
    wanted = torch.float16 if dtype == "auto" else torch.bfloat16
    teacher = load_pipeline("mini-sd", LoadOptions(dtype=wanted))
    student = assemble(teacher.unet, Plan(PLAN))
    found = load_file(tmp_path / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == student.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in student.state_dict().items())
    assert json.loads(result.stdout)["kept_tensors"] == len(found)
    stored = load_file(tmp_path / "student" / "text_encoder" / "model.safetensors")
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {wanted}
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(again.unet).__name__ == "AssembledUNet2DConditionModel"
    with torch.no_grad():
        assert torch.equal(again.unet(*inputs).sample, student.float()(*inputs).sample)


def test_a_variant_in_shards_opens_in_diffusers(cli, recipe, tmp_path, inputs):
    arguments = ["--variant", "fp16", "--max-shard-size", "3MB"]
    result = cli("apply", str(recipe), "mini-sd", "--out", "student", *arguments)
    assert result.returncode == 0, result.stderr
    files = list((tmp_path / "student").rglob("*.safetensors"))
    assert len([path for path in files if path.parent.name == "unet"]) > 2
    assert all(".fp16" in path.name for path in files)
    assert {v.dtype for path in files for v in load_file(path).values() if v.is_floating_point()} == {torch.float16}
    found = StableDiffusionPipeline.from_pretrained(tmp_path / "student", variant="fp16")
    student = assemble(load_pipeline("mini-sd", LoadOptions()).unet, Plan(PLAN))
    with torch.no_grad():
        assert torch.equal(found.unet(*inputs).sample, student(*inputs).sample)
    assert torch.equal(
        load_pipeline(str(tmp_path / "student"), LoadOptions()).unet.conv_in.weight, student.conv_in.weight
    )


def test_the_card_tells_what_was_made_of_what(cli, recipe, tmp_path, unet):
    result = cli("apply", str(recipe), "mini-sd", "--out", "student")
    assert result.returncode == 0, result.stderr
    card = ModelCard.load(tmp_path / "student" / "README.md")
    facts = card.data.to_dict()
    assert (facts["library_name"], facts["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert facts.get("base_model") is None  # the bundled model is not on the hub
    student = assemble(unet, Plan(PLAN))
    share = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in unet.parameters())
    assert f"| {share:.3f}x |" in card.text
    for words in ("# student", "mini-sd with a lighter UNet: 2 edits", "| `levels.3` | `drop` |", "No latency was"):
        assert words in card.text
    assert f"asdm-compress apply {recipe} mini-sd --out student" in card.text


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        (["--push-to-hub", "me/student"], {"HF_HUB_OFFLINE": "1"}, 4, "HF_HUB_OFFLINE"),
        (["--push-to-hub", "me/student"], {"HF_HUB_OFFLINE": "0"}, 4, "hf auth login"),
        (["--push-to-hub", "me/student"], {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}, 4, "did not take me/student"),
        (["--push-to-hub", "only-a-name"], {}, 2, "no name of a repository"),
        (["--variant", "non_ema"], {}, 2, "unknown variant"),
        (["--variant", "fp16", "--dtype", "fp32"], {}, 2, "cannot hold weights in fp32"),
        (["--max-shard-size", "much"], {}, 2, "does not parse"),
    ],
)
def test_what_cannot_be_written_is_said_before_it_is(
    cli, recipe, tmp_path, monkeypatch, arguments, environment, code, words
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # no one is logged in there
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = cli("apply", str(recipe), "mini-sd", "--out", "student", *arguments)
    assert (result.returncode, "Traceback" in result.stderr) == (code, False)
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "student").exists()


def test_what_goes_to_the_hub_opens_from_there(cli, recipe, tmp_path):
    """Of a repository, diffusers takes only classes that are in the component's folder."""
    assert cli("apply", str(recipe), "mini-sd", "--out", "student").returncode == 0
    sent = {operation.path_in_repo: operation for operation in contents(tmp_path / "student")}
    files = {p.relative_to(tmp_path / "student").as_posix() for p in (tmp_path / "student").rglob("*") if p.is_file()}
    assert sent.keys() == files
    with sent["model_index.json"].as_file() as file:
        library, name = json.load(file)["unet"]
    assert f"unet/{library}.py" in sent
    assert name == "AssembledUNet2DConditionModel"


def test_a_folder_with_the_fp16_variant_alone_becomes_one_that_opens_without_a_word(cli, recipe, tmp_path):
    shutil.copytree(MINI_SD_FOLDER, tmp_path / "model")
    for path in (tmp_path / "model").rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    result = cli("apply", str(recipe), "model", "--out", "student")
    assert result.returncode == 0, result.stderr
    StableDiffusionPipeline.from_pretrained(tmp_path / "student")


@pytest.mark.parametrize("how", [{"variant": "fp16"}, {"variant": "bf16"}, {}])
@pytest.mark.parametrize("arguments", [[], ["--variant", "fp16"]], ids=["plain", "fp16"])
def test_parts_in_shards_and_of_any_variant_open_again(cli, recipe, tmp_path, pipeline, how, arguments):
    pipeline.save_pretrained(tmp_path / "model", max_shard_size="400KB", **how)
    result = cli("apply", str(recipe), "model", "--out", "student", *arguments)
    assert result.returncode == 0, result.stderr
    names = [path.name for path in (tmp_path / "student").rglob("*") if "safetensors" in path.name]
    assert not any("bf16" in name for name in names)
    found = StableDiffusionPipeline.from_pretrained(tmp_path / "student", variant="fp16" if arguments else None)
    for part in ("vae", "text_encoder"):
        expected, weights = getattr(pipeline, part).state_dict(), getattr(found, part).state_dict()
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3 if arguments else 0)


def test_the_card_of_another_kind_of_pipeline_names_its_class_and_variant(recipe):
    content = CardContent(
        "student", "sd", None, load_recipe(recipe), "apply", (CountedCosts(2, 2, 2), CountedCosts(1, 1, 1)), 512, True,
        True, False, "StableDiffusionInpaintPipeline", "fp16",
    )  # fmt: skip
    card = render_card(content)
    assert 'StableDiffusionInpaintPipeline.from_pretrained("student", variant="fp16")' in card
    assert "pipeline_tag: image-to-image" in card


def test_a_unet_folder_gives_a_unet_folder(cli, recipe, tmp_path, unet):
    result = cli("apply", str(recipe), str(MINI_SD_FOLDER / "unet"), "--out", "student")
    assert result.returncode == 0, result.stderr
    names = {"config.json", "diffusion_pytorch_model.safetensors", "asdm_unet.py", "recipe.yaml", "README.md"}
    assert names == {path.name for path in (tmp_path / "student").iterdir()}
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.to_dict().keys() == {"library_name", "tags"}
    assert 'AutoModel.from_pretrained("student", trust_remote_code=True)' in card.text


@pytest.mark.parametrize("damage", ["nan", "missing", "cut"])
def test_damaged_weights_leave_nothing_half_written(cli, recipe, tmp_path, damage):
    shutil.copytree(MINI_SD_FOLDER, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if damage == "nan":
        weights["up_blocks.3.resnets.2.conv2.bias"][0] = float("nan")
    if damage == "missing":
        del weights["up_blocks.3.resnets.2.conv2.bias"]
    save_file(weights, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    result = cli("apply", str(recipe), "model", "--out", "student")
    assert result.returncode == 2
    named = {"nan": "not all finite numbers", "missing": "up_blocks.3.resnets.2.conv2.bias", "cut": "truncated"}
    assert named[damage] in " ".join(result.stderr.split())
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "recipe.yaml", "cache"}


def test_lazy_reading_knows_a_wrong_shape(tmp_path):
    shutil.copytree(MINI_SD_FOLDER / "unet", tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :3].contiguous()
    save_file(weights, path)
    options = LoadOptions()
    with lazy_unet(resolve(str(tmp_path / "unet"), options), options) as lazy:
        with pytest.raises(AsdmError, match=r"conv_in\.weight .* has the shape \(32, 3, 3, 3\)"):
            lazy.get("conv_in.weight")
        assert lazy.get("conv_in.bias").dtype == lazy.dtype("conv_in.bias") == torch.float16
