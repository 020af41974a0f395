"""FLUX.2's transformer against diffusers', through the converter's table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.backbones import flux2 as table
from arcflow_jax.errors import UserError
from arcflow_jax.families.flux2 import reference_positions
from arcflow_jax.networks.backbones.flux2 import Flux2, Flux2Conditioning, Flux2Config
from arcflow_jax.networks.conditioning import Guided, References
from arcflow_jax.networks.student import AdapterConfig, ArcModel
from tests.helpers.twins import (
    FLUX2,
    flux2_inputs,
    flux2_twin,
    flux2_twin_velocity,
    imported,
    random_network,
    relative_error,
    velocity,
)

# model config, rows, columns, text tokens
CASES = {
    "klein": (FLUX2, 4, 6, 7),
    "dev: guidance, odd sides, one block each": (
        dataclasses.replace(FLUX2, guidance_embeds=True, num_layers=1, num_single_layers=1),
        5,
        3,
        2,
    ),
    "five heads in more groups, another rope": (
        dataclasses.replace(
            FLUX2,
            num_attention_heads=5,
            attention_head_dim=12,
            axes_dims_rope=(2, 2, 6, 2),
            rope_theta=500.0,
            in_channels=16,
        ),
        1,
        8,
        9,
    ),
}
TARGETS = ("transformer_blocks.ff.*", "single_transformer_blocks.attn.*")


def new_teacher(config: Flux2Config, dtype=jnp.float32) -> ArcModel:
    rngs = nnx.Rngs(0)
    return ArcModel(Flux2(config, dtype=dtype, rngs=rngs), bias=False, param_dtype=jnp.float32, rngs=rngs)


@pytest.mark.parametrize("case", CASES)
def test_teacher_is_diffusers_transformer(case):
    config, rows, columns, length = CASES[case]
    twin = flux2_twin(config)
    tokens, sigma, c = flux2_inputs(config, rows, columns, length)
    theirs = flux2_twin_velocity(twin, tokens, sigma, c)
    with jax.default_matmul_precision("highest"):
        ours = velocity(imported(table, twin, lambda: new_teacher(config)), tokens, sigma, c)
    assert relative_error(ours, theirs) < 1e-5
    if case == "klein":
        rounded = velocity(imported(table, twin, lambda: new_teacher(config, jnp.bfloat16)), tokens, sigma, c)
        assert rounded.dtype == jnp.float32
        assert relative_error(rounded, theirs) < 0.03


def test_a_new_student_is_the_teacher():
    """With biases in the head that the teacher has not: the noise is in those of the means."""
    adapter = AdapterConfig(modes=3, rank=2, dropout=0.0, targets=TARGETS)
    model = random_network(lambda: new_teacher(FLUX2).attach_student(adapter, nnx.Rngs(0)))
    tokens, sigma, c = flux2_inputs(FLUX2, 2, 3, 4)

    @nnx.jit
    def both(model):
        model.initialize_student(jax.random.key(0))
        curve = model.student_curve(tokens, sigma, c)
        means = curve.means.reshape(*curve.means.shape[:3], -1)
        return model.teacher_velocity(tokens, sigma, c), means, model.head.proj_out_means.bias[...]

    u, means, bias = both(model)
    noise = bias.reshape(3, -1)
    assert 0.01 < float(jnp.std(noise)) < 0.1
    np.testing.assert_allclose(means - noise, jnp.broadcast_to(u[:, :, None], means.shape), rtol=1e-5, atol=1e-5)


def test_repeated_and_paired_conditioning():
    config = dataclasses.replace(FLUX2, guidance_embeds=True)
    _, _, c = flux2_inputs(config, 2, 2, 3)
    twice, pairs = c.repeat(2), c.paired(dataclasses.replace(c, text=-c.text))
    assert (c.batch_size, twice.batch_size, pairs.batch_size) == (2, 4, 4)
    np.testing.assert_array_equal(twice.text[2:], np.stack([c.text[1]] * 2))
    np.testing.assert_array_equal(twice.guidance, np.repeat(c.guidance, 2))
    np.testing.assert_array_equal(pairs.text[2:], [c.text[1], -c.text[1]])
    np.testing.assert_array_equal(pairs.guidance, np.ones(4))
    assert pairs.positions.shape == (4, 4)


def test_cfg():
    """With prompts and negative prompts in one call."""
    model = random_network(lambda: new_teacher(FLUX2))
    tokens, sigma, c = flux2_inputs(FLUX2, 2, 2, 3)
    negative = Flux2Conditioning(c.text[::-1], None, c.positions)
    u, away = (np.asarray(velocity(model, tokens, sigma, each)) for each in (c, negative))
    guided = velocity(model, tokens, sigma, Guided(c, negative, 4.0))
    assert relative_error(guided, away + 4 * (u - away)) < 1e-5
    assert relative_error(u, guided) > 0.01


@pytest.mark.parametrize("setting", [{"patch_size": 2}, {"out_channels": 16}, {"eps": 1e-5}, {"mlp_ratio": 4.0}])
def test_other_architectures_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        schema.parse(Flux2Config, dataclasses.asdict(FLUX2) | setting, "transformer/config.json")


def test_rotary_axes_must_add_up_to_the_head():
    with pytest.raises(UserError, match=r"axes_dims_rope \(8, 8, 8, 8\) adds up to 32, but .* attention_head_dim, 64"):
        dataclasses.replace(FLUX2, attention_head_dim=64)


def with_references(c: Flux2Conditioning, channels: int) -> Flux2Conditioning:
    """With reference images of 2 × 3 and 1 × 2 tokens, others for each example."""
    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((c.batch_size, 8, channels)).astype(np.float32)
    return dataclasses.replace(c, references=References(tokens, reference_positions([(2, 3), (1, 2)])))


def test_references_are_further_tokens_of_diffusers_transformer():
    twin = flux2_twin(FLUX2)
    tokens, sigma, c = flux2_inputs(FLUX2, 3, 4, 5)
    c = with_references(c, FLUX2.in_channels)
    longer = dataclasses.replace(c, positions=jnp.concatenate([c.positions, c.references.positions]))
    theirs = flux2_twin_velocity(twin, np.concatenate([tokens, c.references.tokens], axis=1), sigma, longer)[:, :12]
    with jax.default_matmul_precision("highest"):
        ours = velocity(imported(table, twin, lambda: new_teacher(FLUX2)), tokens, sigma, c)
    assert relative_error(ours, theirs) < 1e-5


def test_cfg_shows_references_to_both():
    model = random_network(lambda: new_teacher(FLUX2))
    tokens, sigma, c = flux2_inputs(FLUX2, 2, 2, 3)
    positive = with_references(c, FLUX2.in_channels)
    negative = Flux2Conditioning(c.text[::-1], None, c.positions)
    u, away = (
        np.asarray(velocity(model, tokens, sigma, dataclasses.replace(each, references=positive.references)))
        for each in (c, negative)
    )
    guided = velocity(model, tokens, sigma, Guided(positive, negative, 4.0))
    assert relative_error(guided, away + 4 * (u - away)) < 1e-5
    twice = positive.repeat(2)
    np.testing.assert_array_equal(twice.references.tokens, np.repeat(positive.references.tokens, 2, axis=0))
