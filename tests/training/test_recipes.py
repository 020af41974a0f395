"""Recipes: found by name or file, small, typed; the large ones fit their models. Shapes only."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from arcflow_jax import families, schema
from arcflow_jax.errors import UserError
from arcflow_jax.networks.student import split_model
from arcflow_jax.storage.files import read_json
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import SETTINGS, Recipe, bundled, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = {
    "flux": ("FluxPipeline", "flux.1-dev", ("default", "published", "fast", "legendre", "single")),
    "flux2": ("Flux2KleinPipeline", "flux.2-klein-4b", ("4b", "9b", "single")),
    "qwen": ("QwenImagePipeline", "qwen-image", ("published", "fast", "compact", "legendre", "single")),
}
VARIANTS = {name: variants for name, (*_, variants) in LARGE.items()}
VARIANTS |= dict.fromkeys(("tiny", "tiny_emoji", "tiny_flux2", "tiny_qwen"), ("arcflow", "linear", "legendre"))


@pytest.mark.parametrize(("name", "variant"), [(name, each) for name, (*_, some) in LARGE.items() for each in some])
def test_recipe_fits_its_model(name, variant):
    """Every group of the optimizer finds its variables, and the student is under 5 % of its teacher, FLUX.1's published
    one excepted."""
    pipeline, folder, _ = LARGE[name]
    folder = "flux.2-klein-9b" if variant == "9b" else folder
    family = families.of_pipeline(pipeline, name)
    network = family.networks["transformer"]
    recipe = Recipe.from_config(read_config(f"{name}:{variant}"))
    config = CONFIGS / folder / "transformer" / "config.json"
    adapter = recipe.adapter.with_targets(family.lora_targets)
    student = network.student(schema.parse(network.config, read_json(config), str(config)), adapter, jnp.bfloat16)
    _, base, trained = split_model(student)
    make_optimizer(recipe.optimizer, trained)
    trainable, frozen = (sum(math.prod(x.shape) for x in jax.tree.leaves(state)) for state in (trained, base))
    assert 0.01 < trainable / frozen < (0.0549 if (name, variant) == ("flux", "published") else 0.05)


def test_the_published_recipe_of_flux():
    """The table of the paper."""
    recipe = Recipe.from_config(read_config("flux:published"))
    adapter, optimizer = recipe.adapter, recipe.optimizer
    assert (adapter.modes, adapter.rank, adapter.alpha, adapter.dropout) == (16, 256, 256.0, 0.05)
    assert (optimizer.learning_rate, optimizer.warmup, optimizer.b1, optimizer.b2) == (1e-4, 100, 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.clip_from) == (0.0, 50.0, 100)
    assert optimizer.groups == (("head.proj_out_loggamma.*", 0.1),)
    assert (recipe.steps, recipe.batch, recipe.guidance, recipe.distillation.decay) == (10_000, 16, 3.5, 2000)
    assert (recipe.ema.start, recipe.ema.power) == (100, 8.0)


@pytest.mark.parametrize(("family", "rank"), [("flux", 224), ("qwen", 256)])
def test_the_fast_recipe_has_half_of_the_training_steps_and_another_mixed_trajectory(family, rank):
    published, fast = (Recipe.from_config(read_config(f"{family}:{variant}")) for variant in ("published", "fast"))
    assert fast.adapter.rank == rank
    adapter = dataclasses.replace(fast.adapter, rank=256, alpha=256.0)
    mixed = {"least_share": 0.0, "cuts": "sorted", "decay": 2 * fast.distillation.decay}
    distillation = dataclasses.replace(fast.distillation, **mixed)
    changes = {"out": published.out, "steps": 2 * fast.steps, "adapter": adapter, "distillation": distillation}
    assert dataclasses.replace(fast, **changes) == published


def test_every_bundled_recipe_is_found_by_name_and_by_file():
    assert set(bundled()) == VARIANTS.keys()
    for name, variants in VARIANTS.items():
        for variant in ("", *(f":{each}" for each in variants)):
            named, by_path = read_config(name + variant), read_config(f"{CONFIGS / name}.py{variant}")
            assert named.to_dict() == by_path.to_dict()
            Recipe.from_config(named)


@pytest.mark.parametrize("name", VARIANTS)
def test_recipes_are_small(name):
    lines = (CONFIGS / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 40


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("flux:curved", "recipe flux:curved: known variants are default, published, fast, legendre, single"),
        (
            "fluks",
            "no recipe is called 'fluks': known are flux, flux2, qwen, tiny, tiny_emoji, tiny_flux2, tiny_qwen; a",
        ),
        ("nowhere/mine.py", "recipe nowhere/mine.py does not exist"),
    ],
)
def test_recipes_that_do_not_exist_are_refused(recipe, message):
    with pytest.raises(UserError, match=message):
        read_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name\n", "mine.py: No module named 'nothing_of_this_name'"),
        ("def get_config():\n    return {'model': 'm', 'adapter': {'rnk': 3}}\n", "adapter has no key 'rnk': did you"),
        ("def get_config():\n    return {'model': 3}\n", "--config.model is 3, but has to be a text"),
        ("get_conf = None\n", "has no attribute 'get_config'"),
    ],
)
def test_broken_recipe_files_are_refused(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(str(tmp_path / "mine.py"))


def test_a_file_states_what_differs_and_lacks_what_has_no_default(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config(arg='x'):\n    return {'model': 'm', 'out': arg, 'adapter': {'rank': 3}}\n")
    with pytest.raises(UserError, match=r"the recipe lacks guidance: state it in its file, or set --config.guidance=…"):
        Recipe.from_config(read_config(str(file)))
    recipe = Recipe.from_config(read_config(f"{file}:runs/y", ["--config.guidance=2", "--config.prompts=p.txt"]))
    assert recipe == dataclasses.replace(
        Recipe("m", "runs/y", 2.0, prompts="p.txt"),
        adapter=dataclasses.replace(Recipe("", "", 0, "p").adapter, rank=3, alpha=3.0),
    )


def test_overrides_are_typed():
    overrides = {
        "out": "runs/a=b, (c)",
        "steps": "7",
        "guidance": "2",
        "mesh": "(1, 2, 3, 4)",
        "resolutions": "[(64, 32)]",
        "adapter.targets": "('a.*',)",
        "optimizer.learning_rate": "1e-3",
        "optimizer.groups": "(('head.*', 1),)",
    }
    config = read_config("tiny", [f"--config.{key}={text}" for key, text in overrides.items()])
    recipe = Recipe.from_config(config)
    assert (recipe.out, recipe.steps, recipe.guidance, recipe.mesh) == ("runs/a=b, (c)", 7, 2.0, (1, 2, 3, 4))
    assert (recipe.resolutions, recipe.adapter.targets) == (((64, 32),), ("a.*",))
    assert (recipe.optimizer.learning_rate, recipe.optimizer.groups) == (1e-3, (("head.*", 1.0),))
    assert type(recipe.guidance) is type(recipe.optimizer.groups[0][1]) is float


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.stpes=7", "a recipe has no key 'stpes': did you mean steps? known are model, out"),
        ("--config.adapter.rnk=7", "adapter has no key 'rnk': did you mean adapter.rank? known are modes, rank, "),
        ("--config.seed.x=7", "seed has no key 'x': known are none below it"),
        ("--config.adapter=7", "--config.adapter is 7, but it is a group of keys: set one of --config.adapter.modes, "),
        ("--config.steps=1e3", "steps is 1000.0, but has to be a whole number"),
        ("--config.steps=many", "steps is 'many', but has to be a whole number"),
        ("--config.steps=True", "steps is True, but has to be a whole number"),
        ("--config.optimizer.b1='0.9'", "optimizer.b1 is '0.9', but has to be a number"),
        ("--config.mesh=(1, 2", "mesh is '(1, 2', but has to be 'auto' or a list of 4, each a whole number from -1"),
        ("--config.mesh=atuo", "mesh is 'atuo', but has to be 'auto' or a list of 4"),
        ("--config.resolutions=(64, 64)", "but has to be a list of sizes, each (height, width) in pixels"),
        ("--config.adapter.targets=7", "--config.adapter.targets is 7, but has to be a list, each a text"),
        ("steps=7", "cannot read steps=7: overrides have the form --config.key=value"),
        ("--config.steps", "cannot read --config.steps: overrides have the form --config.key=value"),
    ],
)
def test_overrides_that_are_wrong_are_refused(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_config("tiny", [override])


def numeric(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of the fields that are one number."""
    for name, hint in schema.types_of(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from numeric(hint, f"{prefix}{name}.")
        elif "tuple" not in str(hint) and list(schema.numbers(hint)):
            yield prefix + name


@pytest.mark.parametrize("name", list(numeric(Recipe)))
def test_absurd_numbers_are_refused(name):
    for text in ("1e400", "-1e400", "-1e30", "1e30", "nan", "inf", "-9", "9" * 40, "9" * 5000, "True"):
        with pytest.raises(UserError, match=rf"^--config\.{name} is .*, but has to be a "):
            read_config("tiny", [f"--config.{name}={text}"])


def test_a_recipe_made_in_python_is_checked():
    with pytest.raises(UserError, match=r"^guidance is nan, but has to be a number from 0 to 1000$"):
        Recipe("m", "o", float("nan"), prompts="p.txt")
    assert Recipe("m", "o", 1, prompts="p.txt", seed=2**64 - 1, mesh=[1, 1, 1, 1]).mesh == (1, 1, 1, 1)


def test_configs_are_locked_against_typos():
    config = read_config("tiny")
    with pytest.raises(AttributeError, match="stpes"):
        config.stpes = 3
    with pytest.raises(UserError, match="a recipe has no key 'stpes'"):
        Recipe.from_config(ConfigDict({"stpes": 3}))


def test_a_run_begun_before_defaults_is_the_same(tmp_path):
    """Its config.json spells out LoRA targets, and lacks keys that came later."""
    recipe = Recipe.from_config(read_config("tiny"))
    before = recipe.resolved()
    before["adapter"]["targets"] = ["transformer_blocks.ff.*"]
    before["mesh"] = [1, -1, 1, 1]
    del before["start_from"]
    (tmp_path / SETTINGS).write_text(json.dumps(before))
    recipe.check_same(tmp_path)
    before["optimizer"]["b1"] = 0.5
    (tmp_path / SETTINGS).write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"other settings: optimizer\.b1 was 0\.5, not 0\.9; name another"):
        recipe.check_same(tmp_path)
