"""From what was kept of every image to the rows of `eval.json`, each figure with its n and its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from asdm_compress.evaluation import intervals
from asdm_compress.evaluation.costs import ROLES, Counted, Role, Seconds
from asdm_compress.evaluation.distances import (
    CMMD_SCALE,
    NEIGHBOURS,
    SPLITS,
    Array,
    Frechet,
    InceptionScore,
    Kernel,
    Moments,
    PairedKernel,
    SetDistance,
    estimate,
    estimates,
    gaussian,
    precision_and_recall,
)
from asdm_compress.evaluation.fidelity import ms_ssim_scales
from asdm_compress.evaluation.record import Measure
from asdm_compress.scenes.verdict import ATTRIBUTES

Tensors = Mapping[str, Tensor]
_TITLES: Final = {
    "latent_mse": ("Latent MSE", "lower", "1"),
    "psnr": ("PSNR", "higher", "dB"),
    "ssim": ("SSIM", "higher", "1"),
    "ms_ssim": ("MS-SSIM", "higher", "1"),
    "lpips": ("LPIPS", "lower", "1"),
}
# More of a reference than this adds nothing to a kernel's mean or a neighbourhood, and takes n² time.
_MOST: Final = 10_000


def pair_measures(found: Tensors, side: int) -> Iterator[Measure]:
    """Student against teacher, pair by pair."""
    for name, (title, better, unit) in _TITLES.items():
        if name not in found:
            continue
        scales = ms_ssim_scales(side)
        note = f"{scales} of 5 scales fit into {side} pixels" if name == "ms_ssim" and scales < 5 else None
        yield Measure(
            name=name,
            group="pairs",
            unit=unit,
            title=title,
            better=better,
            reference="teacher",
            model=intervals.mean(found[name].double().numpy()),
            note=note,
        )


def content_measures(found: Tensors) -> Iterator[Measure]:
    """What the images show: prompt accuracy, CLIP score, inception score."""
    if "teacher.verdict" in found:
        yield from _accuracies(found["teacher.verdict"].numpy(), found["model.verdict"].numpy())
    if "teacher.clip_score" in found:
        teacher, model = (_array(found[f"{role}.clip_score"]) for role in ROLES)
        yield Measure(
            name="clip_score",
            group="content",
            unit="1",
            title="CLIP score",
            better="higher",
            extractor="clip",
            teacher=intervals.mean(teacher),
            model=intervals.mean(model),
            change=intervals.mean_difference(teacher, model),
            change_kind="difference",
            note="cosine of image and prompt, not times 100",
        )
    if "teacher.logits" in found:
        parts = InceptionScore.parts(len(found["teacher.logits"]))
        yield _compared(
            "inception_score",
            "Inception score",
            "higher",
            InceptionScore(),
            found,
            "logits",
            group="content",
            extractor="inception",
            note=None if parts == SPLITS else f"over all images at once: too few for {SPLITS} parts",
        )


def _accuracies(teacher: np.ndarray, model: np.ndarray) -> Iterator[Measure]:
    """Of verdicts (N, 1 + 2 · attributes)."""
    objects = model[:, 1 + 2 * ATTRIBUTES.index("shape") + 1]
    groups: list[tuple[str | None, np.ndarray]] = [(None, np.ones(len(model), dtype=bool))]
    groups += [(f"{n} object{'s' * (n > 1)}", objects == n) for n in sorted(set(objects.tolist()))]
    for part, rows in groups:
        before, after = teacher[rows, 0], model[rows, 0]
        yield Measure(
            name="prompt_accuracy",
            group="content",
            unit="1",
            title="Prompt accuracy",
            better="higher",
            part=part,
            extractor="scene-reader",
            teacher=intervals.share(before),
            model=intervals.share(after),
            change=intervals.share_difference(before, after),
            change_kind="difference",
            note="images that show all that the prompt says and nothing else",
        )
    for number, attribute in enumerate(ATTRIBUTES):
        right, of = 1 + 2 * number, 2 + 2 * number
        if not model[:, of].any():
            continue
        before, after, claims = teacher[:, right], model[:, right], model[:, of]
        yield Measure(
            name="attribute_accuracy",
            group="content",
            unit="1",
            title="Right of what the prompts claim",
            better="higher",
            part=attribute,
            extractor="scene-reader",
            teacher=intervals.pooled_share(before, claims),
            model=intervals.pooled_share(after, claims),
            change=intervals.pooled_difference(before, after, claims),
            change_kind="difference",
            note=f"{int(claims.sum())} claims of {attribute}",
        )


def distance_measures(
    found: Tensors,
    key: str,
    extractor: str,
    reference: Array | None,
    reference_name: str,
    moments: Moments | None = None,
) -> Iterator[Measure]:
    """Fréchet and kernel distance, precision and recall in one network's features, to a reference and the teacher's.

    `reference` (N, D) are features, None where there are only `moments`, or no reference at all.
    """
    if f"model.{key}" not in found or len(found[f"model.{key}"]) < 2:
        return
    model = _array(found[f"model.{key}"])
    if reference is not None or moments is not None:
        whole = Moments.of(reference) if moments is None and reference is not None else moments
        assert whole is not None
        yield _compared(
            "frechet", "Fréchet distance", "lower", Frechet(whole), found, key, extractor=extractor,
            reference=reference_name,
        )  # fmt: skip
    if reference is not None:
        some = _some(reference)
        yield _compared(
            "kernel", "Kernel distance (unbiased)", "lower", Kernel(some), found, key, extractor=extractor,
            reference=reference_name,
        )  # fmt: skip
        yield from _membership(found, key, some, extractor, reference_name)
    teacher = _array(found[f"teacher.{key}"])
    for name, title, figure in (
        ("frechet", "Fréchet distance", estimate(Frechet(Moments.of(teacher)), model)),
        ("kernel", "Kernel distance (unbiased)", estimate(PairedKernel(teacher), model)),
    ):
        yield Measure(
            name=name,
            group="distances",
            unit="1",
            title=title,
            better="lower",
            extractor=extractor,
            reference="teacher",
            model=figure,
            note="to the teacher's images of the same prompts and seeds",
        )


def cmmd_measures(found: Tensors, reference: Array | None, reference_name: str) -> Iterator[Measure]:
    """CMMD to a reference."""
    if "model.cmmd" in found and reference is not None and len(found["model.cmmd"]) > 1:
        yield _compared(
            "cmmd", "CMMD", "lower", Kernel(_some(reference), gaussian, unbiased=False, scale=CMMD_SCALE), found,
            "cmmd", extractor="cmmd-clip", reference=reference_name,
        )  # fmt: skip


def _membership(found: Tensors, key: str, reference: Array, extractor: str, name: str) -> Iterator[Measure]:
    sets = [_array(found[f"{role}.{key}"]) for role in ROLES]
    if min(len(sets[0]), len(reference)) <= NEIGHBOURS:
        return
    flags = [precision_and_recall(features, reference) for features in sets]
    for which, (measure, meaning) in enumerate(
        (("precision", "images among the reference"), ("recall", "of the reference among the images"))
    ):
        before, after = flags[0][which], flags[1][which]
        yield Measure(
            name=measure,
            group="distances",
            unit="1",
            title=measure.capitalize(),
            better="higher",
            extractor=extractor,
            reference=name,
            teacher=intervals.share(before),
            model=intervals.share(after),
            change=intervals.share_difference(before, after),
            change_kind="difference",
            note=f"{meaning}, {NEIGHBOURS} neighbours; n of {measure} is the number of points asked",
        )


def _compared(
    name: str,
    title: str,
    better: str,
    distance: SetDistance,
    found: Tensors,
    key: str,
    group: str = "distances",
    **more: Any,
) -> Measure:
    teacher, model = (_array(found[f"{role}.{key}"]) for role in ROLES)
    first, second, change = estimates(distance, teacher, model)
    return Measure(
        name=name,
        group=group,
        unit="1",
        title=title,
        better=better,
        teacher=first,
        model=second,
        change=change,
        change_kind="difference",
        **more,
    )


def speed_measures(seconds: Seconds, unet_calls: Mapping[Role, int]) -> Iterator[Measure]:
    """Seconds per image and per call of the UNet, medians over turns; changes are medians of the turns' ratios."""

    def measure(name: str, title: str, part: str | None, of: Callable[[Role], list[float]]) -> Measure:
        teacher, model = of("teacher"), of("model")
        return Measure(
            name=name,
            group="speed",
            unit="s",
            title=title,
            better="lower",
            part=part,
            teacher=intervals.median(teacher),
            model=intervals.median(model),
            change=intervals.median_ratio(teacher, model),
            change_kind="ratio",
        )

    def whole(role: Role) -> list[float]:
        return [sum(parts) for parts in zip(*(seconds[part][role] for part in ("text", "loop", "vae")), strict=True)]

    yield measure("seconds_per_image", "Seconds per image", "with VAE", whole)
    yield measure("seconds_per_image", "Seconds per image", "without VAE", lambda role: seconds["loop"][role])
    yield measure(
        "seconds_per_step",
        "Seconds per step",
        "a call of the UNet",
        lambda r: [s / unet_calls[r] for s in seconds["loop"][r]],
    )
    yield measure("seconds_vae", "Seconds of the VAE", None, lambda role: seconds["vae"][role])


