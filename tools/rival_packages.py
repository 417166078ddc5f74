"""Packages of others that make diffusers' Stable Diffusion faster, installed and run as their authors say.

DeepCache (2312.00858), tomesd (token merging, 2303.17604), torch-pruning's magnitudes without training, and the caches
that diffusers itself has: each is patched onto a pipeline whose UNet is a copy. Beside them, fewer steps. A `Setting`
is one point of a package's grid.

diffusers' caches are written for transformers. What each does on a UNet as documented is tried, not asserted
(`refusals`). Those that can be made to run here are given what they need and a UNet does not bring along: the mixin
with `enable_cache`, the timestep, names of modules, inputs by keyword, and an empty memory before every image.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.cache_utils import CacheMixin
from rival_plans import torch_pruned
from torch import Tensor

from asdm_compress.sampling.schedulers import make_scheduler
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scheduling.timing import Loop

Around = Callable[[], AbstractContextManager[None]]  # of every run
Install = Callable[[StableDiffusionPipeline], Around]

DEEPCACHE, TOMESD, PRUNING = "DeepCache", "tomesd", "torch-pruning"
BROADCAST, FASTER_CACHE, TAYLOR = "PyramidAttentionBroadcast", "FasterCache", "TaylorSeer"
FEWER, OTHER_SAMPLER = "fewer steps", "fewer steps of another sampler"
# What a rival is a part of; what has no package is the sampler's.
PACKAGES: Final = {
    DEEPCACHE: "DeepCache", TOMESD: "tomesd", PRUNING: "torch-pruning",
    BROADCAST: "diffusers", FASTER_CACHE: "diffusers", TAYLOR: "diffusers",
}  # fmt: skip
WHOLE_RUN: Final = (-1, 1001)  # of timesteps
SOLVERS: Final = ("ddim", "dpm++", "unipc")
# Modules that return one tensor, which is what TaylorSeer can forecast; its own names match nothing of a UNet.
TAYLOR_PARTS: Final = {
    "transformers": r".*\.transformer_blocks\.\d+",
    "ResNets and transformers": r".*\.(transformer_blocks|resnets)\.\d+",
    "all but the outer blocks": r"(down_blocks\.[1-9]|mid_block|up_blocks\.[0-2])\..*(transformer_blocks|resnets)\.\d+",
}


class CachedUNet(UNet2DConditionModel, CacheMixin):
    """The UNet with the mixin that diffusers' cached transformers have."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a package's grid. `install` patches a pipeline; without one there are fewer steps of a sampler."""

    rival: str
    name: str
    install: Install | None = None
    steps: int | None = None
    scheduler: str | None = None

    @property
    def key(self) -> str:
        """For files."""
        return f"{self.rival}: {self.name}"

    def loop(self, pipeline: StableDiffusionPipeline, texts: Tensor, settings: SamplingSettings) -> Loop:
        """Its sampling loop for these texts, from the seed of `settings`."""
        scheduler = make_scheduler(self.scheduler, pipeline) if self.scheduler else None
        settings = replace(settings, steps=self.steps or settings.steps)
        if self.install is None:
            return Loop(pipeline, texts, settings, None, scheduler)
        return PackagedLoop(pipeline, texts, settings, self.install)


class PackagedLoop(Loop):
    """The loop on a copy of the UNet that a package has patched."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, texts: Tensor, settings: SamplingSettings, install: Install
    ) -> None:
        super().__init__(pipeline, texts, settings)
        self.pipeline.unet = copy.deepcopy(pipeline.unet)
        self.around = install(self.pipeline)

    def __call__(self, on_step: Callable[..., dict[str, Any]] | None = None) -> Tensor:
        """The final latents (N, C, H, W)."""
        with self.around():
            return super().__call__(on_step)


def package_versions() -> dict[str, str]:
    """Of the packages that are installed."""
    return {
        package: importlib.metadata.version(package) for package in dict.fromkeys(PACKAGES.values()) if has(package)
    }


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def deepcache(intervals: Sequence[int], branches: Sequence[int]) -> Iterator[Setting]:
    """DeepCache at each of these intervals and branches; its one way of skipping is uniform."""

    def install(pipeline: StableDiffusionPipeline, interval: int, branch: int) -> Around:
        import DeepCache

        helper = DeepCache.DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        return nullcontext

    for interval, branch in product(intervals, branches):
        how = functools.partial(install, interval=interval, branch=branch)
        yield Setting(DEEPCACHE, f"interval {interval}, branch {branch}", how)


