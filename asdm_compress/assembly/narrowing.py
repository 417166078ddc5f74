"""The closed-form start of narrowed modules: which structures stay, and the next projection refitted to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from asdm_compress.assembly.calibration import Calibration
from asdm_compress.assembly.damage import chunks_of
from asdm_compress.assembly.regression import NormalEquations, solve_at_best_ridge
from asdm_compress.assembly.slot_fit import band_sample_weights, check_finite, samples_of
from asdm_compress.models.walk import finish, start, steps_of
from asdm_compress.models.widths import Inner, inner_of, narrowed, own_names

CHOICE_RIDGE: Final = 1e-3  # share of the mean diagonal, while structures are chosen
ROUNDS: Final = 64  # a 64th of the structures goes at a time, at least one


@dataclass(frozen=True, slots=True)
class InnerSums:
    """The second moments of a module's inner activations, once for the fit's prompts and once for the others."""

    train: NormalEquations
    held_out: NormalEquations

    @staticmethod
    def empty(inner: Inner, device: torch.device) -> InnerSums:
        """Sums without samples."""
        features = inner.count * inner.size + 1
        return InnerSums(NormalEquations(features, 0, device), NormalEquations(features, 0, device))

    @staticmethod
    def bytes(inner: Inner) -> int:
        """The memory that the sums take."""
        return 2 * 8 * (inner.count * inner.size + 1) ** 2

    def add(self, calibration: Calibration, first: int, activations: Tensor) -> None:
        """Take in what the projection took in, (R, C, H, W), for the triples from `first` on."""
        weights = band_sample_weights(calibration)
        for held_out, band, inputs, targets in samples_of(calibration, first, activations, activations[:, :0]):
            part = self.held_out if held_out else self.train
            part.add(inputs, targets, 1, weights[band])


@contextmanager
def collecting(unet: nn.Module, sums: Mapping[str, InnerSums], calibration: Calibration, first: int) -> Iterator[None]:
    """While a forward pass on the triples from `first` on is made, add up the inner activations at some paths."""
    handles = []
    for path, here in sums.items():
        module = unet.get_submodule(path)
        inner = inner_of(module)
        assert inner is not None

        def add(_: nn.Module, arguments: tuple[Tensor, ...], here: InnerSums = here) -> None:
            here.add(calibration, first, _as_image(arguments[0]).float())

        handles.append(module.get_submodule(inner.projection).register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_image(activations: Tensor) -> Tensor:
    """(R, C, H, W) as it is, and tokens (R, T, C) as (R, C, T, 1)."""
    return activations if activations.ndim == 4 else activations.transpose(1, 2)[..., None]


@torch.no_grad()
def narrowed_state(
    module: nn.Module, share: float, sums: InnerSums, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that narrowing to a share brings along, chosen and fitted so that the module's output changes least.

    Structures go one after the other, each time those whose going costs the projection's output least when what stays
    makes up for it: the structured form of Optimal Brain Surgeon (ZipLM, Kurtic et al., 2302.04089). The projection is
    then solved anew from what stays, by ridge regression towards its old weights. With a known `importance` (count,)
    those stay that matter most. Raises AsdmError for activations that are no numbers.
    """
    inner = inner_of(module)
    assert inner is not None
    check_finite([sums.train, sums.held_out])
    projection: Any = module.get_submodule(inner.projection)
    device = sums.train.device
    weight = projection.weight.detach().to(device, torch.float64)
    taps = weight.flatten(2) if weight.ndim == 4 else weight[..., None]
    rows = taps.permute(1, 0, 2).flatten(1)  # (channels, outputs x taps)
    # Zero padding has no constants: near the border a larger kernel could not make up for one.
    shifts = taps.shape[2] == 1
    if importance is None:
        structures = choose_structures(sums.train.plus(sums.held_out), rows, inner, inner.kept(share), shifts)
    else:
        structures = importance.topk(inner.kept(share)).indices.sort().values.cpu()
    keep = inner.channels(structures).to(device)
    parts = [part.onto(keep, rows, constant=shifts) for part in (sums.train, sums.held_out)]
    towards = torch.cat([rows[keep], rows.new_zeros(1, rows.shape[1])])
    solved = solve_at_best_ridge([parts[0]], [parts[1]], [slice(0, rows.shape[1])], towards)[0]
    twin = narrowed(module, inner, structures)
    state = {name: twin.state_dict()[name] for name in own_names(twin, inner)}
    outputs, kernel = len(weight), weight.shape[2:]
    new = solved[:-1].reshape(len(keep), outputs, -1).transpose(0, 1).reshape(outputs, len(keep), *kernel)
    shift = solved[-1].reshape(outputs, -1).sum(1)
    name = inner.projection
    state[f"{name}.weight"] = new.to(projection.weight)
    if projection.bias is not None:
        state[f"{name}.bias"] = (projection.bias.detach().to(shift) + shift).to(projection.bias)
    return state


