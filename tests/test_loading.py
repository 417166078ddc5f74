"""Every way in, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.families import FAMILIES, check_supported, random_unet
from asdm_compress.models.files import stored_dtype
from asdm_compress.models.loading import load_pipeline, load_unet
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.models.recognise import is_finite
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions

OPTIONS = LoadOptions()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(MINI_SD_FOLDER, tmp_path / "model")
    return tmp_path / "model"


def weights_of(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_a_pipeline_folder_and_its_unet_folder_open_alike(copy, unet):
    for reference in (copy, copy / "unet"):
        found = load_unet(str(reference), OPTIONS)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), unet.parameters(), strict=True))


def test_dtype_and_device_are_followed(copy):
    found = load_pipeline(str(copy), LoadOptions(dtype=torch.bfloat16))
    assert {p.dtype for p in found.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in found.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in found.text_encoder.parameters()} == {torch.bfloat16}


def test_the_precision_of_pickled_weights_is_not_that_of_their_counts(tmp_path):
    state = {"embeddings.position_ids": torch.arange(4), "layer.weight": torch.ones(2, 2, dtype=torch.float16)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert stored_dtype(tmp_path) == torch.float16


@pytest.mark.parametrize(
    ("name", "words"),
    [("mini-ds", "mini-sd"), ("sd51", "sd15"), ("sd2.1", "sd21"), ("zzz", "Known names")],
)
def test_unknown_names_get_the_nearest(name, words):
    with pytest.raises(AsdmError) as caught:
        resolve(name, OPTIONS)
    assert caught.value.exit_code == ExitCode.USER
    assert words in str(caught.value.hint)


@pytest.mark.parametrize("reference", ["./nothing", "/no/such/folder", "model.safetensors", "a/b/c"])
def test_missing_paths(reference):
    with pytest.raises(AsdmError, match="no file or folder"):
        resolve(reference, OPTIONS)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(AsdmError, match=r"neither model_index\.json nor config\.json"):
        resolve(str(tmp_path), OPTIONS)


def test_a_missing_weights_file_is_named(copy):
    weights_of(copy).unlink()
    with pytest.raises(AsdmError, match="cannot be read") as caught:
        load_unet(str(copy), OPTIONS)
    assert caught.value.exit_code == ExitCode.USER


def test_truncated_and_empty_weights_are_named(copy):
    path = weights_of(copy)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(AsdmError, match=r"diffusion_pytorch_model\.safetensors is truncated"):
        load_unet(str(copy), OPTIONS)
    path.write_bytes(b"")
    with pytest.raises(AsdmError, match="is empty"):
        load_unet(str(copy), OPTIONS)


def test_a_damaged_text_encoder_is_named_too(copy):
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(AsdmError, match=r"model\.safetensors is truncated"):
        load_pipeline(str(copy), OPTIONS)


def test_a_stale_config_is_refused_instead_of_filled_with_random_weights(copy):
    path = weights_of(copy)
    weights = {k: v for k, v in load_file(path).items() if not k.startswith("mid_block.resnets.1")}
    save_file(weights, path)
    with pytest.raises(AsdmError, match=r"missing, the first is mid_block\.resnets\.1"):
        load_unet(str(copy), OPTIONS)


@pytest.mark.parametrize(
    ("part", "file", "key"),
    [
        ("text_encoder", "model", "encoder.layers.1.mlp.fc1.weight"),
        ("vae", "diffusion_pytorch_model", "decoder.conv_in.bias"),
    ],
)
def test_missing_weights_of_other_parts_are_named_too(copy, part, file, key):
    path = copy / part / f"{file}.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith(key)}, path, metadata={"format": "pt"})
    with pytest.raises(AsdmError, match=rf"{part} do not fit their config: 1 missing, the first is .*{re.escape(key)}"):
        load_pipeline(str(copy), OPTIONS)


def test_weights_in_the_fp16_variant_alone_are_found(copy, unet):
    for path in copy.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    found = load_pipeline(str(copy), OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(found.unet.parameters(), unet.parameters(), strict=True))


def test_the_stored_precision_is_kept_when_asked_for(copy):
    found = load_pipeline(str(copy), LoadOptions(dtype=None))
    assert {p.dtype for part in (found.unet, found.vae, found.text_encoder) for p in part.parameters()} == {
        torch.float16
    }


def test_every_part_keeps_its_own_stored_precision(copy):
    vae = next((copy / "vae").glob("*.safetensors"))
    save_file({name: tensor.float() for name, tensor in load_file(vae).items()}, vae)
    found = load_pipeline(str(copy), LoadOptions(dtype=None))
    assert (found.unet.dtype, found.vae.dtype) == (torch.float16, torch.float32)
    assert load_pipeline(str(copy), LoadOptions(dtype=torch.bfloat16)).vae.dtype == torch.bfloat16


def test_a_safe_bin_folder_opens_and_an_unsafe_one_does_not(copy, unet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = weights_of(copy)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    found = load_unet(str(copy), OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), unet.parameters(), strict=True))
    torch.save({"a": _Harmful()}, path.with_suffix(".bin"))
    with pytest.raises(AsdmError, match="would run code"):
        load_unet(str(copy), OPTIONS)
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("content", ["[]", "{", "\u00ff"])
def test_a_broken_model_index_is_named(copy, content):
    (copy / "model_index.json").write_text(content, encoding="latin-1")
    with pytest.raises(AsdmError, match=r"model_index\.json is no"):
        load_pipeline(str(copy), OPTIONS)


@pytest.mark.parametrize(
    "change",
    [{"center_input_sample": True}, {"only_cross_attention": True}, {"dual_cross_attention": True},
     {"time_cond_proj_dim": 32}, {"attention_type": "gated"}],
)  # fmt: skip
def test_switches_that_are_not_supported_are_named(unet, change):
    config = {**unet.config, **change}
    with torch.device("meta"):
        strange = UNet2DConditionModel.from_config(config)
    with pytest.raises(AsdmError, match=next(iter(change))):
        check_supported(strange)


def test_garbage_is_no_pickle(tmp_path):
    path = tmp_path / "noise.ckpt"
    path.write_bytes(b"garbage" * 100)
    for allow in (False, True):
        with pytest.raises(AsdmError, match="truncated or no checkpoint"):
            load_unet(str(path), LoadOptions(allow_pickle=allow))


def test_a_broken_config_is_named(copy):
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(AsdmError, match="no valid JSON"):
        load_unet(str(copy), OPTIONS)


def test_a_unet_of_another_family_is_named(tmp_path):
    sdxl_like = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, norm_num_groups=8,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    sdxl_like.save_pretrained(tmp_path)
    with pytest.raises(AsdmError, match="another family: addition_embed_type text_time"):
        load_unet(str(tmp_path), OPTIONS)


def test_another_kind_of_model_is_named(copy):
    with pytest.raises(AsdmError, match="holds a AutoencoderKL"):
        load_unet(str(copy / "vae"), OPTIONS)


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm-was-done"),))


def test_an_unsafe_pickle_is_refused_and_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Path("bad.ckpt").open("wb") as file:
        pickle.dump({"state_dict": {"a": _Harmful()}}, file)
    with pytest.raises(AsdmError, match="would run code") as caught:
        load_unet("bad.ckpt", OPTIONS)
    assert "--allow-pickle" in str(caught.value.hint)
    torch.save({"state_dict": {"a": _Harmful()}}, "bad2.ckpt")
    with pytest.raises(AsdmError, match="would run code"):
        load_unet("bad2.ckpt", OPTIONS)
    assert not Path("harm-was-done").exists()


def test_a_truncated_pickle_is_named(tmp_path):
    path = tmp_path / "cut.ckpt"
    torch.save({"conv_in.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(AsdmError, match="truncated or no checkpoint"):
        load_unet(str(path), OPTIONS)


def test_a_checkpoint_without_a_unet_is_named(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"something.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(AsdmError, match="no checkpoint of Stable Diffusion"):
        load_unet(str(path), OPTIONS)


def test_a_prediction_type_that_is_asked_for_is_held_against_the_folders_own(copy):
    """It is for single files; a folder says itself what its UNet predicts."""
    v, epsilon = (LoadOptions(prediction_type=kind) for kind in ("v_prediction", "epsilon"))
    assert load_pipeline(str(copy), epsilon).scheduler.config["prediction_type"] == "epsilon"
    with pytest.raises(AsdmError, match="the prediction type epsilon, not v_prediction"):
        resolve(str(copy), v)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    assert resolve(str(copy), v).kind == "pipeline folder"
    with pytest.raises(AsdmError, match="the prediction type v_prediction, not epsilon"):
        resolve(str(copy), epsilon)
    with pytest.raises(AsdmError, match="a UNet alone, whose prediction type changes nothing"):
        resolve(str(copy / "unet"), epsilon)


def test_a_unet_alone_is_no_pipeline(copy):
    with pytest.raises(AsdmError, match="needs a whole pipeline"):
        load_pipeline(str(copy / "unet"), OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_full_size_ldm_file_opens_with_every_weight_in_its_place(tmp_path, suffix):
    unet = random_unet(FAMILIES["sd15"], torch.bfloat16, torch.device("cpu"))
    path = tmp_path / f"model{suffix}"
    weights = {f"model.diffusion_model.{key}": value for key, value in _ldm_keys(unet).items()}
    if suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    with pytest.warns(UserWarning, match="is a UNet of Stable Diffusion 1.x: 4 levels with 2-2-2-2 layers"):
        found = load_unet(str(path), LoadOptions(dtype=torch.bfloat16))
    assert sum(p.numel() for p in found.parameters()) == 859_520_964
    for (name, a), (_, b) in zip(found.state_dict().items(), unet.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def _ldm_keys(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The tensors of a stock SD UNet under the names of the original latent-diffusion code."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    top = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
           "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
    result = {}
    for key, value in unet.state_dict().items():
        parts = key.split(".")
        if not key.startswith(("down_blocks", "mid_block", "up_blocks")):
            prefix = next(p for p in top if key.startswith(p + "."))
            result[top[prefix] + key.removeprefix(prefix)] = value
            continue
        if parts[0] == "mid_block":
            place = f"middle_block.{2 * int(parts[2]) if parts[1] == 'resnets' else 1}"
            kind, rest = parts[1], parts[3:]
        else:
            i, kind, j, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
            place = {
                "down_blocks": f"input_blocks.{3 * i + (j + 1 if kind != 'downsamplers' else 3)}",
                "up_blocks": f"output_blocks.{3 * i + (j if kind != 'upsamplers' else 2)}",
            }[parts[0]]
            inside = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2 if i else 1}[kind]
            place += f".{inside}"
        if kind == "resnets":
            rest[0] = resnet[rest[0]]
        if kind == "downsamplers":
            rest[0] = "op"
        result[".".join([place, *rest])] = value
    return result


def test_the_bundled_model_opens_in_plain_diffusers_without_any_option():
    pipeline = StableDiffusionPipeline.from_pretrained(MINI_SD_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 128, 128, 3)


def test_model_index_of_the_bundled_model_is_a_whole_stable_diffusion_pipeline():
    index = json.loads((MINI_SD_FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    total = sum(path.stat().st_size for path in MINI_SD_FOLDER.rglob("*"))
    assert total <= 25e6


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "is a LoRA"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lokr_w1", "is a LoRA"),
        ("oft_unet_down_blocks_0_attentions_0_proj_in.oft_blocks", "is a LoRA"),
        ("ip_adapter.1.to_k_ip.weight", "is an IP-Adapter"),
        ("adapter.body.0.resnets.0.block1.weight", "is a T2I-Adapter"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "is a motion module"),
        ("unet.down_blocks.0.attentions.0.to_k.lora_A.weight", "is a LoRA"),
        ("decoder.conv_in.weight", "is a VAE"),
        ("model.diffusion_model.double_blocks.0.img_mod.lin.weight", "is a Flux model"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Stable Diffusion XL"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
        ("text_model.embeddings.token_embedding.weight", "is a text encoder"),
    ],
)
def test_other_files_are_recognised(tmp_path, key, words):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "file.safetensors")
    with pytest.raises(AsdmError, match=words):
        load_unet(str(tmp_path / "file.safetensors"), LoadOptions())


def test_an_xl_unet_is_recognised_although_it_has_cross_attention(tmp_path):
    names = ("input_blocks.0.0.weight", "label_emb.0.0.weight")
    save_file({f"model.diffusion_model.{name}": torch.zeros(2, 2) for name in names}, tmp_path / "xl.safetensors")
    with pytest.raises(AsdmError, match="Stable Diffusion XL"):
        load_unet(str(tmp_path / "xl.safetensors"), LoadOptions())


def test_weights_that_are_no_numbers_are_named(copy, unet):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][3] = float("nan")
    save_file(weights, path)
    with pytest.raises(AsdmError, match=r"not all finite numbers: conv_in\.bias"):
        load_unet(str(copy), LoadOptions())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 67), (1, 5, 33, 65)])
def test_one_number_that_is_none_is_found_wherever_it_is(dtype, value, shape):
    numbers = torch.linspace(-3, 3, math.prod(shape)).reshape(shape)
    assert is_finite(numbers.to(dtype))
    for place in {0, numbers.numel() // 2, numbers.numel() - 1}:
        wrong = numbers.clone()
        wrong.view(-1)[place] = value
        assert not is_finite(wrong.to(dtype))
        assert not is_finite(wrong.to(dtype).transpose(0, -1))


def test_what_has_no_fractions_or_no_numbers_is_finite():
    assert all(map(is_finite, (torch.arange(3), torch.tensor([True]), torch.zeros(0), torch.zeros(0, 4).half())))