def token_merging(ratios: Sequence[float], downsamples: Sequence[int]) -> Iterator[Setting]:
    """tomesd at every ratio and depth, merging for self-attention alone, which it recommends, or everywhere."""

    def install(pipeline: StableDiffusionPipeline, ratio: float, downsample: int, everywhere: bool) -> Around:
        import tomesd

        tomesd.apply_patch(
            pipeline, ratio=ratio, max_downsample=downsample, merge_crossattn=everywhere, merge_mlp=everywhere
        )

        @contextmanager
        def around() -> Iterator[None]:
            # Where tokens are merged is drawn from torch's generator as it stands at the first step.
            torch.manual_seed(0)
            pipeline.unet._tome_info["args"]["generator"] = None
            yield

        return around

    for ratio, downsample, everywhere in product(ratios, downsamples, (False, True)):
        how = functools.partial(install, ratio=ratio, downsample=downsample, everywhere=everywhere)
        where = "everywhere" if everywhere else "self-attention"
        yield Setting(TOMESD, f"ratio {ratio}, down to 1/{downsample}, {where}", how)


def attention_broadcast(ranges: Sequence[int | None]) -> Iterator[Setting]:
    """diffusers' Pyramid Attention Broadcast at every pair of ranges, in its default timesteps and in all."""

    def install(
        pipeline: StableDiffusionPipeline, own: int | None, cross: int | None, timesteps: tuple[int, int]
    ) -> Around:
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=own,
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=timesteps,
            cross_attention_timestep_skip_range=timesteps,
            current_timestep_callback=timestep_of(pipeline.unet),
        )
        return _cached(pipeline.unet, config)

    for own, cross, timesteps in product(ranges, ranges, ((100, 800), WHOLE_RUN)):
        if own or cross:
            how = functools.partial(install, own=own, cross=cross, timesteps=timesteps)
            yield Setting(BROADCAST, f"self {own or '–'}, cross {cross or '–'}, {_span(timesteps)}", how)


def faster_cache(ranges: Sequence[int], alphas: Sequence[float]) -> Iterator[Setting]:
    """diffusers' FasterCache: of a UNet it leaves out the unconditional branch; its attentions it does not find."""

    def install(pipeline: StableDiffusionPipeline, skip: int, alpha: float, timesteps: tuple[int, int]) -> Around:
        unet = pipeline.unet
        config = diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            unconditional_batch_skip_range=skip,
            unconditional_batch_timestep_skip_range=timesteps,
            alpha_low_frequency=alpha,
            alpha_high_frequency=alpha,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            current_timestep_callback=timestep_of(unet),
            _unconditional_conditional_input_kwargs_identifiers=["sample", "encoder_hidden_states"],
        )
        around, hooked = _cached(unet, config), unet.forward

        def by_keyword(sample: Tensor, timestep: Tensor, **others: Any) -> Any:
            return hooked(sample=sample, timestep=timestep, **others)

        unet.forward = by_keyword
        return around

    for skip, alpha, timesteps in product(ranges, alphas, ((-1, 641), WHOLE_RUN)):
        how = functools.partial(install, skip=skip, alpha=alpha, timesteps=timesteps)
        yield Setting(FASTER_CACHE, f"unconditional every {skip}, weight {alpha}, {_span(timesteps)}", how)


def taylor_seer(intervals: Sequence[int], orders: Sequence[int]) -> Iterator[Setting]:
    """diffusers' TaylorSeer on parts of the UNet, at every interval and order, from its default step on."""

    def install(pipeline: StableDiffusionPipeline, part: str, interval: int, order: int) -> Around:
        config = diffusers.TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            taylor_factors_dtype=pipeline.unet.dtype,
            cache_identifiers=[TAYLOR_PARTS[part]],
        )
        return _cached(pipeline.unet, config)

    for part, interval, order in product(TAYLOR_PARTS, intervals, orders):
        how = functools.partial(install, part=part, interval=interval, order=order)
        yield Setting(TAYLOR, f"{part}, interval {interval}, order {order}", how)


def pruned(shares: Sequence[float]) -> Iterator[Setting]:
    """torch-pruning by magnitude at every share of all widths, nothing trained afterwards."""
    known: dict[float, UNet2DConditionModel] = {}  # of one teacher: a grid is made for one

    def install(pipeline: StableDiffusionPipeline, share: float) -> Around:
        if share not in known:
            known[share] = torch_pruned(pipeline.unet, share, int(pipeline.tokenizer.model_max_length))
        pipeline.unet = known[share]
        return nullcontext

    for share in shares:
        yield Setting(PRUNING, f"{share:.3g} of all widths", functools.partial(install, share=share))


