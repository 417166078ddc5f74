"""A teacher's LoRA on a student: the same as cutting the teacher with its LoRA in it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from asdm_compress.assembly.lora import remap_lora
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import Base, EditEntry, Recipe, dump_recipe
from asdm_compress.models.families import architecture
from asdm_compress.models.ldm import unet_to_ldm
from asdm_compress.workflows.assemble import with_unet

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2"]
TINY = {
    **{f"down_blocks.{i}.layers.1": "drop" for i in range(3)},
    **{f"up_blocks.{i}.layers.1": "drop" for i in (1, 2, 3)},
    "levels.3": "drop",
}


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    """A LoRA file that diffusers wrote, and the teacher with it fused."""
    unet = copy.deepcopy(pipeline.unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    unet.fuse_lora()
    unet.unload_lora()
    return folder / "pytorch_lora_weights.safetensors", unet.eval().requires_grad_(False)


@pytest.mark.parametrize("edits", [TINY, {"mid_block": "drop"}, {"up_blocks.2.attentions.0": "conv1x1*4@timestep"}])
def test_a_remapped_lora_is_the_cut_of_the_fused_teacher(pipeline, trained, tmp_path, inputs, edits):
    """Oracle: diffusers fuses the LoRA into the teacher, and the student is cut from that."""
    path, fused = trained
    plan = Plan(edits)
    expected = assemble(fused, plan)
    found = remap_lora(load_file(path), pipeline.unet, plan)
    assert found.left_out
    save_file(dict(found.tensors), tmp_path / "lora.safetensors")
    student = with_unet(pipeline, assemble(pipeline.unet, plan))
    student.load_lora_weights(tmp_path / "lora.safetensors")
    with torch.no_grad():
        one, other = expected(*inputs).sample, student.unet(*inputs).sample
        plain = assemble(pipeline.unet, plan)(*inputs).sample
    assert torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, plain, atol=1e-2)


def test_ranks_of_single_modules_move_along_with_them(pipeline, cli, tmp_path, inputs):
    """Newer diffusers take the adapter's whole configuration from the file, in which modules go by their names."""
    unet = copy.deepcopy(pipeline.unet)
    wide = {name: 4 for name, _ in unet.named_modules() if name.endswith("up_blocks.3.resnets.0.conv1")}
    gone = {"up_blocks.0.resnets.0.conv1": 3, "down_blocks.3.resnets.0.conv1": 3}
    assert wide
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, rank_pattern={**wide, **gone, "to_q": 1})
    unet.add_adapter(config)
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config.to_dict()
    )
    unet.fuse_lora()
    unet.unload_lora()
    base = Base(model="mini-sd", architecture=architecture(pipeline.unet))
    recipe = Recipe(asdm_recipe=1, base=base, edits=[EditEntry(site=s, edit=e) for s, e in TINY.items()])
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "recipe.yaml").write_text(dump_recipe(recipe))
    result = cli("lora", "pytorch_lora_weights.safetensors", "student", "--out", "light.safetensors")
    assert result.returncode == 0, result.stderr
    with safe_open(tmp_path / "light.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["unet.rank_pattern"] == {"up_blocks.2.resnets.0.conv1": 4, "to_q": 1}
    student = with_unet(pipeline, assemble(pipeline.unet, Plan(TINY)))
    student.load_lora_weights(tmp_path / "light.safetensors")
    expected = assemble(unet.eval(), Plan(TINY))
    with torch.no_grad():
        assert torch.allclose(expected(*inputs).sample, student.unet(*inputs).sample, atol=1e-4)


@pytest.mark.parametrize("numbering", ["diffusers", "original"])
def test_kohyas_names_are_known_in_both_numberings(unet, trained, numbering):
    """The same tensors under kohya's names are renamed to the same modules."""
    path, _ = trained
    weights = load_file(path)
    plan = Plan(TINY)
    keys = list(unet.state_dict())
    old = {k.rpartition(".")[0]: v.rpartition(".")[0].removeprefix("model.diffusion_model.")
           for k, v in zip(keys, unet_to_ldm(unet), strict=True)}  # fmt: skip
    kohya = {}
    for name, tensor in weights.items():
        module, _, end = name.removeprefix("unet.").partition(".lora_")
        written = (module if numbering == "diffusers" else old[module]).replace(".", "_")
        down = "lora_down.weight" if end.startswith("A") else "lora_up.weight"
        kohya[f"lora_unet_{written}.{down}"] = tensor
    kohya["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(2, 4)
    peft, other = remap_lora(weights, unet, plan), remap_lora(kohya, unet, plan)
    assert len(other.tensors) == len(peft.tensors) + 1
    assert len(other.left_out) == len(peft.left_out) > 0
    kept = {name.removeprefix("unet.").partition(".lora_")[0].replace(".", "_") for name in peft.tensors}
    assert kept == {name.removeprefix("lora_unet_").partition(".")[0] for name in other.tensors if "_te_" not in name}


@pytest.mark.parametrize("head", ["", "base_model.model."])
def test_a_unets_lora_saved_by_itself_is_known(unet, trained, head):
    weights = load_file(trained[0])
    found = remap_lora({head + k.removeprefix("unet."): v for k, v in weights.items()}, unet, Plan(TINY))
    expected = remap_lora(weights, unet, Plan(TINY))
    assert set(found.tensors) == {head + name.removeprefix("unet.") for name in expected.tensors}
    assert found.left_out == expected.left_out


def test_names_of_older_diffusers_are_known(unet):
    processor = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.processor.to_out_lora.down.weight"
    found = remap_lora({processor: torch.ones(2, 32)}, unet, Plan(TINY))
    assert set(found.tensors) == {"unet.up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.lora.down.weight"}


def test_narrowed_and_unknown_modules_are_named(unet):
    plan = Plan({"down_blocks.0.attentions.0.transformer_blocks.0.attn1": "narrow0.5"})
    inside = "down_blocks.0.attentions.0.transformer_blocks.0"
    found = remap_lora(
        {f"unet.{inside}.{m}.lora_A.weight": torch.ones(2, 32) for m in ("attn1.to_q", "attn2.to_q", "attn7.to_q")},
        unet, plan,
    )  # fmt: skip
    assert set(found.left_out) == {f"{inside}.attn1.to_q", f"{inside}.attn7.to_q"}
    assert len(found.tensors) == 1
    with pytest.raises(AsdmError, match="no LoRA of this model's UNet"):
        remap_lora({"unet.something.lora_A.weight": torch.ones(1)}, unet, plan)


@pytest.mark.parametrize(("name", "shape", "does"), [
    ("unet.{}.lora_A.weight", (2, 1024), "takes 1024 channels, and the teacher 96"),
    ("lora_unet_{}.lora_down.weight", (2, 1024), "takes 1024 channels"),
    ("unet.{}.lora.up.weight", (320, 2), "gives 320 channels, and the teacher 32"),
])  # fmt: skip
def test_a_lora_of_another_family_is_known_by_its_widths(unet, name, shape, does):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    written = name.format(module.replace(".", "_") if "lora_unet" in name else module)
    with pytest.raises(AsdmError, match=does):
        remap_lora({written: torch.ones(shape)}, unet, Plan(TINY))


@pytest.mark.parametrize(
    "edits",
    [
        TINY,
        {"down_blocks.3.resnets.0": "drop", "up_blocks.0.resnets.0": "drop", "mid_block": "drop"},
        {
            "up_blocks.1.upsamplers.0": "subpixel",
            "up_blocks.2.resnets.1": "narrow0.5",
            "up_blocks.3.resnets.1": "conv3x3",
        },
        {"down_blocks.1.attentions.0.transformer_blocks.0.attn2": "drop", "up_blocks.3.resnets.0": "shortcut"},
    ],
    ids=["tiny", "renumbered", "recast", "sub-units"],
)
def test_no_tensor_lands_on_a_wrong_layer_and_none_is_lost(unet, edits):
    """A LoRA on everything, whose tensors say where they belong; the student's weights say the same of its layers."""
    modules = [path for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    lora = {f"unet.{path}.lora_A.weight": torch.tensor([i]) for i, path in enumerate(modules)}
    plan = Plan(edits)
    found = remap_lora(lora, unet, plan)
    student, inherited = assemble(unet, plan), specify(unet, plan).weight_map
    kept = {name.removeprefix("unet.").partition(".lora_A")[0]: modules[int(t)] for name, t in found.tensors.items()}
    layers = [path for path, module in student.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    sources = {path: inherited[f"{path}.weight"] for path in layers if f"{path}.weight" in inherited}
    assert kept == {path: source.removesuffix(".weight") for path, source in sources.items()}
    assert set(kept.values()) | set(found.left_out) == set(modules)
    assert not set(kept.values()) & set(found.left_out)


def test_why_modules_are_left_out(unet):
    edits = {"up_blocks.1.upsamplers.0": "subpixel", "up_blocks.2.resnets.1": "narrow0.5", "mid_block": "drop"}
    lora = {
        f"unet.{path}.lora_A.weight": torch.ones(1)
        for path in ("up_blocks.1.upsamplers.0.conv", "up_blocks.2.resnets.1.conv1", "mid_block.resnets.0.conv1")
    }
    assert list(remap_lora(lora, unet, Plan(edits)).left_out.values()) == [
        "the student has this module as a sub-pixel convolution",
        "the student has this module narrowed",
        "the student does not have this module",
    ]


def test_the_command_renames_and_tells_what_is_left_out(cli, trained, unet, tmp_path):
    path, _ = trained
    base = Base(model="mini-sd", architecture=architecture(unet))
    recipe = Recipe(asdm_recipe=1, base=base, edits=[EditEntry(site=s, edit=e) for s, e in TINY.items()])
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "recipe.yaml").write_text(dump_recipe(recipe))
    result = cli("lora", str(path), "student", "--out", "light.safetensors", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert len(load_file(tmp_path / "light.safetensors")) == printed["kept_tensors"]
    assert all("student does not have" in why for why in printed["left_out"].values())
    missing = cli("lora", "nothing.safetensors", "student", "--out", "other.safetensors")
    assert (missing.returncode, "there is no file nothing.safetensors" in missing.stderr) == (2, True)
    weights = load_file(path)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    refused = cli("lora", "nan.safetensors", "student", "--out", "other.safetensors")
    assert refused.returncode == 2
    assert "not all finite numbers: unet." in refused.stderr
    assert cli("lora", str(path), ".", "--out", "other.safetensors").returncode == 2
    assert cli("lora", "student/recipe.yaml", "student", "--out", "other.safetensors").returncode == 2
