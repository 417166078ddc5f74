"""A teacher's LoRA on a student: the same as cutting the teacher with its LoRA in it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

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
    found = remap_lora(load_file(path), pipeline.unet, specify(pipeline.unet, plan))
    assert found.left_out
    save_file(dict(found.tensors), tmp_path / "lora.safetensors")
    student = with_unet(pipeline, assemble(pipeline.unet, plan))
    student.load_lora_weights(tmp_path / "lora.safetensors")
    with torch.no_grad():
        one, other = expected(*inputs).sample, student.unet(*inputs).sample
        plain = assemble(pipeline.unet, plan)(*inputs).sample
    assert torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, plain, atol=1e-2)


@pytest.mark.parametrize("numbering", ["diffusers", "original"])
def test_kohyas_names_are_known_in_both_numberings(unet, trained, numbering):
    """The same tensors under kohya's names are renamed to the same modules."""
    path, _ = trained
    weights = load_file(path)
    plan = Plan(TINY)
    spec = specify(unet, plan)
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
    peft, other = remap_lora(weights, unet, spec), remap_lora(kohya, unet, spec)
    assert len(other.tensors) == len(peft.tensors) + 1
    assert len(other.left_out) == len(peft.left_out) > 0
    kept = {name.removeprefix("unet.").partition(".lora_")[0].replace(".", "_") for name in peft.tensors}
    assert kept == {name.removeprefix("lora_unet_").partition(".")[0] for name in other.tensors if "_te_" not in name}


def test_names_of_older_diffusers_are_known(unet):
    processor = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.processor.to_out_lora.down.weight"
    found = remap_lora({processor: torch.ones(2, 32)}, unet, specify(unet, Plan(TINY)))
    assert set(found.tensors) == {"unet.up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.lora.down.weight"}


def test_narrowed_and_unknown_modules_are_named(unet):
    spec = specify(unet, Plan({"down_blocks.0.attentions.0.transformer_blocks.0.attn1": "narrow0.5"}))
    inside = "down_blocks.0.attentions.0.transformer_blocks.0"
    found = remap_lora(
        {f"unet.{inside}.{m}.lora_A.weight": torch.ones(2, 32) for m in ("attn1.to_q", "attn2.to_q", "attn7.to_q")},
        unet, spec,
    )  # fmt: skip
    assert set(found.left_out) == {f"{inside}.attn1.to_q", f"{inside}.attn7.to_q"}
    assert len(found.tensors) == 1
    with pytest.raises(AsdmError, match="no LoRA of this model's UNet"):
        remap_lora({"unet.something.lora_A.weight": torch.ones(1)}, unet, spec)


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
    assert cli("lora", str(path), ".", "--out", "other.safetensors").returncode == 2
    assert cli("lora", "student/recipe.yaml", "student", "--out", "other.safetensors").returncode == 2
