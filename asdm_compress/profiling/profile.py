"""The profile of a UNet: one record per site, with the fingerprint of the machine and the settings it holds for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from asdm_compress.core.checked_json import read_record
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.provenance import content_hash, processor_name, versions
from asdm_compress.models.families import architecture, latent_size_of
from asdm_compress.models.sites import Site, SiteKind, SiteLevel, find_sites
from asdm_compress.profiling.counting import MacCount, ModuleCounts, count
from asdm_compress.profiling.crosscheck import cross_check
from asdm_compress.profiling.latency import ForwardPass, SiteTimes, is_timed, matmul_peak, time_sites

SCHEMA_VERSION: Final = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteProfile(_Record):
    """What one site costs. Seconds are medians over the repeats; `efficiency` is MACs per second over the peak's.

    Sites too quick for the clock have no efficiency.
    """

    path: str
    level: SiteLevel
    kind: SiteKind
    parent: str | None
    parameters: int
    bytes: int
    macs: int
    macs_conv_linear: int
    peak_activation_bytes: int
    latency: float
    latency_iqr: float
    latency_samples: list[float]
    share: float
    efficiency: float | None


class Fingerprint(_Record):
    """What a profile holds for. A profile of one fingerprint says nothing about another."""

    model: str
    architecture: str
    device: str
    dtype: str
    channels_last: bool
    batch: int
    image_size: int
    text_tokens: int
    threads: int
    versions: dict[str, str]


class OtherCount(_Record):
    """The same pass as another counter sees it: its convention, total, and MACs by site."""

    counter: str
    convention: str
    macs: int
    sites: dict[str, int]


class Profile(_Record):
    """A UNet's costs. `latency` is that of the plain forward pass; `explained` the share of it that the sites cover."""

    schema_version: Literal[1] = 1
    fingerprint: Fingerprint
    parameters: int
    bytes: int
    macs: int
    macs_conv_linear: int
    macs_attention: int
    peak_activation_bytes: int
    latency: float
    latency_samples: list[float]
    timed_latency_samples: list[float]
    explained: float
    matmul_peak: float
    sites: list[SiteProfile]
    cross_check: list[OtherCount] = []

    def site(self, path: str) -> SiteProfile:
        """The record of the site at `path`; raises KeyError where there is none."""
        found = next((s for s in self.sites if s.path == path), None)
        if found is None:
            raise KeyError(path)
        return found

    def save(self, path: Path) -> None:
        """Write `profile.json`."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_profile(path: Path) -> Profile:
    """Read a `profile.json`; raises AsdmError for one that is damaged or of another schema version."""
    return read_record(path, Profile, SCHEMA_VERSION, "Make the profile again.")


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """The forward pass that is profiled. A batch of 2 is one image with guidance; 77 text tokens are CLIP's."""

    image_size: int | None = None
    batch: int = 2
    text_tokens: int | None = None
    channels_last: bool = False
    repeats: int = 10
    cross_check: bool = False

    @property
    def tokens(self) -> int:
        """The number of text tokens, 77 unless set."""
        return 77 if self.text_tokens is None else self.text_tokens

    @staticmethod
    def of(known: Profile, repeats: int) -> ProfileSettings:
        """Those that a profile was made with, with `repeats` of its passes."""
        mark = known.fingerprint
        return ProfileSettings(mark.image_size, mark.batch, mark.text_tokens, mark.channels_last, repeats)


def profile(
    unet: UNet2DConditionModel,
    settings: ProfileSettings | None = None,
    model_name: str = "unet",
) -> Profile:
    """Profile a UNet on the device and in the dtype that it has.

    Raises AsdmError where the image size does not fit the UNet, or memory does not suffice.
    """
    settings = settings or ProfileSettings()
    height = _latent_size(unet, settings)
    device, dtype = unet.device, next(unet.parameters()).dtype
    sites = find_sites(unet)
    counts = count(unet, settings.batch, height, height, settings.tokens)
    inputs = random_inputs(unet, settings)
    forward = forward_pass(unet, settings)
    times = time_sites(unet, sites, forward, settings.repeats, device)
    peak = matmul_peak(device, dtype)
    others = []
    if settings.cross_check:
        for check in cross_check(unet, *inputs):
            by_site = {s.path: sum(check.macs.get(m, 0) for m in s.modules) for s in sites}
            others.append(
                OtherCount(counter=check.counter, convention=check.convention, macs=check.macs[""], sites=by_site)
            )
    records = _site_profiles(unet, sites, counts, times, peak)
    total = counts.macs[""]
    covered = median(
        sum(times.sites[s.path][i] for s in sites if s.level == "block") / seconds
        for i, seconds in enumerate(times.timed_whole)
    )
    return Profile(
        fingerprint=fingerprint(unet, settings, model_name),
        parameters=sum(p.numel() for p in unet.parameters()),
        bytes=sum(p.numel() * p.element_size() for p in unet.parameters()),
        macs=total.total,
        macs_conv_linear=total.conv_linear,
        macs_attention=total.attention,
        peak_activation_bytes=counts.peak_bytes[""],
        latency=median(times.whole),
        latency_samples=times.whole,
        timed_latency_samples=times.timed_whole,
        explained=covered,
        matmul_peak=peak,
        sites=records,
        cross_check=others,
    )


