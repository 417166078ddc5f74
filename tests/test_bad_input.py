"""Files and recipes that are wrong, on the command line: exit code 2, one message, nothing half-written."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass

import pytest
import torch
from command_lines import contents, run_all
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble
from asdm_compress.inheritance.actions import Action
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.ldm import unet_to_ldm
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.switching.schedules import SwitchingSchedule, noise_of
from asdm_compress.switching.switched_unet import SwitchedUNet2DConditionModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
TYPO = """\
asdm_recipe: 1
base: {model: mini-sd, architecture: {}}
edits:
  - {site: mid_block, edit: drop}
  - {site: up_blocks.0.resnets.0, edit: conv5x5}
"""
OTHER_EDIT = TYPO.replace("conv5x5", "subpixel")
OVERLAP = TYPO.replace("up_blocks.0.resnets.0", "mid_block.resnets.0").replace("conv5x5", "drop")
NO_TEXT = TYPO.replace("edit: drop", "edit: off")
OTHER_SITE = TYPO.replace("mid_block", "mid_blok").replace("conv5x5", "drop")
MISSPELT = TYPO.replace("edits:", "edit:")
GOOD = "asdm_recipe: 1\nbase: {model: any, architecture: {}}\nedits: [{site: mid_block, edit: drop}]\n"


@dataclass(frozen=True)
class Case:
    """A command line, the words that its message must have, and the most bytes that a file may take while it runs."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    file_limit: int | None = None