def taylor_importance(unet: nn.Module, paths: Sequence[str], calibration: Calibration) -> dict[str, Tensor]:
    """How much each structure of the modules at some paths matters to the guided prediction, (count,) in fp64.

    The squared first-order change of the prediction when a structure is set to zero, E (vᵀ J a)² with random signs v:
    the Gauss-Newton form of Taylor importance (Molchanov et al., 1906.10771). The damage's own gradient is zero at the
    teacher, where the damage has its minimum.
    """
    inner = {path: inner_of(unet.get_submodule(path)) for path in paths}
    found = {path: torch.zeros(i.count, dtype=torch.float64) for path, i in inner.items() if i is not None}
    steps, generator = steps_of(unet), torch.Generator().manual_seed(0)
    for first, last in chunks_of(calibration):
        part, kept = calibration.part(first, last), dict[str, Tensor]()
        handles = []
        for path, here in inner.items():
            assert here is not None

            def keep(
                _: nn.Module, arguments: tuple[Tensor, ...], path: str = path, kept: dict[str, Tensor] = kept
            ) -> None:
                kept[path] = arguments[0]

            module = unet.get_submodule(path).get_submodule(here.projection)
            handles.append(module.register_forward_pre_hook(keep))
        samples, timesteps, texts = part.rows()
        with torch.enable_grad():
            prediction = part.guided(finish(steps, start(unet, samples.requires_grad_(), timesteps, texts)))
            signs = torch.randint(0, 2, prediction.shape, generator=generator).to(prediction) * 2 - 1
            weights = torch.tensor(calibration.band_weights)[calibration.bands[first:last]].sqrt().to(prediction)
            probe = (signs * prediction * weights[:, None, None, None]).sum()
            gradients = torch.autograd.grad(probe, [kept[path] for path in found])
        for handle in handles:
            handle.remove()
        for path, gradient in zip(list(found), gradients, strict=True):
            here = inner[path]
            assert here is not None
            change = (_as_image(kept[path].detach()) * _as_image(gradient)).double().sum((2, 3))  # (R, channels)
            by_structure = change.reshape(len(part), -1, here.count, here.size).sum((1, 3))
            found[path] += by_structure.square().sum(0).cpu()
    return found


def choose_structures(sums: NormalEquations, rows: Tensor, inner: Inner, count: int, shifts: bool) -> Tensor:
    """The structures to keep, (count,), ascending. `rows` are the projection's weights, (channels, outputs).

    `shifts` says that the projection's bias takes over what is constant, which then costs nothing to lose.
    """
    gram = sums.gram / max(sums.samples, 1e-30)
    mean = gram[:-1, -1]
    spread = gram[:-1, :-1] - torch.outer(mean, mean) if shifts else gram[:-1, :-1]
    ridge = CHOICE_RIDGE * spread.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(spread + ridge * torch.eye(len(spread), dtype=spread.dtype, device=spread.device))
    rows = rows.clone()
    left = torch.arange(inner.count, device=rows.device)
    channels = torch.arange(inner.count * inner.size, device=rows.device).reshape(inner.count, inner.size)
    while len(left) > count:
        blocks = channels[left]
        costs = _going_costs(inverse, rows, blocks)
        going = min(len(left) - count, max(1, inner.count // ROUNDS))
        order = costs.argsort()
        gone = blocks[order[:going]].flatten()
        left = left[order[going:].sort().values]
        pull = torch.linalg.solve(inverse[gone][:, gone], torch.cat([inverse[gone], rows[gone]], dim=1))
        rows = rows - inverse[:, gone] @ pull[:, len(inverse) :]
        inverse = inverse - inverse[:, gone] @ pull[:, : len(inverse)]
    return left.cpu()


def _going_costs(inverse: Tensor, rows: Tensor, blocks: Tensor) -> Tensor:
    """What each block of channels, (blocks, size), going alone costs: tr(Wᵀ (H⁻¹ at the block)⁻¹ W)."""
    corners = inverse[blocks[:, :, None], blocks[:, None, :]]
    theirs = rows[blocks]
    costs: Tensor = (theirs * torch.linalg.solve(corners, theirs)).sum((1, 2))
    return costs
