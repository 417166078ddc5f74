"""The switched UNet: a model with several members, of which every step of a sampling run uses the one that is its."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale, convert_unet_state_dict_to_peft
from torch import Tensor, nn

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.actions import Action
from asdm_compress.inheritance.carrying import CarriedOver
from asdm_compress.inheritance.evaluator import Evaluator
from asdm_compress.inheritance.members import body_prediction, member_of
from asdm_compress.inheritance.run import Run
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.assembled_unet import AssembledUNet2DConditionModel
from asdm_compress.models.call import UNetCall
from asdm_compress.models.signatures import with_parameters_of
from asdm_compress.models.walk import steps_of
from asdm_compress.switching.building import as_list, build, check_exchangeable, check_plain, plain_config
from asdm_compress.switching.places import InRun, OpenRuns, RunUnderWay, is_run, place_of
from asdm_compress.switching.schedules import SwitchingSchedule
from asdm_compress.switching.sharing import Shared, as_prefixes, counterpart, find_shared, of_prefixes
from asdm_compress.switching.ties import Ties

_OTHERS: Final = "others"  # where the members lie that are not the body
_ADAPTED: Final = re.compile(r"^(?P<layer>.+?)(?P<rest>\.(?:lora|alpha|lokr_|dora_scale).*)$")


class SwitchedUNet2DConditionModel(AssembledUNet2DConditionModel):
    """A UNet whose own body is its first member, with other members beside it that share every equal tensor with it.

    `members` lists them: the body's `name`, and for each other one its `name`, `config` (where it differs from the
    body's), `edits`, and what it has in common with those before it (`shared` and `units`, see `sharing`). `switching`
    is the schedule (see `schedules`). Which step it is is read off the timestep: of a pipeline's, which run and which
    step of it; of any other, how noisy its sample is. Which rows are the unconditional ones, for steps that reuse the
    guidance's difference, is read off the samples, which the two branches have in common. It loads, moves, converts and
    saves as one model, a LoRA is put on every member that has the layer, and runs of other pipelines and threads do not
    meet.
    """

    # As of the class of assembled UNets.
    __module__ = "asdm_compress"

    @register_to_config  # type: ignore[untyped-decorator]
    @with_parameters_of(AssembledUNet2DConditionModel, "members", "switching")
    def __init__(
        self,
        *args: Any,
        members: Sequence[Mapping[str, Any]] | None = None,
        switching: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not members or switching is None:
            raise AsdmError("a switched UNet needs members and a schedule", "Make one with `asdm-compress switch`.")
        self._names = tuple(str(entry["name"]) for entry in members)
        if len(set(self._names)) != len(self._names) or not all(self._names):
            raise AsdmError(f"members have different names, and these are {', '.join(self._names)}")
        body = plain_config(self)
        self.others = nn.ModuleList([build({**body, **e["config"]}, e.get("edits") or {}) for e in members[1:]])
        shared: dict[str, str] = {}
        self._own_layers: dict[str, list[str]] = {}
        for number, entry in enumerate(members[1:]):
            names = [name for name, _ in self.others[number].named_parameters()]
            of_member = of_prefixes(names, entry["shared"])
            shared |= {f"{_OTHERS}.{number}.{name}": other for name, other in of_member.items()}
            other: Any = self.others[number]
            levels = (len(other.up_blocks), len(self.up_blocks))
            for layer in dict.fromkeys(name.rpartition(".")[0] for name in names if name not in of_member):
                own = self._own_layers.setdefault(counterpart(layer, entry.get("units") or {}, *levels), [])
                own.append(f"{_OTHERS}.{number}.{layer}")
        self._ties = Ties.of(self, shared)
        self._ties.tie()
        self._told: set[str] = set()
        self._runs = OpenRuns()
        self._evaluator: Evaluator | None = None
        self.schedule = SwitchingSchedule.of_config(switching)
        for action in self.schedule.actions:
            member_of(self, action.member)

    @staticmethod
    def of(members: Mapping[str, UNet2DConditionModel], schedule: SwitchingSchedule) -> SwitchedUNet2DConditionModel:
        """A switched UNet of these members, the first of which is its body; their tensors are taken, not copied.

        Raises AsdmError for members that cannot stand in for one another, and for a schedule that names others.
        """
        (body_name, body), *others = members.items()
        check_plain(body_name, body)
        owners: list[tuple[str, nn.Module]] = [("", body)]
        config = plain_config(body)
        entries: list[dict[str, Any]] = [{"name": body_name}]
        tensors = dict(body.state_dict())
        lent: dict[str, str] = {}
        for number, (name, unet) in enumerate(others):
            check_exchangeable(body_name, body, name, unet)
            shared: Shared = find_shared(unet, owners)
            # What is like another member's may be the body's there too.
            owner_of = {key: lent.get(other, other) for key, other in shared.tensors.items()}
            lent |= {f"{_OTHERS}.{number}.{key}": owner for key, owner in owner_of.items()}
            own = plain_config(unet)
            entries.append(
                {
                    "name": name,
                    "config": {key: value for key, value in own.items() if as_list(value) != as_list(config[key])},
                    "edits": dict(unet.config.get("edits") or {}),
                    "shared": as_prefixes([n for n, _ in unet.named_parameters()], owner_of),
                    "units": dict(shared.units),
                }
            )
            owners.append((f"{_OTHERS}.{number}.", unet))
            tensors |= {f"{_OTHERS}.{number}.{key}": t for key, t in unet.state_dict().items()}
        edits = dict(body.config.get("edits") or {})
        with torch.device("meta"):
            made = SwitchedUNet2DConditionModel(**config, edits=edits, members=entries, switching=schedule.as_config())
        made.load_state_dict({key: tensors[key] for key in made.state_dict()}, strict=True, assign=True)
        made.eval().requires_grad_(False)
        return made  # type: ignore[no-any-return]

    @property
    def member_names(self) -> tuple[str, ...]:
        """The members' names, that of the body first."""
        return self._names

    def member(self, name: str) -> UNet2DConditionModel:
        """Another member than the body; raises AsdmError for the body, which this UNet is itself, and other names."""
        if name not in self._names[1:]:
            have = ", ".join(self._names[1:]) or "no member beside it"
            what = "is this UNet's own body" if name in self._names else "is no member of this UNet"
            raise AsdmError(f"{name!r} {what}", f"It has {have}; `alone` gives any of them as a UNet by itself.")
        found: UNet2DConditionModel = self.others[self._names.index(name) - 1]
        return found

    def alone(self, name: str) -> UNet2DConditionModel:
        """A member, the body too, as a UNet by itself on the same tensors; raises AsdmError for one that is none."""
        found = member_of(self, name)
        if found is not self:
            return found
        with torch.device("meta"):
            body = build(plain_config(self), self.config.get("edits") or {})
        own = {key: tensor for key, tensor in self.state_dict().items() if not key.startswith(f"{_OTHERS}.")}
        body.load_state_dict(own, strict=True, assign=True)
        return body.eval().requires_grad_(False)

    def body_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the body, whatever step it is."""
        return super().forward(*args, **kwargs)

    def actions_at(self, timeline: Timeline) -> tuple[Action, ...]:
        """What the schedule does at each of these evaluations; people are told where it was made for others."""
        actions = self.schedule.actions_at(timeline)
        if not self.schedule.fits(timeline) and len(set(self.schedule.actions)) > 1:
            self._tell(
                f"this UNet's switching schedule was made for {len(self.schedule.actions)} evaluations from timestep "
                f"{self.schedule.timesteps[0]:g} to {self.schedule.timesteps[-1]:g}, and is carried over by noise "
                f"level to {len(timeline)} from {timeline.timesteps[0]:g} to {timeline.timesteps[-1]:g}"
            )
        return actions

    @apply_lora_scale("cross_attention_kwargs")  # type: ignore[untyped-decorator]
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """As the base class, by the member whose step it is."""
        prediction = self._predict(UNetCall.of(sample, timestep, encoder_hidden_states, *args, **kwargs))
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _predict(self, call: UNetCall) -> Tensor:
        """Chooses who computes; which that is no compiler can know, the members themselves can be compiled."""
        self._ties.tie()
        if call.sample.device.type == "meta":
            return body_prediction(self, call.arguments())
        self._check_residuals(call)
        place = place_of(call.timestep)
        if place is not None and self._runs.has_made(place):
            # Guidance branches in calls of their own, or a preview: what one of them keeps is not the other's.
            return self._by_noise(call, "one step's timestep twice")
        opened = None if place is None else self._run_at(place)
        if opened is None:
            return self._by_noise(call, "a timestep that is no part of a sampler's timesteps")
        # Looked for at two calls, since only the pipeline knows: other halves may begin with the same noise, and then a
        # run begins anew. Not at more, since that waits for the device, unless guidance is switched off on the way.
        if opened.run.step < 2 or opened.rows != len(call.sample):
            opened.guided = self.schedule.reuses_guidance and call.has_both_branches
        opened.rows = len(call.sample)
        prediction = opened.run.evaluate(call, opened.guided)
        self._runs.keep(opened)
        return prediction

    def _check_residuals(self, call: UNetCall) -> None:
        """Raise AsdmError for a ControlNet's residuals that a member of the schedule has no places for."""
        if call.down_block_additional_residuals is None or call.mid_block_additional_residual is None:
            return
        for name in dict.fromkeys(action.member for action in self.schedule.actions if not action.skips):
            call.added().check_count(sum(step.pushes_skip for step in steps_of(member_of(self, name))))

    def _run_at(self, place: InRun) -> RunUnderWay | None:
        """The run that a call belongs to; it begins anew where a call is not the one that comes next.

        None where the timestep stands in something else than a sampler's tensor of timesteps.
        """
        opened = self._runs.of(place)
        if opened is not None and opened.next == place.number:
            return opened
        timesteps = [float(t) for t in place.timesteps.tolist()]
        if not is_run(timesteps):
            return None
        timeline = self.schedule.timeline_of(timesteps)
        actions = self.actions_at(timeline)[place.number :]
        if self._evaluator is None:
            self._evaluator = Evaluator(self)

        def plain(call: UNetCall) -> Tensor:
            return body_prediction(self, call.arguments())

        since = timeline.since(place.number)
        return RunUnderWay.at(place, Run(self._evaluator, actions, since, plain=plain))

    def _by_noise(self, call: UNetCall, what: str) -> Tensor:
        """The prediction of a call that stands alone: every row by the member that computes at its noise level."""
        if not self.schedule.is_whole:
            self._tell(f"the UNet was called with {what}: nothing is skipped or inherited there")
        given = torch.as_tensor(call.timestep).reshape(-1).tolist()
        sigmas = self.schedule.timeline_of([float(t) for t in given]).sigmas
        assert sigmas is not None
        names = [self.schedule.nearest(sigma).member for sigma in sigmas]
        if len(set(names)) == 1:
            return self._whole(names[0], call)
        parts: dict[int, Tensor] = {}
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            prediction = self._whole(name, call.rows(torch.tensor(rows, device=call.sample.device)))
            parts |= dict(zip(rows, prediction, strict=True))
        return torch.stack([parts[i] for i in range(len(names))])

    def _whole(self, name: str | None, call: UNetCall) -> Tensor:
        unet = member_of(self, name)
        if unet is self:
            return body_prediction(self, call.arguments())
        return unet(**call.arguments(), return_dict=False)[0]  # type: ignore[no-any-return]

    def _tell(self, notice: str) -> None:
        if notice not in self._told:
            self._told.add(notice)
            warnings.warn(notice, CarriedOver, stacklevel=2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, every tensor once, under its owner's name."""
        found = super().state_dict(*args, **kwargs)
        for name in [name for name in found if self._ties.is_lent(name)]:
            del found[name]
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As the base class, from a state dict that has every tensor once."""
        lent = [name for name in super().state_dict() if self._ties.is_lent(name)]
        owners = {name: self._ties.owner_of(name) for name in lent}
        whole = {**state_dict, **{name: state_dict[other] for name, other in owners.items() if other in state_dict}}
        missing = super().load_state_dict(whole, strict=strict, assign=assign)
        self._ties.tie()
        return missing

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the base class; what members share is one afterwards."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: SwitchedUNet2DConditionModel = loaded[0] if isinstance(loaded, tuple) else loaded
        model._ties.tie()
        return loaded

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the base class, for a LoRA made for the body: also on the layers of other members that stand for its own.

        Layers that a member has in another shape stay without, which people are told. Raises AsdmError for anything
        but tensors; `load_lora_weights` of a pipeline reads files.
        """
        tensors = pretrained_model_name_or_path_or_dict
        if not isinstance(tensors, Mapping):
            raise AsdmError("a switched UNet takes a LoRA's tensors, not its file", "Use pipeline.load_lora_weights.")
        head = f"{prefix}." if prefix else ""
        given = {name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)}
        if given and not any("lora_A" in name or ".lokr_" in name for name in given):
            given = convert_unet_state_dict_to_peft(given)
        spread = self._spread(given)
        alphas = kwargs.get("network_alphas")
        if alphas:
            own = {name.removeprefix(head): value for name, value in alphas.items() if name.startswith(head)}
            kwargs["network_alphas"] = {head + name: value for name, value in self._spread(own).items()}
        named = {head + name: tensor for name, tensor in spread.items()}
        with warnings.catch_warnings():
            # peft remarks that its own rule would have met layers of the same name in members that it does not fit.
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters, an inconsistency")
            super().load_lora_adapter(named, prefix=prefix, hotswap=hotswap, **kwargs)
        self._ties.tie()

    def _spread(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """A LoRA's entries with those for other members' own layers; of layers that do not fit, the body's alone."""
        found = dict(entries)
        unfit = set()
        for name, value in entries.items():
            match = _ADAPTED.match(name)
            for path in self._own_layers.get(match["layer"], ()) if match else ():
                assert match is not None
                if self._takes(path, match["layer"]):
                    found[f"{path}{match['rest']}"] = value
                else:
                    unfit.add(path)
        if unfit:
            self._tell(f"the LoRA does not fit {len(unfit)} layers of other members, such as {min(unfit)}")
        return found

    def _takes(self, path: str, layer: str) -> bool:
        """Whether a member's layer has the shape of the body's."""
        try:
            one, other = (_weight(self.get_submodule(name)) for name in (path, layer))
        except AttributeError:
            return False
        return one is not None and other is not None and one.shape == other.shape

    def apply(self, fn: Callable[[nn.Module], None]) -> SwitchedUNet2DConditionModel:
        """As the base class, once for every module, however many members have it."""
        for module in reversed(list(self.modules())):
            fn(module)
        return self

    def enable_freeu(self, *args: Any, **kwargs: Any) -> None:
        """As the base class, in every member."""
        super().enable_freeu(*args, **kwargs)
        for unet in self.others:
            unet.enable_freeu(*args, **kwargs)  # type: ignore[operator]

    def disable_freeu(self) -> None:
        """As the base class, in every member."""
        super().disable_freeu()
        for unet in self.others:
            unet.disable_freeu()  # type: ignore[operator]

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        raise AsdmError("a switched UNet takes no IP-Adapter", "Use one member by itself.")


def _weight(layer: Any) -> Tensor | None:
    inner = getattr(layer, "base_layer", layer)
    found = getattr(inner, "weight", None)
    return found if isinstance(found, Tensor) else None
