"""The recipes for the large models, held against those models' geometry. Shapes only."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.families.flux import FLUX
from arcflow_jax.families.qwen_image import QWEN_IMAGE
from arcflow_jax.networks.student import split_model
from arcflow_jax.storage.files import parse_config, read_json
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import Recipe, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = {
    "flux": (FLUX, "flux.1-dev", ("default", "published", "legendre")),
    "qwen": (QWEN_IMAGE, "qwen-image", ("published", "compact", "legendre")),
}


@pytest.mark.parametrize(("file", "arg"), [(file, arg) for file, (*_, args) in LARGE.items() for arg in args])
def test_recipe_fits_its_model(file, arg):
    """Every group of the optimizer finds its variables, and the student is under 5 % of its teacher, FLUX.1's published
    one excepted."""
    network, folder, _ = LARGE[file]
    recipe = Recipe.from_config(read_config(f"{CONFIGS / file}.py:{arg}"))
    config = CONFIGS / folder / "transformer" / "config.json"
    student = network.student(
        parse_config(network.config, read_json(config), str(config)), recipe.adapter, jnp.bfloat16
    )
    _, base, trained = split_model(student)
    make_optimizer(recipe.optimizer, trained)
    trainable, frozen = (sum(math.prod(x.shape) for x in jax.tree.leaves(state)) for state in (trained, base))
    assert 0.01 < trainable / frozen < (0.0549 if (file, arg) == ("flux", "published") else 0.05)


@pytest.mark.parametrize("file", LARGE)
def test_a_variant_that_is_none_is_refused(file):
    with pytest.raises(UserError, match=f"configs/{file}.py:curved: known are .*legendre"):
        read_config(f"{CONFIGS / file}.py:curved")
