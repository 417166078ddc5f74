"""A student folder sent to the hub, where that is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.models.files import first_line, is_weights
from asdm_compress.models.loader import carried

INDEX: Final = "model_index.json"


def check_hub(repository: str) -> None:
    """Refuse a repository that nothing could be sent to, before any time is spent.

    Raises AsdmError for a name that is none (exit code 2), and without a network or an account (4).
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise AsdmError(f"{repository!r} is no name of a repository on the hub", "Write user/name.") from error
    if repository.count("/") != 1:
        raise AsdmError(f"{repository!r} is no name of a repository on the hub", "Write user/name.")
    if constants.HF_HUB_OFFLINE:
        raise AsdmError("the hub is switched off by HF_HUB_OFFLINE", "Unset it to push.", ExitCode.ENVIRONMENT)
    if get_token() is None:
        raise AsdmError("nobody is logged in to the hub here", "Log in with `hf auth login`.", ExitCode.ENVIRONMENT)
    try:
        HfApi().whoami()
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise _unreachable(repository, error) from error


def push(folder: Path, repository: str) -> str:
    """Send a folder to a repository on the hub, a new one being private; the commit's address.

    There, the index of a pipeline with a student's UNet names the UNet's own loader: of a repository, diffusers takes
    no class from elsewhere. Raises AsdmError, exit code 4, for everything that the hub refuses.
    """
    api = HfApi()
    try:
        if not api.repo_exists(repository):
            api.create_repo(repository, private=True)
        new = contents(folder)
        old = [file.rfilename for file in api.repo_info(repository).siblings or []]
        operations = [*new, *stale_weights(old, {each.path_in_repo for each in new})]
        commit = api.create_commit(repository, operations, commit_message="Upload a student of asdm-compress")
    # Of a large file that is not taken, huggingface_hub says so by a plain RuntimeError or ValueError.
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _unreachable(repository, error, "; what was written here is complete") from error
    return str(commit.commit_url)


def contents(folder: Path) -> list[CommitOperationAdd]:
    """Every file of a folder as it is to be in the repository."""
    operations = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        place = path.relative_to(folder).as_posix()
        what = carried(path.read_text(encoding="utf-8")).encode() if place == INDEX else path
        operations.append(CommitOperationAdd(place, what))
    return operations


def stale_weights(old: Iterable[str], new: Collection[str]) -> list[CommitOperationDelete]:
    """What goes of a repository's old files: weights, and indices of shards, that are not there anymore.

    Beside new ones they would be what diffusers opens, which takes shards before a whole file. Only what
    diffusers would open in a folder that has weights now goes: a repository may hold a LoRA or a single file too.
    """
    folders = {PurePosixPath(name).parent for name in new if is_weights(PurePosixPath(name).name)}
    places = [(name, PurePosixPath(name)) for name in old if name not in new]
    gone = [name for name, place in places if place.parent in folders and is_weights(place.name)]
    return [CommitOperationDelete(name) for name in gone]


def _unreachable(repository: str, error: Exception, written: str = "") -> AsdmError:
    why = ": ".join(first_line(each) for each in (error, error.__cause__) if each is not None)
    return AsdmError(
        f"the hub did not take {repository}: {why}",
        f"Check the network and `hf auth whoami`{written}.",
        ExitCode.ENVIRONMENT,
    )