def fewer_steps(steps: Sequence[int]) -> Iterator[Setting]:
    """Fewer steps of the pipeline's own sampler (mini-sd's is DPM-Solver++), and of other solvers."""
    for count in steps:
        yield Setting(FEWER, f"{count} steps", None, count)
    for count, solver in product(steps, SOLVERS):
        yield Setting(OTHER_SAMPLER, f"{count} steps of {solver}", None, count, solver)


def every_setting(steps: int, budgets: Sequence[float], quick: bool = False) -> list[Setting]:
    """The grid of every package that is installed; of fewer steps those whose share is near a budget."""
    found: list[Setting] = []
    if has(DEEPCACHE):
        found += deepcache((3,) if quick else (2, 3, 4, 5, 7, 10), (0,) if quick else range(12))
    if has(TOMESD):
        found += token_merging((0.5,) if quick else (0.25, 0.5, 0.75), (1,) if quick else (1, 4))
    found += attention_broadcast((None, 2) if quick else (None, 2, 5))
    found += faster_cache((3,) if quick else (2, 3, 5), (1.1,) if quick else (1.0, 1.1))
    found += taylor_seer((3,) if quick else (2, 3, 5), (1,) if quick else (0, 1))
    found += pruned((0.25,) if quick else (1 / 16, 1 / 8, 1 / 4, 1 / 2))
    counts = {round(budget * steps) + more for budget in budgets for more in (-1, 0)}
    found += fewer_steps(sorted(count for count in counts if 1 < count < steps))
    return found


def refusals(pipeline: StableDiffusionPipeline, texts: Tensor, settings: SamplingSettings) -> list[dict[str, Any]]:
    """What each of diffusers' caches does on this UNet, given the mixin, with what its documentation shows.

    The error, or how many modules have a hook of it, whether the latents change, and whether a second run's differ from
    the first's, because nothing forgets.
    """
    full = Loop(pipeline, texts, settings)()
    found = []
    for name, config_for in _as_documented(settings.steps).items():
        loop = Loop(pipeline, texts, settings)
        unet = loop.pipeline.unet = copy.deepcopy(pipeline.unet)
        now = timestep_of(unet)
        row: dict[str, Any] = {"cache": name, "error": None, "changes": None, "remembers": None}
        try:
            unet.__class__ = CachedUNet
            unet.enable_cache(config_for(now))
            first, second = loop(), loop()
            row |= {"changes": not torch.equal(first, full), "remembers": not torch.equal(first, second)}
        except Exception as error:  # whatever they raise is what is reported
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        registries = (getattr(module, "_diffusers_hook", None) for module in unet.modules())
        row["hooks"] = sum(bool(registry is not None and registry.hooks) for registry in registries)
        found.append(row)
    return found


def _as_documented(steps: int) -> dict[str, Callable[[Callable[[], int]], Any]]:
    """A config for each cache, from a function that tells the timestep."""
    return {
        BROADCAST: lambda now: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2, current_timestep_callback=now
        ),
        FASTER_CACHE: lambda now: diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=now
        ),
        "FirstBlockCache": lambda _: diffusers.FirstBlockCacheConfig(threshold=0.2),
        "MagCache": lambda _: diffusers.MagCacheConfig(num_inference_steps=steps, mag_ratios=[1.0] * steps),
        TAYLOR: lambda _: diffusers.TaylorSeerCacheConfig(),
        "SeaCache": lambda _: diffusers.SeaCacheConfig(),
        "TextKVCache": lambda _: diffusers.TextKVCacheConfig(),
    }


def timestep_of(unet: UNet2DConditionModel) -> Callable[[], int]:
    """The timestep of the pass under way, which a Stable Diffusion pipeline does not tell."""
    seen = [0]

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[0] = int(kwargs["timestep"] if "timestep" in kwargs else args[1])

    unet.register_forward_pre_hook(look, with_kwargs=True)
    return lambda: seen[0]


def _cached(unet: UNet2DConditionModel, config: Any) -> Around:
    """Enable a cache of diffusers; around a run there is a context for it, and nothing of the run before."""
    unet.__class__ = CachedUNet
    unet.enable_cache(config)

    @contextmanager
    def around() -> Iterator[None]:
        unet._reset_stateful_cache()
        with unet.cache_context("sampling"):
            yield

    return around


def _span(timesteps: tuple[int, int]) -> str:
    return "all timesteps" if timesteps == WHOLE_RUN else f"timesteps {max(timesteps[0], 0)} to {timesteps[1]}"
