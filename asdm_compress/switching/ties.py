"""Keeps what members have in common one thing: layers that are the same module, tensors that are the same parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, slots=True)
class Tie:
    """A child or a parameter of a module that is one of another module."""

    inside: nn.Module
    name: str
    owner: nn.Module
    key: str


@dataclass(frozen=True, slots=True)
class Ties:
    """All ties of a tree. `layers` and `tensors` are the full names of what is only lent, by the names of the loans.

    Layers are tied as wholes where all of them is shared: what is put around one of them, such as a LoRA, is then put
    around it in every member. Single tensors are tied where a layer has others of its own.
    """

    layers: Mapping[str, str]
    tensors: Mapping[str, str]
    of_layers: list[Tie] = field(default_factory=list)
    of_tensors: list[Tie] = field(default_factory=list)

    @staticmethod
    def of(root: nn.Module, shared: Mapping[str, str]) -> Ties:
        """The ties of a tree whose parameters `shared` (full names) are others of it; nothing is tied yet."""
        modules = dict(root.named_modules(remove_duplicate=False))
        names: dict[str, list[str]] = {}
        for name in shared:
            module, _, parameter = name.rpartition(".")
            names.setdefault(module, []).append(parameter)
        layers: dict[str, str] = {}
        tensors: dict[str, str] = {}
        for path, parameters in names.items():
            owners = {shared[f"{path}.{parameter}"].rpartition(".")[0] for parameter in parameters}
            owner = owners.pop()
            if not owners and _same_kind(modules[path], modules[owner], parameters):
                layers[path] = owner
            else:
                tensors |= {f"{path}.{parameter}": shared[f"{path}.{parameter}"] for parameter in parameters}
        ties = Ties(layers, tensors)
        for path, owner in layers.items():
            inside, _, name = path.rpartition(".")
            holder, _, key = owner.rpartition(".")
            ties.of_layers.append(Tie(modules[inside], name, modules[holder], key))
        for path, source in tensors.items():
            inside, _, name = path.rpartition(".")
            holder, _, key = source.rpartition(".")
            ties.of_tensors.append(Tie(modules[inside], name, modules[holder], key))
        return ties

    def tie(self) -> None:
        """Make all of them one; harmless when repeated. What the owner has now is what counts."""
        for tie in self.of_layers:
            now = tie.owner._modules[tie.key]
            if tie.inside._modules[tie.name] is not now:
                tie.inside._modules[tie.name] = now
        for tie in self.of_tensors:
            own = _parameters(tie.owner)[tie.key]
            parameters = _parameters(tie.inside)
            if parameters[tie.name] is not own:
                parameters[tie.name] = own

    def is_lent(self, name: str) -> bool:
        """Whether a tensor of a state dict is one that stands there under its owner's name too."""
        return name in self.tensors or any(name[:dot] in self.layers for dot, c in enumerate(name) if c == ".")

    def owner_of(self, name: str) -> str:
        """The owner's name of a lent tensor."""
        if name in self.tensors:
            return self.tensors[name]
        path = next(name[:dot] for dot, c in enumerate(name) if c == "." and name[:dot] in self.layers)
        return f"{self.layers[path]}{name[len(path) :]}"


def _parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A layer's own parameters, also where something such as a LoRA stands around it."""
    inner = getattr(module, "base_layer", module)
    assert isinstance(inner, nn.Module)
    return inner._parameters


def _same_kind(one: nn.Module, other: nn.Module, shared: list[str]) -> bool:
    """Whether two layers without parts do the same when their parameters are the same."""
    own = [name for name, parameter in one._parameters.items() if parameter is not None]
    theirs = [name for name, parameter in other._parameters.items() if parameter is not None]
    plain = not one._modules and not other._modules and not one._buffers and not other._buffers
    return (
        plain
        and type(one) is type(other)
        and sorted(own) == sorted(theirs) == sorted(shared)
        and (one.extra_repr() == other.extra_repr())
    )
