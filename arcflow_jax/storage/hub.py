"""Hub ids, and downloads from and uploads to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import huggingface_hub

from arcflow_jax.errors import NetworkError, UserError, cause_of, one_line
from arcflow_jax.storage.safetensors import STEMS

PREFIX = "hf:"  # before a hub id that could also be a local path


def is_repository(source: str | Path) -> bool:
    """Whether a source is a hub id, `owner/name`, and not a local path (see `split_folder`)."""
    named = split_folder(source)
    return named is not None and not named[1]


def split_folder(source: str | Path) -> tuple[str, str] | None:
    """The hub id and the folder in that repository ("" for none), of `owner/name` or `owner/name/folder`.

    What could be a local path is never looked up on the hub: None if the path exists, or its first folder does
    (`runs/flux` beside an existing folder `runs` is a missing path). The prefix `hf:` says that it is a hub id.
    """
    text = str(source)
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)", text.removeprefix(PREFIX))
    if match is None or (not text.startswith(PREFIX) and Path(text).parts and Path(Path(text).parts[0]).exists()):
        return None
    return match[1], match[2].removeprefix("/")


def not_found(source: str | Path) -> str:
    """Why a source that does not exist is not looked up on the hub, for an error message."""
    if split_folder(f"{PREFIX}{source}") is None:
        return f"{source} does not exist, and a hub id has the form owner/name"
    return (
        f"{source} does not exist; it is taken for a local path because {Path(source).parts[0]} exists (a model on the "
        f"hub would be {PREFIX}{source})"
    )


def weights_of(folder: str) -> list[str]:
    """Patterns for `fetch` of the weights in a folder: no pickles and no variants such as model.fp16.safetensors."""
    endings = (".safetensors", "-*.safetensors", ".safetensors.index.json")
    return [f"{folder}/{stem}{ending}".lstrip("/") for stem in STEMS for ending in endings]


def fetch(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """A folder with those files of a repository that match. Files in huggingface_hub's cache are not downloaded again.

    Args:
      repository: owner/name, with or without the prefix `hf:`.
      revision: branch, tag or commit; by default the main branch.
      patterns: file names, in which `*` stands for anything.

    Raises:
      UserError: if the repository or revision does not exist, or needs a login or a licence.
      NetworkError: if the hub cannot be reached.
    """
    from huggingface_hub import errors  # not at the top: it loads an HTTP client, which most commands never need

    repository = repository.removeprefix(PREFIX)
    page = f"https://huggingface.co/{repository}"
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:  # a kind of RepositoryNotFoundError
        raise UserError(
            f"{repository} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no model {repository} that you may see: check the name or, if it is private, "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision}: {page}/commits lists them") from None
    except errors.LocalEntryNotFoundError as error:  # without a network, too
        raise NetworkError(
            f"cannot fetch {repository}: the hub cannot be reached, and the files are not all in the local cache "
            f"({one_line(error.__cause__ or error)})"
        ) from None
    except Exception as error:  # from its HTTP client, whose class differs between versions, or a full disk
        raise kind_of(error)(f"cannot fetch {repository}: {one_line(error)}") from error


def upload(folder: Path, repository: str) -> None:
    """Uploads a folder's files as a commit of a model repository, which is made if there is none.

    Args:
      repository: owner/name.

    Raises:
      UserError: if the hub does not let this user write there.
      NetworkError: if the hub cannot be reached.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"A student from arcflow_jax {version('arcflow_jax')}",
        )
    except Exception as error:  # from its HTTP client, whose class differs between versions
        if status_of(error) in (401, 403):
            raise UserError(
                f"the hub does not let you write to {repository}: log in with `hf auth login`, or set HF_TOKEN, with a "
                "token that may write there"
            ) from None
        raise kind_of(error)(f"cannot upload to {repository}: {one_line(error)}") from error


def kind_of(error: Exception) -> type[UserError]:
    """The class of a failed request's error: NetworkError if the hub or the network failed."""
    return NetworkError if status_of(error) >= 500 or cause_of(error) == "network" else UserError


def status_of(error: Exception) -> int:
    """The HTTP status of an answer that an exception reports; 0 if there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)
