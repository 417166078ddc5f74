"""The parts of `mini-sd`: Stable Diffusion 1.x's topology, narrow enough for two CPU cores."""

from __future__ import annotations

from typing import Final

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from asdm_compress.scenes.captions import vocabulary
from asdm_compress.scenes.world import IMAGE_SIZE

TEXT_WIDTH: Final = 96
TEXT_TOKENS: Final = 40
HIDDEN_GAIN: Final = 0.9  # of a decoder shortcut at the start; the skip gets what keeps the variance
LATENT_SIZE: Final = IMAGE_SIZE // 8
NOISE_SCHEDULE: Final = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def make_vae() -> AutoencoderKL:
    """A VAE of factor 8 with four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        # Few groups: a group of one channel would wash out the absolute colours in the last normalisation.
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
    )


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the caption grammar is one token and any other text still has tokens."""
    byte_level = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    byte_level.train_from_iterator(vocabulary(), trainer)
    learned = byte_level.model.__getstate__()
    return _as_clip_tokenizer(learned, alphabet)


def _as_clip_tokenizer(state: bytes, alphabet: list[str]) -> CLIPTokenizer:
    import json

    learned = json.loads(state)
    merges = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in learned["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens.
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)
    for word in vocabulary():
        if len(tokenizer(word)["input_ids"]) != 3:
            raise RuntimeError(f"the word {word!r} is not one token")
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """SD 1.x's four levels with two layers per block and cross-attention in the first three, about 8.7 M parameters."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # as in SD 1.x, diffusers reads this as the number of heads
        norm_num_groups=8,
    )
    initialise(unet)
    return unet


def initialise(unet: UNet2DConditionModel) -> None:
    """Start weights that let the deep levels be heard.

    Residual branches start at zero, as in the original latent-diffusion code, and the plain path keeps its variance.
    Under torch's default every convolution on the way back up shrinks what comes from below: measured on this UNet, the
    mid block's share of the output after 1,800 steps was 1e-8, too small for Adam to move it.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, Transformer2DModel):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
        elif isinstance(module, (Downsample2D, Upsample2D)):
            _keep_variance(module.conv)
    for block in unet.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _keep_variance(resnet.conv_shortcut)
    for block in unet.up_blocks:
        for resnet in block.resnets:
            _mix_skip(resnet.conv_shortcut, resnet.out_channels)
    _keep_variance(unet.conv_in)
    nn.init.zeros_(unet.conv_out.weight)


def _keep_variance(conv: nn.Conv2d) -> None:
    nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
    nn.init.zeros_(conv.bias)


def _mix_skip(conv: nn.Conv2d, channels: int) -> None:
    """Start a decoder shortcut as a weighted sum of hidden state and skip, with the variance kept."""
    hidden = max(channels, conv.in_channels - channels)
    skip = conv.in_channels - hidden
    nn.init.normal_(conv.weight[:, :hidden], std=HIDDEN_GAIN / hidden**0.5)
    nn.init.normal_(conv.weight[:, hidden:], std=(1 - HIDDEN_GAIN**2) ** 0.5 / skip**0.5)
    nn.init.zeros_(conv.bias)


def make_noise_scheduler() -> DDPMScheduler:
    """SD 1.x's scaled-linear betas with ε-prediction."""
    return DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False)