def cost_measures(counted: Mapping[Role, Counted], peaks: Mapping[Role, int | None]) -> Iterator[Measure]:
    """What is counted, and what an accelerator's allocator says."""
    teacher, model = counted["teacher"], counted["model"]
    rows: list[tuple[str, str, str, str, str | None, float | None, float | None]] = [
        ("parameters", "size", "1", "Parameters of the UNet", None, teacher.parameters, model.parameters),
        ("macs", "size", "MACs", "MACs", "one UNet pass", teacher.pass_macs, model.pass_macs),
        ("macs", "size", "MACs", "MACs", "one image", teacher.image_macs, model.image_macs),
        ("bytes", "memory", "B", "Memory", "weights", teacher.weight_bytes, model.weight_bytes),
        (
            "bytes", "memory", "B", "Memory", "activations of one UNet pass", teacher.activation_bytes,
            model.activation_bytes,
        ),
        ("bytes", "memory", "B", "Memory", "peak while sampling", peaks["teacher"], peaks["model"]),
    ]  # fmt: skip
    for name, group, unit, title, part, before, after in rows:
        if before is None or after is None:
            continue
        yield Measure(
            name=name,
            group=group,
            unit=unit,
            title=title,
            better="lower",
            part=part,
            teacher=intervals.exact(before),
            model=intervals.exact(after),
            change=intervals.exact(after / before),
            change_kind="ratio",
        )


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.double().numpy(), dtype=np.float64)


def _some(features: Array) -> Array:
    """At most `_MOST` of them, always the same."""
    if len(features) <= _MOST:
        return features
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:_MOST].numpy()
    kept: Array = features[np.sort(rows)]
    return kept
