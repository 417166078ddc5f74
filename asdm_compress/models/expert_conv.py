"""ME-CondConv: a convolution whose kernel is a mixture of experts, routed by the timestep, by the features, or by both.

y = (Σ_e α_e(r) · W_e) ∗ x + Σ_e α_e(r) · b_e, in the spirit of A-SDM's multi-expert conditional convolution
(2406.00210). Feature routing is CondConv's (Yang et al., 1904.04971); a softmax with temperature is Dynamic
Convolution's (Chen et al., CVPR 2020). A timestep is the same for a whole batch in a sampling run, so that there the
layer costs one plain convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asdm_compress.core.edits import ConvSpec
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.graphs import in_a_graph

TRAIN_TIMESTEPS: Final = 1000.0  # routers see timesteps as shares of this
# A weight this near to one picks its expert as it is: the rest would change less than fp32 rounding does.
ONE_HOT_TOLERANCE: Final = 1e-6
START_SHARPNESS: Final = 1000.0  # a step 0.02 from a boundary (half of one of 25) is one-hot to 2e-9
CACHED_MOMENTS: Final = 64

_Kept = int | Tensor | tuple[list[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Moment:
    """When a forward pass happens: `timesteps` (B,), whether they are known to be equal, and their value if read."""

    timesteps: Tensor
    uniform: bool = False
    value: float | None = None

    @staticmethod
    def of(timestep: Tensor | float, batch: int, device: torch.device) -> Moment:
        """The moment of a call with a timestep that is a number, a scalar, or (B,).

        Outside of training and compiling the value is read, which on a GPU waits for it, and cannot be done while a
        CUDA graph is captured.
        """
        given = torch.as_tensor(timestep, device=device).reshape(-1)
        reads = device.type != "meta" and not torch.is_grad_enabled() and not in_a_graph(device)
        uniform = len(given) == 1 or (reads and bool((given == given[0]).all()))
        return Moment(given.expand(batch), uniform, float(given[0]) if uniform and reads else None)


# The moment of the forward pass under way, for layers inside blocks that do not hand it on.
_moment_now: ContextVar[Moment | None] = ContextVar("moment", default=None)


@contextmanager
def happening_at(moment: Moment) -> Iterator[None]:
    """While a forward pass is made, tell every `MultiExpertConv2d` in it when it happens."""
    token = _moment_now.set(moment)
    try:
        yield
    finally:
        _moment_now.reset(token)


class TimestepRouter(nn.Module):
    """Logits of E experts, of which each owns an interval of the time axis; boundaries and sharpness can be trained.

    With boundaries b_1 > b_2 > … (shares of the 1000 training steps, from noise to image), logit_e = s · Σ_{j≤e} (b_j -
    τ): expert e wins between b_e and b_{e+1}, and s says how suddenly.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.boundaries = nn.Parameter(1 - torch.arange(1, experts) / experts)
        self.sharpness = nn.Parameter(torch.tensor(START_SHARPNESS))

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) to logits (B, E), in fp32."""
        share = timesteps.float() / TRAIN_TIMESTEPS
        steps = self.sharpness.float() * (self.boundaries.float() - share[:, None])
        return F.pad(steps.cumsum(1), (1, 0))


class ExpertKernels(nn.Module):
    """The kernels of all experts, one parameter per factor, named by their numbers.

    A `ParameterList` cannot be called, and so not be told by hooks that keep weights elsewhere until a module runs
    (accelerate's offloading) to bring its own.
    """

    def __init__(self, kernels: Sequence[nn.Parameter]) -> None:
        super().__init__()
        for number, kernel in enumerate(kernels):
            self.register_parameter(str(number), kernel)

    def forward(self) -> list[Tensor]:
        """The parameters."""
        return [kernel for kernel in self._parameters.values() if kernel is not None]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.forward())

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, number: int) -> Tensor:
        return self.forward()[number]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertKernels:
        """As any module, but `fn` sees the experts' kernels in one row, four-dimensional as a convolution's: only so
        can they be brought into channels-last format."""

        def in_one_row(kernel: Tensor) -> Tensor:
            changed = fn(kernel.flatten(0, 1))
            return changed.reshape(*kernel.shape[:2], *changed.shape[1:])

        return super()._apply(in_one_row, recurse)  # type: ignore[no-any-return, no-untyped-call]


class MultiExpertConv2d(nn.Module):
    """The ME-CondConv layer, (B, C_in, H, W) to (B, C_out, H, W); see the module's own words for its formula.

    Parameters per factor f (one for a dense kernel, two for separable and low-rank ones): `weights.f` (E, C_out, C_in /
    groups, k, k); and `bias` (E, C_out). All start at zero, so that a residual slot starts as if it were empty.
    """

    def __init__(self, in_channels: int, out_channels: int, spec: ConvSpec) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.spec = in_channels, out_channels, spec
        self.groups: tuple[int, ...]
        shapes, self.groups = _factors(in_channels, out_channels, spec)
        self.weights = ExpertKernels([nn.Parameter(torch.zeros(spec.experts, *shape)) for shape in shapes])
        self.bias = nn.Parameter(torch.zeros(spec.experts, out_channels))
        self.time_router = TimestepRouter(spec.experts) if spec.routing in ("timestep", "both") else None
        self.feature_router = nn.Linear(in_channels, spec.experts) if spec.routing in ("feature", "both") else None
        self._mixed = _MomentCache()

    def forward(self, hidden_states: Tensor, moment: Moment | None = None) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W). Raises AsdmError where the timestep is needed and not given.

        It may also be given by `happening_at`.
        """
        if self.spec.experts == 1:
            return self._convolve(hidden_states, [weight[0] for weight in self.weights()], self.bias[0])
        if self.time_router is not None and moment is None and not torch.compiler.is_compiling():
            moment = _moment_now.get()
        if self.time_router is not None and moment is None:
            raise AsdmError("this convolution is routed by the timestep, which it was not given")
        if self.spec.routing == "timestep":
            assert moment is not None
            if moment.uniform:
                return self._convolve(hidden_states, *self._kernels_at(moment))
            if not torch.is_grad_enabled() and not in_a_graph(hidden_states.device):
                return self._convolve_by_moment(hidden_states, moment)
        return self._convolve_each(hidden_states, self.route(hidden_states, moment))

    def route(self, hidden_states: Tensor | None, moment: Moment | None) -> Tensor:
        """The experts' shares (B, E), in fp32."""
        logits: Tensor | float = 0.0
        if self.time_router is not None:
            assert moment is not None
            logits = self.time_router(moment.timesteps)
        if self.feature_router is not None:
            assert hidden_states is not None
            pooled = hidden_states.mean(dim=(2, 3))
            logits = logits + self.feature_router(pooled.to(self.feature_router.weight.dtype)).float()
        assert isinstance(logits, Tensor)
        if self.spec.mixing == "sigmoid":
            return logits.sigmoid()
        return (logits / self.spec.temperature).softmax(dim=1)

    def kernels_for(self, share: Tensor) -> tuple[list[Tensor], Tensor]:
        """The kernels and the bias of one mixture; `share` is (E,)."""
        share = share.to(self.bias.dtype)
        mixed = [_lying_as(weight[0], torch.tensordot(share, weight, dims=1)) for weight in self.weights()]
        return mixed, torch.mv(self.bias.T, share)

    def train(self, mode: bool = True) -> MultiExpertConv2d:
        """As any module; kept kernels are forgotten, since weights may change in ways that torch does not count."""
        self._mixed.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> MultiExpertConv2d:
        self._mixed.clear()  # moved or converted weights must not keep the old ones alive
        return super()._apply(*args, **kwargs)  # type: ignore[no-any-return, no-untyped-call]

    def _kernels_at(self, moment: Moment) -> tuple[list[Tensor], Tensor]:
        """The kernels of one moment; kept between calls where nothing can have changed and no gradient is wanted."""
        if self.bias.is_meta:  # only shapes are asked for: those of a moment whose kernels are known
            return [weight[0] for weight in self.weights()], self.bias[0]
        first = Moment(moment.timesteps[:1])
        device = self.bias.device.type
        if moment.value is None or torch.is_autocast_enabled(device) or self.bias.is_inference():
            return self.kernels_for(self.route(None, first)[0])
        kept = self._mixed.get(moment.value, tuple((p.data_ptr(), p._version) for p in self.parameters()))
        if kept is None:
            kept = self._answer(self.route(None, first)[0])
            self._mixed.put(moment.value, kept)
        if isinstance(kept, int):
            return [weight[kept] for weight in self.weights()], self.bias[kept]
        return self.kernels_for(kept) if isinstance(kept, Tensor) else kept

    def _answer(self, share: Tensor) -> _Kept:
        """What is kept of a moment with these shares (E,): the one expert that answers, or their mixture."""
        if self.spec.mixing == "softmax":
            best = int(share.argmax())
            if abs(float(share[best]) - 1) < ONE_HOT_TOLERANCE:
                return best
        # A GPU mixes kernels in no time, and has no memory for those of dozens of moments.
        return self.kernels_for(share) if share.device.type == "cpu" else share

    def _convolve(self, hidden: Tensor, kernels: Sequence[Tensor], bias: Tensor) -> Tensor:
        for i, (kernel, groups) in enumerate(zip(kernels, self.groups, strict=True)):
            last = bias if i == len(kernels) - 1 else None
            hidden = F.conv2d(hidden, kernel, last, padding=kernel.shape[-1] // 2, groups=groups)
        return hidden

    def _convolve_by_moment(self, hidden: Tensor, moment: Moment) -> Tensor:
        """The images of each timestep together."""
        outputs, rows = [], []
        for value in sorted(set(moment.timesteps.tolist())):
            rows.append((moment.timesteps == value).nonzero()[:, 0])
            here = Moment(moment.timesteps[rows[-1]], uniform=True, value=float(value))
            outputs.append(self._convolve(hidden[rows[-1]], *self._kernels_at(here)))
        return torch.cat(outputs)[torch.cat(rows).argsort()]

    def _convolve_each(self, hidden: Tensor, shares: Tensor) -> Tensor:
        """Every image with its own kernel: one grouped convolution for the batch."""
        batch = hidden.shape[0]
        shares = shares.to(self.bias.dtype)
        if isinstance(batch, torch.SymInt):  # exported for any batch, which no number of groups can be
            return self._convolve_taps(hidden, shares)
        for i, (weight, groups) in enumerate(zip(self.weights(), self.groups, strict=True)):
            mixed = torch.tensordot(shares, weight, dims=1)  # (B, C_out, C_in / groups, k, k)
            bias = (shares @ self.bias).flatten() if i == len(self.groups) - 1 else None
            stacked = hidden.reshape(1, -1, *hidden.shape[2:])
            out = F.conv2d(stacked, mixed.flatten(0, 1), bias, padding=mixed.shape[-1] // 2, groups=batch * groups)
            hidden = out.reshape(batch, -1, *out.shape[2:])
        return hidden

    def _convolve_taps(self, hidden: Tensor, shares: Tensor) -> Tensor:
        """Every image with its own kernel, as one product per tap of the kernel."""
        height, width = hidden.shape[2:]
        for weight, groups in zip(self.weights(), self.groups, strict=True):
            mixed = torch.tensordot(shares, weight, dims=1)  # (B, C_out, C_in / groups, k, k)
            k = mixed.shape[-1]
            padded = F.pad(hidden, (k // 2,) * 4)
            taps = []
            for a in range(k):
                for b in range(k):
                    here = padded[:, :, a : a + height, b : b + width]
                    tap = mixed[..., a, b]
                    # Groups are one, or as many as channels.
                    taps.append(torch.einsum("boi,bihw->bohw", tap, here) if groups == 1 else tap[..., None] * here)
            hidden = torch.stack(taps).sum(0)
        return hidden + (shares @ self.bias)[:, :, None, None]

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.in_channels}, {self.out_channels}, {self.spec.name}"


class _MomentCache:
    """For the last few moments the expert that answers, the mixed kernels, or what mixes them. Not a part of the
    weights: neither saved nor copied, and empty as soon as the weights are others."""

    def __init__(self) -> None:
        self._weights: Any = None
        self._kept: OrderedDict[float, _Kept] = OrderedDict()

    def clear(self) -> None:
        self._kept = OrderedDict()

    def get(self, moment: float, weights: Any) -> _Kept | None:
        if weights != self._weights:
            self._weights, self._kept = weights, OrderedDict()
        return self._kept.get(moment)

    def put(self, moment: float, kernels: _Kept) -> None:
        kept = self._kept
        kept[moment] = kernels
        while len(kept) > CACHED_MOMENTS:
            kept.popitem(last=False)

    def __deepcopy__(self, memo: Any) -> _MomentCache:
        return _MomentCache()

    def __reduce__(self) -> Any:
        return _MomentCache, ()


def _lying_as(example: Tensor, kernel: Tensor) -> Tensor:
    """A mixed kernel in the memory format of one expert's: in another, every convolution with it would bring it along
    into its own."""
    lies = torch.channels_last if example.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return kernel.contiguous(memory_format=lies)


def _factors(inputs: int, outputs: int, spec: ConvSpec) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The shapes (C_out, C_in / groups, k, k) and groups of the convolutions that a spec is made of."""
    k = spec.kernel
    if spec.separable:
        return [(inputs, 1, k, k), (outputs, inputs, 1, 1)], (inputs, 1)
    if spec.rank:
        return [(spec.rank, inputs, k, k), (outputs, spec.rank, 1, 1)], (1, 1)
    return [(outputs, inputs, k, k)], (1,)
