"""Fetches a PyTorch model from the Hugging Face hub: what the converter reads and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.storage.safetensors import STEMS


def is_repository(source: str | Path) -> bool:
    """Whether a source that is no folder has the form of a hub id, owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)) is not None


def split_folder(source: str | Path) -> tuple[str, str] | None:
    """The hub id and the folder in it ("" for none) of a source of the form owner/name or owner/name/folder."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)", str(source))
    return (match[1], match[2].removeprefix("/")) if match else None


def weights_of(folder: str) -> list[str]:
    """The hub's patterns for the weights in a folder: neither pickles nor variants such as model.fp16.safetensors."""
    endings = (".safetensors", "-*.safetensors", ".safetensors.index.json")
    return [f"{folder}/{stem}{ending}".lstrip("/") for stem in STEMS for ending in endings]


def fetch(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """A folder with the files of a repository that match; those in huggingface_hub's cache are not fetched again.

    Args:
      repository: owner/name.
      revision: branch, tag or commit; by default the main branch.
      patterns: names, `*` standing for anything.

    Raises:
      UserError: if the repository or revision does not exist, needs a login or a licence, or cannot be reached.
    """
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
    except errors.LocalEntryNotFoundError as error:  # how huggingface_hub tells that it found no network, either
        raise UserError(
            f"cannot fetch {repository}: the hub cannot be reached, and the files are not all in the local cache "
            f"({one_line(error.__cause__ or error)})"
        ) from None
    except Exception as error:  # its HTTP client's, by a name that changes between versions, or a full disk
        raise UserError(f"cannot fetch {repository}: {one_line(error)}") from error