def random_inputs(unet: UNet2DConditionModel, settings: ProfileSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the right shapes: sample (B, C, H, W), a scalar timestep, text (B, tokens, width).

    The halves of an even batch have the same samples, as with guidance.
    """
    size = _latent_size(unet, settings)
    generator = torch.Generator().manual_seed(0)
    repeats = 1 + (settings.batch + 1) % 2
    sample = torch.randn(settings.batch // repeats, unet.config["in_channels"], size, size, generator=generator)
    sample = sample.repeat(repeats, 1, 1, 1)
    text = torch.randn(settings.batch, settings.tokens, unet.config["cross_attention_dim"], generator=generator)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    device, dtype = unet.device, next(unet.parameters()).dtype
    return sample.to(device, dtype, memory_format=layout), torch.tensor(500, device=device), text.to(device, dtype)


def forward_pass(unet: UNet2DConditionModel, settings: ProfileSettings) -> ForwardPass:
    """The pass that is profiled, ready to be called."""
    inputs = random_inputs(unet, settings)
    if settings.channels_last:
        unet.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward() -> Any:
        return unet(*inputs, return_dict=False)

    return forward


def fingerprint(unet: UNet2DConditionModel, settings: ProfileSettings, model_name: str) -> Fingerprint:
    """What a profile of this UNet with these settings, made here and now, would hold for."""
    device = unet.device
    return Fingerprint(
        model=model_name,
        architecture=content_hash(architecture(unet) | {"edits": unet.config.get("edits")}),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        dtype=str(next(unet.parameters()).dtype).removeprefix("torch."),
        channels_last=settings.channels_last,
        batch=settings.batch,
        image_size=8 * _latent_size(unet, settings),
        text_tokens=settings.tokens,
        threads=torch.get_num_threads(),
        versions=versions(),
    )


def check_fingerprint(wanted: Fingerprint, found: Fingerprint) -> None:
    """Raise AsdmError, showing what differs, when a profile was made for something else.

    Names do not matter, nor does the number of the processor's threads for what was timed on a GPU.
    """
    on_processor = wanted.device == processor_name()
    differing = [
        f"{name}: {getattr(found, name)} in the profile, {getattr(wanted, name)} here"
        for name in Fingerprint.model_fields
        if name != "model" and (on_processor or name != "threads") and getattr(found, name) != getattr(wanted, name)
    ]
    if differing:
        raise AsdmError(f"the profile was made for something else: {'; '.join(differing)}", "Make the profile again.")


def _latent_size(unet: UNet2DConditionModel, settings: ProfileSettings) -> int:
    if settings.image_size is None:
        return latent_size_of(unet)
    if settings.image_size <= 0 or settings.image_size % 8:
        raise AsdmError(f"the image size {settings.image_size} is no positive multiple of 8", "For example 512.")
    smallest = 8 * 2 ** (len(unet.config["block_out_channels"]) - 1)
    if settings.image_size < smallest:
        raise AsdmError(f"at {settings.image_size} pixels nothing is left on the deepest level", f"From {smallest} on.")
    return settings.image_size // 8


def _site_profiles(
    unet: nn.Module, sites: Sequence[Site], counts: ModuleCounts, times: SiteTimes, peak: float
) -> list[SiteProfile]:
    samples = _seconds_of_sites(sites, times)
    # Timers cost a little time of their own; sites are scaled to the plain pass, of which they are shares.
    plain = median(times.whole) / median(times.timed_whole)
    whole = median(times.timed_whole)
    records = []
    for site in sites:
        macs = sum((counts.macs.get(path, MacCount()) for path in site.modules), MacCount())
        weights = [p for path in site.modules for p in parameters_of(unet, path)]
        seconds = samples[site.path]
        spread = float(np.subtract(*np.percentile(seconds, [75, 25]))) * plain
        typical = median(seconds)
        records.append(
            SiteProfile(
                path=site.path,
                level=site.level,
                kind=site.kind,
                parent=site.parent,
                parameters=sum(p.numel() for p in weights),
                bytes=sum(p.numel() * p.element_size() for p in weights),
                macs=macs.total,
                macs_conv_linear=macs.conv_linear,
                peak_activation_bytes=max(counts.peak_bytes.get(path, 0) for path in site.modules),
                latency=typical * plain,
                latency_iqr=spread,
                latency_samples=[s * plain for s in seconds],
                share=typical / whole,
                efficiency=macs.total / (typical * plain) / peak if typical > 0 else None,
            )
        )
    return records


def _seconds_of_sites(sites: Sequence[Site], times: SiteTimes) -> Mapping[str, list[float]]:
    """Seconds per repeat of every site; of layers as sums of their units, of projections as what their unit leaves."""
    seconds = {site.path: times.sites[site.path] for site in sites if is_timed(site)}
    for site in sites:
        if site.kind == "layer":
            units = [seconds[path] for path in site.modules]
            seconds[site.path] = [sum(values) for values in zip(*units, strict=True)]
        elif site.kind == "projections":
            inner = [
                seconds[s.path] for s in sites if s.parent == site.parent and s.level == "sub-unit" and is_timed(s)
            ]
            unit = seconds[site.parent or ""]
            seconds[site.path] = [max(0.0, unit[i] - sum(values[i] for values in inner)) for i in range(len(unit))]
    return seconds


def parameters_of(unet: nn.Module, path: str) -> list[nn.Parameter]:
    """The parameters of the module at a path; none where an edit has left nothing there."""
    parent, _, name = path.rpartition(".")
    module = unet.get_submodule(parent)._modules.get(name)
    return list(module.parameters()) if module is not None else []
