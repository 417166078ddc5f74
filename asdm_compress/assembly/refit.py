"""What stays is solved anew: the last projections of a kept module, so that they make up for what is cut before it.

The layer-wise least-squares reconstruction of Optimal Brain Compression (Frantar and Alistarh, 2208.11580), with the
teacher's own hidden state behind the module as the target, on what the student hands to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.regression import RIDGES, NormalEquations, best_ridges, memory_for_sums
from asdm_compress.assembly.slot_fit import band_sample_weights, check_finite, samples_of
from asdm_compress.models.slots import IdentityResnet, IdentityTransformer, ShortcutResnet
from asdm_compress.models.walk import Step

RefitKind = Literal["full", "scale"]
BYTES_PER_BLOCK: Final = 256 * 2**20  # of unfolded activations held at a time
FACTOR_RIDGE: Final = 1e-4  # share of the mean diagonal, where one factor is found from a product and the other


def projections_of(module: nn.Module) -> tuple[str, ...]:
    """The linear maps, by name inside the module, that its output is linear in, with what does not depend on them.

    It is linear in their sum; of a transformer, whose last feed-forward goes through `proj_out`, in their product.
    """
    names: tuple[str, ...] = ()
    if isinstance(module, ResnetBlock2D):
        names = ("conv2", "conv_shortcut")
    elif isinstance(module, ShortcutResnet):
        names = ("conv_shortcut",)
    elif isinstance(module, Transformer2DModel):
        names = ("proj_out", *_last_feed_forward(module))
    elif isinstance(module, (Downsample2D, Upsample2D)):
        names = ("conv",)
    elif type(module) is nn.Conv2d:
        return ("",) if module.bias is not None else ()
    inside = dict(module.named_modules())
    there = tuple(name for name in names if type(inside.get(name)) in (nn.Conv2d, nn.Linear))
    # Without its main map, or with one that is wrapped by something else, a module is left as it is.
    return there if there[:1] == names[:1] and all(module.get_submodule(n).bias is not None for n in there) else ()


def _last_feed_forward(module: Transformer2DModel) -> tuple[str, ...]:
    """The second map of the last block's feed-forward, where only its sum with the tokens lies before `proj_out`."""
    number = len(module.transformer_blocks) - 1
    block = module.transformer_blocks[number]
    if type(block) is not BasicTransformerBlock or block._chunk_size is not None or block.norm_type != "layer_norm":
        return ()
    last = getattr(block.ff, "net", [None])[-1]
    if type(block.ff) is not FeedForward or type(last) is not nn.Linear or last.bias is None:
        return ()
    return (f"transformer_blocks.{number}.ff.net.{len(block.ff.net) - 1}",)


def last_absorbed(teacher: Sequence[Step], student: Mapping[str, Step], moved: Callable[[str], str], unit: str) -> str:
    """The last of the dropped modules right behind a unit, whose part it can take over; else the unit itself.

    Not beyond a skip connection: its own output goes there too. `student` are the student's steps by path, `moved`
    gives a teacher's path there.
    """
    at = [step.path for step in teacher].index(unit)
    while not teacher[at].pushes_skip and at + 1 < len(teacher):
        following = student.get(moved(teacher[at + 1].path))
        if following is None or not isinstance(following.modules[-1], (IdentityResnet, IdentityTransformer)):
            break
        at += 1
    return teacher[at].path


