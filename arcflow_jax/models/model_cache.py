"""Converted copies of PyTorch models, made when a model is first used: nobody has to convert by hand to try one.

CACHE/models/<key>     a model directory (see `models.model_directory`); CACHE as in `storage.cache`
"""

from __future__ import annotations

from pathlib import Path

from arcflow_jax.errors import UserError
from arcflow_jax.models.model_directory import DESCRIPTION, VERSION
from arcflow_jax.storage import hub
from arcflow_jax.storage.cache import cache_folder
from arcflow_jax.storage.files import digest
from arcflow_jax.storage.lock import one_writer
from arcflow_jax.storage.paths import as_path

INDEX = "model_index.json"  # what makes a folder a diffusers model


def converted(source: str | Path) -> Path:
    """The model directory of a model: `source` itself if it is one, otherwise its conversion in the cache.

    A model is converted once; each of its components keeps its precision. A folder whose files have changed, or a hub
    id whose main branch has a new commit, is another model and is converted again. A conversion takes as much room as
    the model; nothing deletes it.

    Args:
      source: a model directory, a diffusers folder, or a hub id, owner/name.

    Raises:
      UserError: if there is no such model, it cannot be converted, or the cache cannot be written.
    """
    folder, revision = as_path(source), None
    if folder.is_dir():
        if not (folder / INDEX).is_file() or (folder / DESCRIPTION).is_file():
            return folder
        key = digest([VERSION, *files_of(folder)])
    elif hub.is_repository(source):
        # huggingface_hub names its folder by the commit
        revision = hub.fetch(str(source), None, [INDEX]).name
        key = digest([VERSION, str(source).removeprefix("hf:"), revision])
    else:
        raise UserError(f"model {source} does not exist, and a hub id is owner/name")
    # Not at the top, because a model that is converted does not need it
    from arcflow_jax.models import conversion

    out = (cache_folder() / "models" / key[:32]).absolute()
    if not (out / DESCRIPTION).is_file():
        with one_writer(out, wait=True):  # of two processes, the second waits and finds the first one's conversion
            if not (out / DESCRIPTION).is_file():
                conversion.convert_model(source, out, revision=revision)
    return out


def files_of(folder: Path) -> list[str | list[str | int]]:
    """What identifies a folder without reading its weights: its path, and each file's name, size and time."""
    folder = folder.resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return [str(folder), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
