"""Programs: what is left of a UNet's forward pass when some features are given, and nothing that is dead behind them.

A program is static: it depends on what is taken and recorded, not on any tensor. A schedule needs only a few.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from asdm_compress.core.errors import AsdmError
from asdm_compress.inheritance.graph import PREDICTION, Graph, Op
from asdm_compress.inheritance.places import Feature, around_prices


@dataclass(frozen=True, slots=True)
class Program:
    """The operations of one pass in order.

    `taken` are the features that the caller gives, `recorded` those that it gets back beside the prediction, and
    `corrections` the sources, by corrected feature, of which it gives the forecast and the last value too. `dying` are
    the values that nothing needs after each operation.
    """

    ops: tuple[Op, ...]
    taken: tuple[Feature, ...]
    recorded: tuple[Feature, ...]
    corrections: Mapping[Feature, str] = field(default_factory=dict)
    dying: tuple[tuple[str, ...], ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for programs of one graph that are the same."""
        return self.taken, self.recorded, tuple(self.corrections.items())

    @property
    def is_plain(self) -> bool:
        """Whether the UNet's own forward pass tells all of it: at most the prediction is recorded."""
        return not self.taken and all(feature.value == PREDICTION for feature in self.recorded)

    @property
    def computes(self) -> bool:
        """Whether any of the UNet's modules runs at all; a step whose prediction is taken runs none."""
        return any(op.priced or op.modules for op in self.ops)


def program_of(
    graph: Graph,
    taken: Collection[Feature] = (),
    recorded: Collection[Feature] = (),
    corrections: Mapping[Feature, str] | None = None,
) -> Program:
    """The program that takes and records these features, as far as they matter.

    What is taken in vain, because it is dead behind another feature, does not appear in `taken`; what cannot be
    recorded, because it is not computed, not in `recorded`. Raises AsdmError for a feature that the graph does not have
    and for a correction whose source is not computed.
    """
    corrections = corrections or {}
    unknown = [
        f.name
        for f in (*taken, *recorded)
        if f.value not in graph.by_value or (f.over or f.value) not in graph.by_value
    ]
    if unknown:
        raise AsdmError(f"this UNet has no feature {unknown[0]!r}")
    given = {feature.value: feature for feature in taken if feature.over is None}
    restored = {f.value: f for f in taken if f.over is not None and f.value not in given}
    ops = {op.value: _as_taken(graph, op, given, restored, corrections) for op in graph.ops}
    live = _live(ops)
    lost = [source for f, source in corrections.items() if f.value in live and ops[source].kind == "taken"]
    if lost:
        raise AsdmError(f"{lost[0]} is inherited itself, so that no correction can be made from it")
    kept = tuple(f for f in dict.fromkeys(recorded) if is_fresh(f, graph, live, {*given, *restored}))
    extra = [_branch(graph, f) for f in kept if f.over is not None]
    order = [ops[op.value] for op in graph.ops if op.value in live]
    order = list(_with_branches(order, extra))
    needed = tuple(f for f in (*given.values(), *restored.values()) if f.value in live)
    sources = {f: source for f, source in corrections.items() if f in needed}
    return Program(tuple(order), needed, kept, sources, _dying(order, kept))


def is_fresh(feature: Feature, graph: Graph, live: Collection[str], taken: Collection[str]) -> bool:
    """Whether a pass that computes the values `live` but takes `taken` computes this feature."""
    if feature.value not in live or feature.value in taken:
        return False
    return feature.over is None or all(value in live for value in graph.by_value[feature.over].entered)


def _as_taken(
    graph: Graph,
    op: Op,
    given: Mapping[str, Feature],
    restored: Mapping[str, Feature],
    corrections: Mapping[Feature, str],
) -> Op:
    """The operation as it is, or what stands in for it where its value or its branch is taken."""
    feature = given.get(op.value) or restored.get(op.value)
    if feature is None:
        return op
    source = corrections.get(feature)
    also = () if source is None else (source,)
    if feature.over is None:
        return Op(op.value, "taken", also, correction=source)
    entry = graph.by_value[feature.over]
    return replace(
        op, kind="restored", inputs=(*entry.entered, *also), step=entry.step, modules=entry.modules[:1],
        priced=_around(entry), correction=source,
    )  # fmt: skip


def _around(entry: Op) -> tuple[str, ...]:
    module = entry.modules[0]
    assert module is not None
    return around_prices(entry.value, module)


def _branch(graph: Graph, feature: Feature) -> Op:
    """The operation that finds a branch for recording: the value minus the shortcut of the op that it is over."""
    assert feature.over is not None
    entry = graph.by_value[feature.over]
    return Op(feature.name, "branch", (feature.value, *entry.entered), entry.step, entry.modules[:1], _around(entry))


def _with_branches(order: Iterable[Op], branches: list[Op]) -> Iterable[Op]:
    """Each branch straight after the value that it is taken from, so that its inputs do not have to wait."""
    for op in order:
        yield op
        yield from (branch for branch in branches if branch.inputs[0] == op.value)


def _live(ops: Mapping[str, Op]) -> set[str]:
    """The values that the prediction depends on."""
    live: set[str] = set()
    todo = [PREDICTION]
    while todo:
        value = todo.pop()
        if value in ops and value not in live:
            live.add(value)
            todo += ops[value].inputs
    return live


def _dying(order: list[Op], kept: Collection[Feature]) -> tuple[tuple[str, ...], ...]:
    """The values that no later operation and no recording needs, after each operation."""
    needed = {PREDICTION, *(f.name for f in kept)}
    dying: list[tuple[str, ...]] = []
    for op in reversed(order):
        last = [value for value in dict.fromkeys((op.value, *op.inputs)) if value not in needed]
        dying.append(tuple(last))
        needed |= {op.value, *op.inputs}
    return tuple(reversed(dying))
