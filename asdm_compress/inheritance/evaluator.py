"""What all runs on one UNet share: its graph and places, its programs, and their compiled forms. No features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm_compress.inheritance.actions import Action, correction_sources, features_of, graph_for
from asdm_compress.inheritance.guards import check_nothing_left_out
from asdm_compress.inheritance.members import member_name, member_of
from asdm_compress.inheritance.passes import NOTHING_GIVEN, Given, needs_moment, plain_moment, run_program
from asdm_compress.inheritance.places import find_places
from asdm_compress.inheritance.program import Program
from asdm_compress.inheritance.run_plan import Anatomy, Kept, RunPlan, needed_from, plan_run
from asdm_compress.inheritance.timeline import Timeline
from asdm_compress.models.call import UNetCall

_GRAPHED: Final = ("reduce-overhead", "max-autotune")  # modes of torch.compile
KEPT_PLANS: Final = 8  # of the last kinds of runs
Pass = Callable[[UNetCall, Given], tuple[Tensor, tuple[Tensor, ...]]]


class Evaluator:
    """Plans runs on a UNet and evaluates it under programs.

    `compile_options` are those of `torch.compile`, with which every program is compiled as one static graph; None runs
    eagerly. Where the UNet's modules have been replaced since, it notices and starts anew.
    """

    def __init__(self, unet: UNet2DConditionModel, compile_options: Mapping[str, Any] | None = None) -> None:
        self.unet = unet
        self.compile_options = compile_options
        self._modules: tuple[nn.Module, ...] = ()
        self._plans: OrderedDict[tuple[object, ...], RunPlan] = OrderedDict()
        self._compiled: dict[tuple[object, ...], Pass] = {}
        self._members: dict[str, Evaluator] = {}

    def __reduce__(self) -> Any:
        # A copy is for a copy of the UNet, whose modules are others.
        return Evaluator, (self.unet, self.compile_options)

    def of(self, member: str | None) -> Evaluator:
        """The evaluator of a member of a UNet that has several, by name; this one where None is asked for.

        Raises AsdmError for a member that the UNet does not have.
        """
        name = member_name(self.unet, member)
        if name is None:
            return self
        found = self._members.get(name)
        if found is None:
            found = self._members[name] = Evaluator(member_of(self.unet, name), self.compile_options)
        return found

    def check(self, actions: Sequence[Action]) -> None:
        """Raise AsdmError for actions that the UNet does not have."""
        distinct = dict.fromkeys(actions)
        for member in dict.fromkeys(action.member for action in distinct):
            places = find_places(self.of(member).unet)
            for action in distinct:
                if action.member == member:
                    features_of(action, places)
                    correction_sources(action, places)

    def plan(self, actions: Sequence[Action], timeline: Timeline, guided: bool) -> RunPlan:
        """The plan of a run; raises AsdmError for actions that the UNet does not have."""
        modules = tuple(self.unet.modules())
        if len(modules) != len(self._modules) or any(a is not b for a, b in zip(modules, self._modules, strict=True)):
            self._modules, self._compiled, self._plans, self._members = modules, {}, OrderedDict(), {}
        actions = [replace(action, member=member_name(self.unet, action.member)) for action in actions]
        key = (tuple(actions), timeline, guided)
        plan = self._plans.get(key)
        if plan is None:
            plan = plan_run(self._anatomies(actions), actions, timeline, guided)
            self._plans[key] = plan
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        self._check(plan)
        return plan

    def plan_forks(
        self, actions: Sequence[Action], forks: Collection[tuple[int, Action]], timeline: Timeline, guided: bool
    ) -> tuple[RunPlan, dict[tuple[int, Action], RunPlan]]:
        """The plan of a run that can be forked before any of its steps (see `Run.branch`), and those of its forks.

        A fork (step, action) takes this step by another action and the others as the run does.
        """
        named = [replace(action, member=member_name(self.unet, action.member)) for action in actions]
        own = {fork: replace(fork[1], member=member_name(self.unet, fork[1].member)) for fork in forks}
        anatomies = self._anatomies([*named, *own.values()])
        split = any(action.guidance is not None for action in (*named, *own.values()))
        found: dict[tuple[int, Action], RunPlan] = {}
        also: dict[Kept, int] = {}
        for fork, action in own.items():
            step = fork[0]
            plan = plan_run(anatomies, [*named[:step], action, *named[step + 1 :]], timeline, guided, split)
            found[fork] = plan
            for kept in needed_from(plan, step):
                also[kept] = max(step, also.get(kept, step))
        whole = plan_run(anatomies, named, timeline, guided, split, also)
        for plan in (whole, *found.values()):
            self._check(plan)
        return whole, found

    def _check(self, plan: RunPlan) -> None:
        """Raise AsdmError where parts of a UNet are to run that hooks of others would be left out of."""
        by_parts = [step for step in plan.steps if step.program.computes and not step.program.is_plain]
        for member in dict.fromkeys(step.action.member for step in by_parts):
            check_nothing_left_out(self.of(member).unet, plan.graphs[member].opened)

    def _anatomies(self, actions: Sequence[Action]) -> dict[str | None, Anatomy]:
        found = {}
        for member in dict.fromkeys(action.member for action in actions):
            unet = self.of(member).unet
            places = find_places(unet)
            graph = graph_for(unet, places, [action for action in actions if action.member == member])
            found[member] = Anatomy(graph, places)
        return found

    def evaluate(
        self, program: Program, call: UNetCall, given: Given = NOTHING_GIVEN, timestep: float | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The prediction and the recorded tensors. `timestep` is the call's own as a number, if that is known."""
        if self.compile_options is not None:
            prediction, recorded = self._compiled_pass(program)(call, given)
            if _reuses_memory(self.compile_options):
                recorded = tuple(tensor.clone() for tensor in recorded)
            return prediction, recorded
        moment = plain_moment(call, timestep) if timestep is not None or not needs_moment(program) else None
        return run_program(self.unet, program, call, given, moment)

    def _compiled_pass(self, program: Program) -> Pass:
        found = self._compiled.get(program.key)
        if found is None:
            unet = self.unet

            def one_pass(call: UNetCall, given: Given) -> tuple[Tensor, tuple[Tensor, ...]]:
                return run_program(unet, program, call, given)

            # torch keeps compiled forms by code object, and only a few of each: every program gets one of its own.
            one_pass.__code__ = one_pass.__code__.replace(co_name=f"pass_{len(self._compiled)}")
            found = self._compiled[program.key] = torch.compile(one_pass, **(self.compile_options or {}))
        return found


def _reuses_memory(options: Mapping[str, Any]) -> bool:
    """Whether what a compiled pass gives lies where the next one will put its own (CUDA graphs)."""
    return options.get("mode") in _GRAPHED or bool((options.get("options") or {}).get("triton.cudagraphs"))
