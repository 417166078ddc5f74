"""A UNet class of this package and all that it needs as one file, made from this package's own modules.

A folder that carries it opens with `trust_remote_code=True` where this package is not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from asdm_compress.core.provenance import package_version

_ROOT: Final = Path(__file__).resolve().parents[1]
_PACKAGE: Final = _ROOT.name
_THIS: Final = f"{_PACKAGE}.models.loader_source"
# diffusers names a class's library by its module, in which it looks for the class's file later.
_OWN_NAME: Final = (f'__module__ = "{_PACKAGE}"', '__module__ = "asdm_unet"')
_HEADER: Final = '''"""A Stable Diffusion UNet with some of its modules taken out or replaced, as diffusers opens it.

Made by asdm-compress {version} (Apache-2.0) from its own modules; diffusers reads this file where it is told
`trust_remote_code=True`. It needs torch and diffusers alone, reads no other file and opens no connection.
"""

from __future__ import annotations

{imports}


def loader_source(_: str) -> str:
    """This file's own text, for a UNet that is saved again."""
    return Path(__file__).read_text(encoding="utf-8")
'''


@dataclass(slots=True)
class _Parts:
    """What has been gathered so far: plain imports, names imported by module, the names defined and what defines them,
    and the code."""

    imports: set[str] = field(default_factory=set)
    names: dict[str, set[str]] = field(default_factory=dict)
    defined: dict[str, str] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


@cache
def loader_source(module: str = "models.assembled_unet") -> str:
    """The text of the file for the class of a module.

    Raises ValueError where the modules cannot be put into one: for a name that two of them give to different things,
    and for one that is imported under another name.
    """
    parts = _Parts(names={"pathlib": {"Path"}})
    _gather(f"{_PACKAGE}.{module}", parts)
    code = "\n\n".join(parts.code)
    if _OWN_NAME[0] not in code:
        raise ValueError(f"{module} does not say {_OWN_NAME[0]}")
    taken = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(parts.names.items())]
    imports = "\n".join([*sorted(parts.imports), *taken])
    header = _HEADER.format(version=package_version("asdm-compress"), imports=imports)
    return f"{header}\n\n{code.replace(*_OWN_NAME)}"


def _gather(module: str, parts: _Parts) -> None:
    """Add a module behind all modules that it imports."""
    if module in parts.seen:
        return
    parts.seen.add(module)
    text = (_ROOT.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    docstring = ast.get_docstring(tree) or module
    kept: list[str] = []
    end = tree.body[0].end_lineno or 0  # behind the module's docstring
    for node in tree.body[1:]:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _import(module, node, parts)
        elif _is_new(module, node, parts):
            kept += lines[end : node.end_lineno]
        end = node.end_lineno or first
    title = f"# {module.removeprefix(_PACKAGE + '.')}: {docstring.splitlines()[0]}"
    body = "\n".join(kept).strip("\n")
    parts.code.append(f"{title}\n\n\n{body}\n")


def _import(module: str, node: ast.Import | ast.ImportFrom, parts: _Parts) -> None:
    if isinstance(node, ast.Import):
        parts.imports.add(ast.unparse(node))
        return
    source = str(node.module)
    if any(name.asname for name in node.names):
        raise ValueError(f"{module} imports a name of {source} under another name")
    if not source.startswith(_PACKAGE) and source != "__future__":
        parts.names.setdefault(source, set()).update(name.name for name in node.names)
    elif source.startswith(_PACKAGE) and source != _THIS:
        _gather(source, parts)


def _is_new(module: str, node: ast.stmt, parts: _Parts) -> bool:
    """Whether a statement is to be kept: the first of those that say the very same."""
    said = ast.unparse(node)
    for name in _names(node):
        if name in parts.defined:
            if parts.defined[name] != said:
                raise ValueError(f"{module} gives the name {name} to something else than a module before it")
            return False
        parts.defined[name] = said
    return True


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        if isinstance(target, ast.Name):
            yield target.id
