"""Reading the JSON files that stages leave for one another: whole, of the right version, and as their schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from asdm_compress.core.errors import AsdmError

Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, schema: type[Record], version: int, hint: str) -> Record:
    """The record in a file; raises AsdmError with the hint for one that is damaged or of another schema version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AsdmError(f"{path} cannot be read: {error}", hint) from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != version:
        raise AsdmError(f"{path} has schema version {found}, this program reads {version}", hint)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise AsdmError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}", hint) from error