class Refit:
    """One module's refit: `add` what it does on every part of the calibration, then `solve`.

    `full` solves all the projections' weights anew together; `scale` only gives every output channel of the first one
    another factor and shift, which takes next to no memory.
    """

    def __init__(self, module: nn.Module, kind: RefitKind) -> None:
        self.module, self.kind = module, kind
        self.names = projections_of(module)
        parts = self._parts()
        outputs, device = len(parts[0].weight), parts[0].weight.device
        if kind == "full":
            features = 1 + sum(_fan_in(part) for part in parts)
            self._sums = [NormalEquations(features, outputs, device) for _ in range(2)]
        else:
            self._channels = torch.zeros(2, 5, outputs, dtype=torch.float64, device=self.device_of_sums(device))

    @staticmethod
    def device_of_sums(device: torch.device) -> torch.device:
        """Of the accelerators only CUDA is sure to have float64."""
        return device if device.type == "cuda" else torch.device("cpu")

    @staticmethod
    def bytes(module: nn.Module) -> int:
        """The memory that the sums of a full refit take."""
        parts = [module.get_submodule(name) for name in projections_of(module)]
        features = 1 + sum(_fan_in(part) for part in parts)
        return 2 * 8 * features * (features + len(parts[0].weight))  # type: ignore[arg-type]

    @staticmethod
    def kind_for(module: nn.Module, refit: RefitKind) -> RefitKind:
        """What of a refit there is memory for."""
        fits = Refit.bytes(module) <= memory_for_sums(next(module.parameters()).device)
        return "full" if refit == "full" and fits else "scale"

    def _parts(self) -> list[Any]:
        return [self.module.get_submodule(name) for name in self.names]

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Collect, while the module runs once, what each projection takes in."""
        seen: list[Tensor] = []
        inputs: dict[str, Tensor] = {}
        handles = []
        for name, part in zip(self.names, self._parts(), strict=True):

            def keep(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                inputs[name] = arguments[0]

            handles.append(part.register_forward_pre_hook(keep))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
            seen += [inputs[name] for name in self.names if name in inputs]

    def add(
        self, calibration: Calibration, first: int, taken: Sequence[Tensor], output: Tensor, wanted: Tensor
    ) -> None:
        """Take in the triples from `first` on: the projections' inputs, and the module's output and wanted output.

        Both are (R, T, H, W), a triple having one row per guidance branch.
        """
        parts, factor = self._parts(), getattr(self.module, "output_scale_factor", 1.0)
        branches = calibration.inputs.texts.shape[1]
        pixels = output[0, 0].numel()
        per_triple = 12 * branches * pixels * sum(_fan_in(part) for part in parts)
        triples = max(1, BYTES_PER_BLOCK // per_triple)
        for start in range(0, len(output) // branches, triples):
            rows = slice(start * branches, (start + triples) * branches)
            missing = factor * (wanted[rows].float() - output[rows].float()).flatten(2)
            inputs = [x[rows] for x in taken]
            if self.kind == "full":
                # What is missing, not the whole, which the old weights give: a small difference of large sums is lost.
                self._add_full(calibration, first + start, torch.cat(self._features(inputs), 1), missing)
            else:
                now = _flat_weight(parts[0]).float() @ _unfolded(inputs[0], parts[0])
                self._add_scale(calibration, first + start, now, missing + now)

    def _features(self, taken: Sequence[Tensor]) -> list[Tensor]:
        """What the output is linear in, (R, F, L) for every projection, from what each took in."""
        parts = self._parts()
        features = [_unfolded(x, part) for x, part in zip(taken, parts, strict=True)]
        if self._is_through:
            hidden = features[1]
            features[0] = features[0] - _flat_weight(parts[1]).float() @ hidden - _bias(parts[1]).float()[:, None]
        return features

    @property
    def _is_through(self) -> bool:
        """Whether the second projection's output goes through the first one."""
        return isinstance(self.module, Transformer2DModel) and len(self.names) > 1

    def _solution(self) -> Tensor:
        """The weights (F + 1, T) in fp64 of the linear map that the module holds now, the constant last."""
        parts = self._parts()
        device = self.device_of_sums(parts[0].weight.device)
        weights = [_flat_weight(part).to(device, torch.float64) for part in parts]
        biases = [_bias(part).to(device, torch.float64) for part in parts]
        if self._is_through:
            weights[1], biases[1] = weights[0] @ weights[1], weights[0] @ biases[1]
        return torch.cat([torch.cat(weights, 1), torch.stack(biases).sum(0)[:, None]], 1).T

    def _tensors(self, solution: Tensor) -> dict[str, Tensor]:
        """The projections' tensors that hold a solution (F + 1, T)."""
        parts = self._parts()
        weights = list(torch.split(solution[:-1].T, [_fan_in(part) for part in parts], dim=1))
        constant = solution[-1]
        for part in parts[1:]:
            inner = _bias(part).to(constant)
            constant = constant - (weights[0] @ inner if self._is_through else inner)
        if self._is_through:
            weights[1] = self._second_factor(weights[0], weights[1])
        tensors = {_join(self.names[0], "bias"): constant.to(parts[0].bias)}
        for name, part, weight in zip(self.names, parts, weights, strict=True):
            tensors[_join(name, "weight")] = weight.reshape(part.weight.shape).to(part.weight)
        return tensors

    def _second_factor(self, first: Tensor, product: Tensor) -> Tensor:
        """The second map, of which and of the first the product is given, as near as may be to what it was.

        Along what the first one hardly lets through it stays as it is: there large weights would come to little, and
        in half precision their rounding to more than what is mended.
        """
        old = _flat_weight(self._parts()[1]).to(product)
        gram = first.T @ first
        gram += FACTOR_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        found: Tensor = old + torch.linalg.solve(gram, first.T @ (product - first @ old))
        return found

    def _add_full(self, calibration: Calibration, first: int, features: Tensor, target: Tensor) -> None:
        weights = band_sample_weights(calibration)
        for held_out, band, x, y in samples_of(calibration, first, features, target):
            self._sums[int(held_out)].add(x[..., None], y[..., None], 1, weights[band])

    def _add_scale(self, calibration: Calibration, first: int, now: Tensor, target: Tensor) -> None:
        weights = band_sample_weights(calibration)
        for held_out, band, x, y in samples_of(calibration, first, now, target):
            a, b = (v.transpose(0, 1).flatten(1).to(self._channels) for v in (x, y))
            moments = torch.stack([torch.full_like(a[:, 0], a.shape[1]), a.sum(1), b.sum(1), (a * a).sum(1),
                                   (a * b).sum(1)])  # fmt: skip
            self._channels[int(held_out)] += weights[band] * moments

    def solve(self) -> dict[str, Tensor]:
        """The new tensors of the projections by name; none where other prompts say that the old ones are better.

        A channel's weights go from the old ones towards the new ones only as far as prompts say that they were not
        fitted to.

        Raises AsdmError for activations that are no numbers.
        """
        return self._solve_full() if self.kind == "full" else self._solve_scale()

    def _solve_full(self) -> dict[str, Tensor]:
        check_finite(self._sums)
        train, held_out = self._sums
        both = train.plus(held_out)
        if both.samples == 0:
            return {}
        old = self._solution()
        if train.samples == 0 or held_out.samples == 0:
            return self._tensors(old + both.solve(RIDGES[-1]))
        solved: dict[float, Tensor] = {}

        def errors_at(ridge: float) -> list[float]:
            solved[ridge] = train.solve(ridge)
            return [float(held_out.error(solved[ridge]).sum())]

        ridge = RIDGES[best_ridges(errors_at, 1)[0]]
        # Channels are regressions of their own: a loud one that is easily told must not carry the ridge for quiet ones,
        # which the next normalisation makes as loud. So each goes as far as the other prompts say, both ways round.
        way = (_reach(solved[ridge], held_out) + _reach(held_out.solve(ridge), train)) / 2
        if not bool((way > 0).any()):
            return {}
        return self._tensors(old + way * both.solve(ridge))

    def _solve_scale(self) -> dict[str, Tensor]:
        part, name = self._parts()[0], self.names[0]
        train, held_out = self._channels
        if not bool(self._channels.isfinite().all()) or float(train[0, 0] + held_out[0, 0]) == 0:
            return {}
        if float(train[0, 0]) > 0 and float(held_out[0, 0]) > 0:
            # Either part of the prompts must gain from what was fitted to the other.
            sides = ((train, held_out), (held_out, train))
            gains = [_channel_error(b, *_line(a)) < _channel_error(b, 1.0, 0.0) for a, b in sides]
            better = gains[0] & gains[1]
        else:
            better = torch.ones_like(train[0], dtype=torch.bool)
        factor, shift = _line(train + held_out)
        factor, shift = torch.where(better, factor, 1.0), torch.where(better, shift, 0.0)
        shape = (-1, *[1] * (part.weight.ndim - 1))
        weight = part.weight.to(factor) * factor.reshape(shape)
        # The factor scales what comes without the bias, which the regression has left out.
        return {_join(name, "weight"): weight.to(part.weight), _join(name, "bias"): (part.bias + shift).to(part.bias)}


