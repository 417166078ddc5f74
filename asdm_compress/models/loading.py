"""Opens models, whatever they come as, into a UNet or a whole pipeline."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any, Final

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.clip_tokenizer import TOKENS
from asdm_compress.models.families import check_supported, random_unet
from asdm_compress.models.files import check_folder, stored_dtype, variant_of
from asdm_compress.models.folder import absent_parts, open_part, read_json, readable, unet_class
from asdm_compress.models.lazy import lazy_unet
from asdm_compress.models.quiet import quiet_libraries
from asdm_compress.models.resolve import resolve
from asdm_compress.models.single_file import PIPELINES, check_whole, make_pipeline
from asdm_compress.models.source import LoadOptions, Source

# The other parts of a pipeline whose weights are checked as strictly as the UNet's.
_CHECKED_PARTS: Final = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}


def load_unet(reference: str, options: LoadOptions) -> UNet2DConditionModel:
    """Open a UNet of the Stable Diffusion 1.x/2.x kind, in evaluation mode, every weight read from the file.

    Raises AsdmError for everything that is wrong with the reference or the files.
    """
    return open_unet(_resolved(reference, options), options)


def open_unet(source: Source, options: LoadOptions) -> UNet2DConditionModel:
    """As `load_unet`, for a source that is already resolved."""
    if source.family is not None:
        return random_unet(source.family, options.dtype or torch.float32, options.device)
    folder = source.unet_folder
    if folder is None or source.unet_config is not None:
        with lazy_unet(source, options) as lazy:
            unet = lazy.filled(options)
    else:
        built = unet_class(folder, read_json(folder / "config.json"))
        unet = open_part(built, folder, options.dtype or stored_dtype(folder, options.allow_pickle), options)
        check_supported(unet)
    return unet.to(options.device).eval().requires_grad_(False)


def load_pipeline(reference: str, options: LoadOptions | None = None) -> StableDiffusionPipeline:
    """Open a whole pipeline; raises AsdmError where there is only a UNet."""
    options = options or LoadOptions()
    return open_pipeline(_resolved(reference, options), options)


def open_pipeline(source: Source, options: LoadOptions) -> StableDiffusionPipeline:
    """As `load_pipeline`, for a source that is already resolved.

    Inpainting and other variants come as the pipeline class of their own.
    """
    if source.kind == "single file":
        check_whole(source)  # before anything is read
        pipeline = make_pipeline(source, open_unet(source, replace(options, device=torch.device("cpu"))), options)
    elif source.kind == "pipeline folder":
        pipeline = _pipeline_from_folder(source, options)
    else:
        raise AsdmError(
            f"{source.name} is a {source.kind.replace('random', 'UNet with random')}, and this command samples images: "
            "it needs a whole pipeline",
            "Give a diffusers folder with a model_index.json, a whole checkpoint file, or mini-sd.",
        )
    pipeline.set_progress_bar_config(disable=True)
    with quiet_libraries():  # half precision on a CPU is only how weights are read and written here
        return pipeline.to(options.device)


def text_tokens_of(source: Source) -> int:
    """The number of text tokens that the model's pipeline pads to; 77, CLIP's own, where there is no tokenizer."""
    config = source.path / "tokenizer" / "tokenizer_config.json" if source.path else None
    if config is None or not config.is_file():
        return TOKENS
    return int(read_json(config).get("model_max_length", TOKENS))


def _resolved(reference: str, options: LoadOptions) -> Source:
    """A source whose notes are shown as Python's warnings; the commands show them in their own way."""
    source = resolve(reference, options)
    for note in source.notes:
        warnings.warn(note, stacklevel=3)
    return source


def _pipeline_from_folder(source: Source, options: LoadOptions) -> Any:
    assert source.path is not None
    assert source.unet_folder is not None
    unet_dtype = options.dtype or stored_dtype(source.unet_folder, options.allow_pickle)
    # Passed at once, the UNet's class would be looked up by the index, which may name the folder's own loader.
    parts: dict[str, Any] = {"unet": None}
    index = read_json(source.path / "model_index.json")
    for name, part_class in _CHECKED_PARTS.items():
        if index.get(name, [None, None])[1] == part_class.__name__:
            part_dtype = options.dtype or stored_dtype(source.path / name, options.allow_pickle)
            parts[name] = open_part(part_class, source.path / name, part_dtype, options)
    # diffusers wants some parts named even where a folder goes without them, such as a depth estimator.
    absent = absent_parts(source.path, index)
    parts |= {name: None for name, value in index.items() if value == [None, None] or name in absent}
    own = str(index.get("_class_name"))
    pipeline_class = getattr(diffusers, own) if own in PIPELINES.values() else StableDiffusionPipeline
    with readable(source.path):
        check_folder(source.path, options.allow_pickle)
        pipeline = pipeline_class.from_pretrained(
            source.path, **parts, dtype=unet_dtype, variant=variant_of(source.unet_folder), local_files_only=True
        )
    return with_parts(pipeline, unet=open_unet(source, options))


def with_parts(pipeline: StableDiffusionPipeline, **parts: Any) -> StableDiffusionPipeline:
    """Another pipeline of the same class with some parts in the place of its own; not every class has the flag."""
    flags = {"requires_safety_checker"} & set(inspect.signature(type(pipeline).__init__).parameters)
    whole = {**pipeline.components, **parts}
    with quiet_libraries():  # of a missing safety checker diffusers would warn once for each of hundreds
        return type(pipeline)(**whole, **{flag: pipeline.config.get(flag, False) for flag in flags})
