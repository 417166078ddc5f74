"""Feature pairs: where the student is compared with its teacher, derived from the plan that cut it.

Three ways. `blocks`, BK-SDM's: the ends of the blocks, the mid block never. `borders`: the input of every unit that
stays should be what it was in the teacher, so the output before it is compared with the teacher's there.
`self-attention`, KOALA's: the self-attentions that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from diffusers import UNet2DConditionModel

from asdm_compress.assembly.plan import Plan, place
from asdm_compress.assembly.stock import fold_into_config
from asdm_compress.assembly.surgery import specify
from asdm_compress.core.distillation import Features, Pair
from asdm_compress.core.errors import AsdmError
from asdm_compress.models.sites import find_sites
from asdm_compress.models.slots import DiscardSkip, IdentityResnet, IdentityTransformer
from asdm_compress.models.walk import Step, steps_of

_EMPTY: Final = (IdentityResnet, IdentityTransformer, DiscardSkip)


@dataclass(frozen=True, slots=True)
class FeaturePair:
    """Paths of the two modules whose outputs are compared."""

    student: str
    teacher: str

    def __str__(self) -> str:
        return self.student if self.student == self.teacher else f"{self.student} ← {self.teacher}"


def check_student(student: UNet2DConditionModel, teacher: UNet2DConditionModel, plan: Plan) -> None:
    """Raise AsdmError unless the student has just the tensors that the plan makes of the teacher's."""
    spec = specify(teacher, plan)
    expected = {*spec.weight_map, *spec.slot_map}
    found = set(student.state_dict())
    if found != expected:
        first = sorted(found ^ expected)[0]
        raise AsdmError(
            f"the student is not what its recipe makes of this teacher: {len(found ^ expected)} tensors differ, the "
            f"first is {first}",
            "Give the recipe.yaml that the student was made by, and its own teacher with --teacher.",
        )


def find_pairs(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, plan: Plan, kind: Features
) -> tuple[FeaturePair, ...]:
    """The pairs of a plan, in the order in which they run; the two UNets may be on the meta device.

    No module of the student is in two pairs. Raises AsdmError where the plan leaves none.
    """
    name_in_teacher = fold_into_config(teacher, place(teacher, plan)).teacher_key
    finders = {"blocks": _blocks, "borders": _borders, "self-attention": _self_attentions}
    pairs = finders[kind](student, teacher, name_in_teacher)
    if not pairs:
        raise AsdmError(f"the plan leaves no features of the kind {kind} to compare", "Choose others with --features.")
    return pairs


def given_pairs(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, pairs: Sequence[Pair]
) -> tuple[FeaturePair, ...]:
    """The pairs that a recipe names; raises AsdmError for a module that is not there."""
    for who, unet, paths in (
        ("student", student, [pair.student for pair in pairs]),
        ("teacher", teacher, [pair.teacher for pair in pairs]),
    ):
        there = {path for path, _ in unet.named_modules()}
        missing = [path for path in paths if path not in there]
        if missing:
            raise AsdmError(
                f"the recipe compares features of {missing[0]}, which the {who} does not have",
                "Mend the pairs in its distillation section, or take them out: they are then derived from the plan.",
            )
    return tuple(FeaturePair(pair.student, pair.teacher) for pair in pairs)


def computing_steps(unet: UNet2DConditionModel) -> list[Step]:
    """The units that do anything: dropped ones in a student hand on what they get."""
    return [step for step in steps_of(unet) if not isinstance(step.modules[0], _EMPTY)]


def _blocks(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, name: Callable[[str], str]
) -> tuple[FeaturePair, ...]:
    ends = {_block(step.path): step for step in computing_steps(student)}
    theirs: dict[str, list[Step]] = {}
    for step in steps_of(teacher):
        theirs.setdefault(_block(step.path), []).append(step)
    pairs = []
    for block, end in ends.items():
        if not block.startswith(("down_blocks", "up_blocks")):
            continue
        steps = theirs[name(block)]
        # Of a block whose sampler is gone with the level below it, the layers alone are compared.
        target = [step for step in steps if _is_sampler(end) or not _is_sampler(step)][-1]
        cut_off = _is_sampler(steps[-1]) and not _is_sampler(end)
        projected = cut_off and all(hasattr(s.modules[0], "proj_out") for s in (end, target))
        suffix = ".proj_out" if projected else ""  # as BK-SDM's tiny students have it
        pairs.append(FeaturePair(end.path + suffix, target.path + suffix))
    return tuple(pairs)


def _borders(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, name: Callable[[str], str]
) -> tuple[FeaturePair, ...]:
    theirs = [step.path for step in steps_of(teacher)]
    before = dict(zip(theirs[1:], theirs, strict=False))
    steps = computing_steps(student)
    pairs = []
    for now, following in pairwise(steps[1:]):  # the stem has nothing of its own to learn
        target = before[name(following.path)]
        if _resolution(now.path, steps) == _resolution(target, steps_of(teacher)):
            pairs.append(FeaturePair(now.path, target))
    return tuple(pairs)


def _self_attentions(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, name: Callable[[str], str]
) -> tuple[FeaturePair, ...]:
    theirs = {site.path for site in find_sites(teacher) if site.kind == "self-attention"}
    pairs = [
        FeaturePair(path, name(path))
        for step in computing_steps(student)
        for path, module in ((f"{step.path}.{p}", m) for p, m in step.modules[0].named_modules())
        if path.endswith(".attn1") and module is not None and name(path) in theirs
    ]
    return tuple(pairs)


def _is_sampler(step: Step) -> bool:
    return step.kind in ("downsampler", "upsampler")


def _block(path: str) -> str:
    parts = 2 if path.startswith(("down_blocks", "up_blocks")) else 1
    return ".".join(path.split(".")[:parts])


def _resolution(path: str, steps: Sequence[Step]) -> int:
    """By how many halvings the output of a unit is smaller than the input."""
    level = 0
    for step in steps:
        level += (step.kind == "downsampler") - (step.kind == "upsampler")
        if step.path == path:
            return level
    raise AsdmError(f"there is no unit {path}")
