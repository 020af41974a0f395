"""Model families, one file each (`flux.py`, `qwen_image.py`, …), which defines the family's record `FAMILY`.

Only this room, the networks and convert's tables know a family by name. `family.py` defines the record. `text.py` and
`latents.py` have what families share. To add a family, add a file here and its `FAMILY` below; another package calls
`register`. This room may import convert's tables, networks, data and the rooms below them.
"""

from __future__ import annotations

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.families import flux, flux2, kontext, qwen_image
from arcflow_jax.families.family import Family, Network

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Registers a family: from now on its models can be converted, trained and sampled in this process."""
    _FAMILIES[family.pipeline] = family


for _family in (flux.FAMILY, kontext.FAMILY, flux2.FAMILY, qwen_image.FAMILY):
    register(_family)


def of_pipeline(pipeline: object, where: object) -> Family:
    """The family of a diffusers pipeline class. Raises UserError, which begins with `where`, if there is none."""
    if not isinstance(pipeline, str) or pipeline not in _FAMILIES:
        raise UserError(f"{where} is a {one_line(pipeline)}, supported are {', '.join(_FAMILIES)}")
    return _FAMILIES[pipeline]


def of_transformer(class_name: object, where: object) -> Family:
    """The first family whose transformer has this class.

    Raises UserError, which begins with `where`, if there is none.
    """
    known: dict[str, Family] = {}
    for family in _FAMILIES.values():
        known.setdefault(family.networks["transformer"].class_name, family)
    if not isinstance(class_name, str) or class_name not in known:
        raise UserError(f"{where} has the transformer {one_line(class_name)}, supported are {', '.join(known)}")
    return known[class_name]


__all__ = ["Family", "Network", "of_pipeline", "of_transformer", "register"]
