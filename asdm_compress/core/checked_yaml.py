"""YAML files that people write: read strictly, with the file and the line in every complaint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from asdm_compress.core.errors import AsdmError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Strict(BaseModel):
    """A part of such a file: unknown keys are refused, so that none is silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Checked(Generic[ModelT]):
    """What was read, and where it stands in the file."""

    content: ModelT
    path: Path
    _node: yaml.Node | None

    def line(self, *location: int | str) -> str:
        """`path:line` of a part, for complaints about what only the reader's caller can judge."""
        return f"{self.path}:{_line_of(self._node, location)}"


def read_checked(path: Path, schema: type[ModelT], what: str, hint: str) -> Checked[ModelT]:
    """Read a file; `what` is its name in messages ("a recipe"), `hint` says where such a file comes from.

    Raises AsdmError with the file and the line for anything that is not right: no file, bad YAML, keys that are there
    twice, unknown keys, wrong values.
    """
    if not path.is_file():
        raise AsdmError(f"there is no {what} {path}", hint)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise AsdmError(f"{path} is not UTF-8 text", f"A {what} is a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else str(path)
        raise AsdmError(f"{line}: no valid YAML: {getattr(error, 'problem', error)}") from error
    _refuse_duplicates(node, path)
    if not isinstance(content, Mapping):
        required = [name for name, key in schema.model_fields.items() if key.is_required()]
        keys = required or list(schema.model_fields)
        raise AsdmError(f"{path}:1: a {what} is a mapping with keys such as {', '.join(keys)}")
    try:
        return Checked(schema.model_validate(content), path, node)
    except ValidationError as error:
        # A misspelt key is both unknown and missing; the first says more.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        line_number = _line_of(node, first["loc"])
        where = ".".join(str(part) for part in first["loc"])
        raise AsdmError(f"{path}:{line_number}: {where}: {_explain(first)}", _hint(first)) from error


def as_yaml(content: Mapping[str, Any]) -> str:
    """Content as YAML text, in its own order."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=120, allow_unicode=True)


def _refuse_duplicates(node: yaml.Node | None, path: Path) -> None:
    """YAML readers let a second key win silently."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise AsdmError(f"{path}:{key.start_mark.line + 1}: the key {key.value} is there twice")
            seen.add(key.value)
            _refuse_duplicates(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value, path)


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    said = str(error["msg"]).removeprefix("Value error, ").replace("Field required", "this key is missing")
    return said.replace("Input should be", "this should be")


def _hint(error: Any) -> str | None:
    if error["type"] == "extra_forbidden":
        return "Check the spelling; unknown keys are refused, so that none is silently ignored."
    return None


def _line_of(node: yaml.Node | None, location: Sequence[int | str]) -> int:
    """The line (from 1) of the deepest part of `location` that the file has."""
    line = 1
    for part in location:
        if node is None:
            return line
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == part), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line