def _reach(step: Tensor, sums: NormalEquations) -> Tensor:
    """How far (T,), 0 to 1, each target's weights should go by a step (F, T), by errors on other samples."""
    curvature = ((sums.gram @ step) * step).sum(0)
    slope = (sums.cross * step).sum(0)
    return torch.where(curvature > 0, slope / curvature.clamp_min(1e-300), torch.zeros_like(slope)).clamp(0, 1)


def _line(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept (T,) of least squared error from the summed 1, x, y, x², xy."""
    n, x, y, xx, xy = moments
    spread = xx - x * x / n
    slope = (xy - x * y / n + 1e-3 * xx) / (spread + 1e-3 * xx).clamp_min(1e-30)
    return slope, (y - slope * x) / n


def _channel_error(moments: Tensor, slope: Tensor | float, shift: Tensor | float) -> Tensor:
    """The summed squared error (T,) of a line, less the targets' own energy."""
    n, x, y, xx, xy = moments
    error: Tensor = slope * slope * xx + shift * shift * n + 2 * slope * shift * x - 2 * slope * xy - 2 * shift * y
    return error


def _fan_in(part: Any) -> int:
    return prod(part.weight.shape[1:])


def _flat_weight(part: Any) -> Tensor:
    weight: Tensor = part.weight.detach().flatten(1)
    return weight


def _bias(part: Any) -> Tensor:
    bias: Tensor = part.bias.detach()
    return bias


def _unfolded(inputs: Tensor, part: Any) -> Tensor:
    """What a projection took in as (R, F, L): a patch per output pixel, or a token."""
    if isinstance(part, nn.Linear):
        return inputs.transpose(1, 2).float()
    return F.unfold(inputs.float(), part.kernel_size, part.dilation, part.padding, part.stride)


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