CASES = {
    "a tensor of a UNet folder holds what is no number": Case(
        ("apply", "good.yaml", "nan"), ("nan", "not all finite numbers: conv_out.bias")
    ),
    "several tensors of a file do": Case(
        ("profile", "nan.safetensors"),
        ("not all finite numbers", "model.diffusion_model.out.2.bias", "model.diffusion_model.time_embed.0.bias"),
    ),
    "a LoRA of the web's kind": Case(
        ("generate", "lora.safetensors", "a cat"), ("lora.safetensors is a LoRA, which changes a checkpoint",)
    ),
    "a LoRA of peft's kind": Case(("apply", "good.yaml", "peft.safetensors"), ("is a LoRA",)),
    "a VAE alone": Case(
        ("profile", "vae.safetensors"), ("vae.safetensors is a VAE", "Give a UNet or a whole checkpoint")
    ),
    "a VAE's file of diffusers": Case(("assemble", "vae2.safetensors", "--budget", "macs=0.7x"), ("is a VAE",)),
    "a checkpoint of SDXL": Case(
        ("assemble", "sdxl.safetensors", "--budget", "macs=0.7x"),
        ("is a Stable Diffusion XL model, which is not supported",),
    ),
    "a pipeline folder of SDXL": Case(
        ("generate", "sdxl", "a cat"), ("is a StableDiffusionXLPipeline, which is not supported",)
    ),
    "a pipeline folder of Flux": Case(
        ("apply", "good.yaml", "flux"), ("is a FluxPipeline, which is not supported", "Stable Diffusion 1.x or 2.x")
    ),
    "a checkpoint of Flux": Case(
        ("export", "flux.safetensors", "--format", "onnx"), ("is a Flux model, which is not supported",)
    ),
    "a file cut short": Case(
        ("apply", "good.yaml", "cut.safetensors"), ("cut.safetensors is truncated", "copy the file")
    ),
    "a file cut short, of a folder": Case(("generate", "cut", "a cat"), (f"{WEIGHTS} is truncated",)),
    "a part that is copied is cut short": Case(
        ("apply", "good.yaml", "cut"), (f"vae/{WEIGHTS} is truncated", "copy the file")
    ),
    "a part that is copied holds what is no number": Case(
        ("apply", "good.yaml", "nan-text"), ("nan-text/text_encoder are", "not all finite numbers: ", "norm.bias")
    ),
    "a header of nonsense": Case(("export", "garbage.safetensors"), ("garbage.safetensors is truncated or no",)),
    "an empty file": Case(("profile", "empty.safetensors"), ("empty.safetensors is empty",)),
    "a recipe for another family": Case(
        ("apply", "bk-sdm-base-v2", "mini-sd"),
        ("mini-sd does not fit the recipe made for sd21-base", "cross_attention_dim is 96, the recipe's is 1024"),
    ),
    "an edit that is none": Case(("apply", "typo.yaml"), ("typo.yaml:5: edits.1.edit:", "conv5x5")),
    "a key that is none": Case(("apply", "misspelt.yaml"), ("misspelt.yaml:3: edit: unknown key",)),
    "a site that is none": Case(("apply", "site.yaml"), ("site.yaml:4: this UNet has no site 'mid_blok'",)),
    "an edit that its site cannot have": Case(
        ("apply", "place.yaml"), ("place.yaml:5: the edit 'subpixel' is not possible at up_blocks.0.resnets.0",)
    ),
    "two edits of one part": Case(("recipes", "check", "overlap.yaml"), ("overlap.yaml:5: the edits at mid_block",)),
    "an edit that is no text": Case(
        ("apply", "off.yaml"), ("off.yaml:4: edits.0.edit: this should be a valid string",)
    ),
    "a textual inversion of pickle": Case(("apply", "good.yaml", "ti.pt"), ("ti.pt is a textual-inversion embedding",)),
    "a picture too small for the deepest level": Case(
        ("profile", "mini-sd", "--image-size", "8"), ("at 8 pixels nothing is left", "From 64 on")
    ),
    "a guidance that is no number": Case(("generate", "mini-sd", "a cat", "--guidance", "nan"), ("no finite number",)),
    "fitting a model that takes a mask": Case(
        ("apply", "slot.yaml", "inpainting"), ("takes 9 channels and gives 4", "where nothing is fitted")
    ),
    "a schedule of the student's that is none of time": Case(
        ("assemble", "mini-sd", "--budget", "macs=0.7x", "--inherit", "macs=0.6x"),
        ("for time alone", "--inherit latency"),
    ),
    "a mode in the place of a share": Case(
        ("assemble", "mini-sd", "--budget", "macs=0.7x", "--inherit", "uniform:2"),
        ("--inherit takes a share of the student's time, not 'uniform:2'", "--inherit latency=0.6x"),
    ),
    "a device that there is no support for": Case(
        ("profile", "mini-sd", "--device", "mps"), ("the device mps is not supported",)
    ),
    "a name that is empty": Case(("apply", "good.yaml", ""), ("unknown model ''",)),
    "a disk that is full half-way, a tensor at a time": Case(
        ("apply", "good.yaml", "mini-sd"), ("the disk is full: out was not written",), 1_000_000
    ),
    "a disk that is full half-way, a file at once": Case(
        ("export", "mini-sd"), ("the disk is full: out.safetensors was not written",), 1_000_000
    ),
    "another prediction type than the folder's": Case(
        ("generate", "mini-sd", "a cat", "--prediction-type", "v_prediction"),
        ("mini-sd has the prediction type epsilon, not v_prediction, as its scheduler_config.json says",),
    ),
    "a switched model to profile": Case(("profile", "switched"), ("is switched between teacher, small", "evaluate")),
    "a quality that is no number": Case(("calibrate", "mini-sd", "--min-psnr", "nan"), ("nan dB cannot be kept",)),
    "a quality that nothing has": Case(("calibrate", "mini-sd", "--min-ssim", "1.5"), ("an SSIM of 1.5",)),
    "several schedules in a model's folder": Case(
        ("generate", "scheduled", "a circle", "--inherit", "calibrated", "--steps", "2"),
        ("several calibrated schedules: one/inheritance.yaml, two/inheritance.yaml",),
    ),
    "a report into a file": Case(("report", "scheduled", "--out", "good.yaml"), ("good.yaml is a file",)),
    "a prediction type for a UNet folder": Case(
        ("profile", "nan", "--prediction-type", "epsilon"), ("is a UNet alone, whose prediction type changes nothing",)
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, unet, pipeline):
    folder = tmp_path_factory.mktemp("bad")
    some = torch.zeros(4, 4)
    nan = {**load_file(MINI_SD_FOLDER / "unet" / WEIGHTS)}
    nan["conv_out.bias"][1] = float("nan")
    shutil.copytree(MINI_SD_FOLDER / "unet", folder / "nan")
    save_file(nan, folder / "nan" / WEIGHTS, metadata={"format": "pt"})
    narrow = UNet2DConditionModel(**{**FAMILIES["sd15"].unet_config, "block_out_channels": (32, 32, 32, 32)})
    weights = unet_to_ldm(narrow)
    for name in ("out.2.bias", "time_embed.0.bias"):
        weights[f"model.diffusion_model.{name}"] = weights[f"model.diffusion_model.{name}"].clone().fill_(math.inf)
    save_file(weights, folder / "nan.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "nan.safetensors").read_bytes()[:500_000])
    lora = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    files = {
        "lora": {f"{lora}.{end}": some for end in ("lora_down.weight", "lora_up.weight", "alpha")},
        "peft": {f"unet.down_blocks.0.attentions.0.proj_in.lora_{side}.weight": some for side in "AB"},
        "vae": {"first_stage_model.encoder.conv_in.weight": some, "first_stage_model.decoder.conv_in.weight": some},
        "vae2": pipeline.vae.state_dict(),
        "sdxl": {**weights, "conditioner.embedders.1.model.ln_final.weight": some,
                 "model.diffusion_model.label_emb.0.0.weight": some},
        "flux": {"double_blocks.0.img_attn.qkv.weight": some, "img_in.weight": some},
    }  # fmt: skip
    for name, tensors in files.items():
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "garbage.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{no header}" * 9)
    (folder / "empty.safetensors").write_bytes(b"")
    shutil.copytree(MINI_SD_FOLDER, folder / "cut")
    path = folder / "cut" / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:50_000])
    shutil.copytree(MINI_SD_FOLDER, folder / "nan-text")
    path = folder / "nan-text" / "text_encoder" / "model.safetensors"
    text = load_file(path)
    next(value for name, value in text.items() if name.endswith("final_layer_norm.bias"))[0] = math.nan
    save_file(text, path, metadata={"format": "pt"})
    foreign = {
        "sdxl": {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        "flux": {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
    }
    for name, index in foreign.items():
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(MINI_SD_FOLDER, folder / "scheduled")
    for name in ("one", "two"):
        (folder / "scheduled" / name).mkdir()
        (folder / "scheduled" / name / "inheritance.yaml").write_text("asdm_inheritance: 1\nsteps: [full, full]\n")
    small = assemble(unet, Plan({"mid_block": "drop"}))
    schedule = SwitchingSchedule(
        (Action(member="teacher"), Action(member="small")), (999.0, 499.0), noise_of(pipeline.scheduler)
    )
    switched = SwitchedUNet2DConditionModel.of({"teacher": unet, "small": small}, schedule)
    switched.save_pretrained(folder / "switched")
    torch.save({"string_to_param": {"*": some}, "name": "cat"}, folder / "ti.pt")
    shutil.copytree(MINI_SD_FOLDER, folder / "inpainting")
    config = json.loads((folder / "inpainting" / "unet" / "config.json").read_text())
    (folder / "inpainting" / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    weights = load_file(MINI_SD_FOLDER / "unet" / WEIGHTS)
    weights["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(weights, folder / "inpainting" / "unet" / WEIGHTS, metadata={"format": "pt"})
    slot = GOOD.replace("drop", "conv1x1")
    recipes = {"slot": slot, "good": GOOD, "typo": TYPO, "misspelt": MISSPELT, "site": OTHER_SITE, "place": OTHER_EDIT,
               "overlap": OVERLAP, "off": NO_TEXT}  # fmt: skip
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def results(place):
    before = contents(place)
    lines = [([*case.arguments, *_out(case)], case.file_limit) for case in CASES.values()]
    found = run_all(place, lines)
    return dict(zip(CASES, found, strict=True)), before, contents(place)


def _out(case: Case) -> list[str]:
    if case.arguments[0] in ("profile", "recipes") or "--out" in case.arguments:
        return []
    is_file = case.arguments[0] == "export" and "onnx" not in case.arguments
    return ["--out", "out.safetensors" if is_file else "out"]


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_wrong_is_one_message_and_exit_code_2(results, name):
    code, out, err = results[0][name]
    assert code == 2, err
    assert out == ""
    text = re.sub(r"\s+", " ", err)
    assert text.count("Error: ") == 1
    assert "Traceback" not in text
    for words in CASES[name].words:
        assert words in text


def test_nothing_is_left_of_any_of_them(results):
    _, before, after = results
    assert after == before


def test_a_process_of_its_own_ends_alike(place, cli_anew):
    result = cli_anew("profile", str(place / "vae.safetensors"))
    assert result.returncode == 2
    assert "is a VAE" in result.stderr
    assert "Traceback" not in result.stderr
