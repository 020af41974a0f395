"""One file a model family (`flux.py`, `qwen_image.py`), which ends in its `FAMILY`: the record of all that is its own.

Nothing outside this room, the networks and the tables knows a family by name. `family.py` has the record, `text.py` and
`latents.py` what families share. To add a family, add a file here and its `FAMILY` below; other packages may call
`register`. This room may import data, networks, convert's tables and what lies below them.
"""

from __future__ import annotations

from arcflow_jax.errors import UserError
from arcflow_jax.families import flux, qwen_image
from arcflow_jax.families.family import Family, Network

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known: its models convert, train and sample from now on in this process."""
    _FAMILIES[family.pipeline] = family


for _family in (flux.FAMILY, qwen_image.FAMILY):
    register(_family)


def of_pipeline(pipeline: object, where: object) -> Family:
    """The family of a pipeline class. Raises UserError, naming `where` it was read, if there is none."""
    if not isinstance(pipeline, str) or pipeline not in _FAMILIES:
        raise UserError(f"{where} is a {pipeline}, supported are {', '.join(_FAMILIES)}")
    return _FAMILIES[pipeline]


def of_transformer(class_name: object, where: object) -> Family:
    """The family whose transformer is of this class. Raises UserError, naming `where` it was read, if there is none."""
    known = {family.networks["transformer"].class_name: family for family in _FAMILIES.values()}
    if not isinstance(class_name, str) or class_name not in known:
        raise UserError(f"{where} is of transformer {class_name}, supported are {', '.join(known)}")
    return known[class_name]


__all__ = ["Family", "Network", "of_pipeline", "of_transformer", "register"]
