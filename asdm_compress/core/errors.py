"""The one error type that users see, and the exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    USER = 2
    INFEASIBLE = 3
    ENVIRONMENT = 4


class AsdmError(Exception):
    """Something that the user can act on: what went wrong, what to do about it, and the exit code it ends with."""

    def __init__(self, message: str, hint: str | None = None, exit_code: ExitCode = ExitCode.USER) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


class SiteError(AsdmError):
    """What is wrong with the edit at one site of a plan; whoever knows the plan's file can say on which line."""

    def __init__(self, site: str, error: AsdmError) -> None:
        super().__init__(error.message, error.hint, error.exit_code)
        self.site = site


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so in RuntimeErrors of several types, of which only the words tell."""
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
