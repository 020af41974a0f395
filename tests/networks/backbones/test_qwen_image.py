"""Qwen-Image's transformer against diffusers', through the converter's table, and that padding has no effect."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.backbones import qwen_image as table
from arcflow_jax.errors import UserError
from arcflow_jax.networks.backbones.qwen_image import QwenImage, QwenImageConditioning, QwenImageConfig
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.networks.student import ArcModel
from tests.helpers.twins import (
    QWEN_IMAGE,
    imported,
    qwen_inputs,
    qwen_twin,
    qwen_twin_velocity,
    random_network,
    relative_error,
    velocity,
)

THREE_HEADS = dataclasses.replace(
    QWEN_IMAGE,
    in_channels=16,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=20,
    axes_dims_rope=(4, 6, 6),
)
# model config, rows, columns, length of each text
CASES = {
    "unequal lengths": (QWEN_IMAGE, 4, 6, (7, 3)),
    "odd sides": (QWEN_IMAGE, 5, 3, (2, 9)),
    "one row, three heads": (THREE_HEADS, 1, 8, (5, 5)),
    "one token of text": (THREE_HEADS, 6, 2, (1, 4)),
}


def new_teacher(config: QwenImageConfig, dtype=jnp.float32) -> ArcModel:
    rngs = nnx.Rngs(0)
    return ArcModel(QwenImage(config, dtype=dtype, rngs=rngs), param_dtype=jnp.float32, rngs=rngs)


@pytest.mark.parametrize("case", CASES)
def test_teacher_is_diffusers_transformer(case):
    config, rows, columns, lengths = CASES[case]
    twin = qwen_twin(config)
    tokens, sigma, c = qwen_inputs(config, rows, columns, lengths)
    theirs = qwen_twin_velocity(twin, tokens, sigma, c, rows, columns)
    with jax.default_matmul_precision("highest"):
        ours = velocity(imported(table, twin, lambda: new_teacher(config)), tokens, sigma, c)
    assert relative_error(ours, theirs) < 1e-5
    if case == "odd sides":
        rounded = velocity(imported(table, twin, lambda: new_teacher(config, jnp.bfloat16)), tokens, sigma, c)
        assert rounded.dtype == jnp.float32
        assert relative_error(rounded, theirs) < 0.03


def test_a_prompt_does_not_depend_on_its_batch_or_padding():
    model = random_network(lambda: new_teacher(QWEN_IMAGE))
    tokens, sigma, c = qwen_inputs(QWEN_IMAGE, 4, 4, (2, 6, 3))
    together = velocity(model, tokens, sigma, c)
    for padded in (2, 9):
        text = np.full((1, padded, QWEN_IMAGE.joint_attention_dim), 1e4, np.float32)
        text[0, :2] = c.text[0, :2]
        alone = QwenImageConditioning(text, c.lengths[:1], c.positions)
        ours = velocity(model, tokens[:1], sigma[:1], alone)
        np.testing.assert_allclose(ours[0], together[0], rtol=1e-5, atol=1e-5 * np.abs(together).max())


def test_text_within_the_length_has_an_effect():
    """The test above would pass for a network that reads no text at all."""
    model = random_network(lambda: new_teacher(QWEN_IMAGE))
    tokens, sigma, c = qwen_inputs(QWEN_IMAGE, 4, 4, (2, 6, 3))
    longer = dataclasses.replace(c, lengths=c.lengths + np.array([1, 0, 0], np.int32))
    change = np.abs(velocity(model, tokens, sigma, longer) - velocity(model, tokens, sigma, c)).max((1, 2))
    assert change[0] > 1e-3
    assert change[1:].max() < 1e-6


def test_repeated_conditioning():
    _, _, c = qwen_inputs(QWEN_IMAGE, 2, 2, (2, 6, 3))
    twice = c.repeat(2)
    assert (c.batch_size, twice.batch_size) == (3, 6)
    np.testing.assert_array_equal(twice.lengths, [2, 2, 6, 6, 3, 3])
    np.testing.assert_array_equal(twice.text[2:4], np.stack([c.text[1]] * 2))
    assert twice.positions.shape == (4, 3)


def test_paired_with_negatives():
    _, _, c = qwen_inputs(QWEN_IMAGE, 2, 2, (2, 6, 3))
    negative = dataclasses.replace(c, text=-c.text, lengths=np.ones(3, np.int32))
    pairs = c.paired(negative)
    np.testing.assert_array_equal(pairs.lengths, [2, 1, 6, 1, 3, 1])
    np.testing.assert_array_equal(pairs.text[2:4], [c.text[1], -c.text[1]])
    assert pairs.positions.shape == (4, 3)


def test_cfg_plain_and_norm_preserving():
    """With prompts and negative prompts of different lengths, in one call."""
    model = random_network(lambda: new_teacher(THREE_HEADS))
    tokens, sigma, c = qwen_inputs(THREE_HEADS, 2, 2, (2, 4))
    negative = dataclasses.replace(c, text=c.text[::-1], lengths=np.array([3, 1], np.int32))

    @nnx.jit
    def velocities(model):
        calls = [model.teacher_velocity(tokens, sigma, each) for each in (c, negative)]
        return *calls, *(
            model.teacher_velocity(tokens, sigma, Guided(c, negative, 4.0, norm_preserving))
            for norm_preserving in (False, True)
        )

    u, away, plain, norm_preserving = map(np.asarray, velocities(model))
    expected = away + 4 * (u - away)
    assert relative_error(plain, expected) < 1e-5
    scale = np.linalg.norm(u, axis=-1, keepdims=True) / np.linalg.norm(expected, axis=-1, keepdims=True)
    assert relative_error(norm_preserving, expected * scale) < 1e-5
    assert relative_error(u, expected) > 0.01


def test_gradient_reaches_all_but_the_text_of_the_last_block():
    """The LoRA targets rely on this."""
    model = random_network(lambda: new_teacher(QWEN_IMAGE))
    tokens, sigma, c = qwen_inputs(QWEN_IMAGE, 2, 2, (2, 3))
    graphdef, state = nnx.split(model)
    gradients = jax.jit(jax.grad(lambda s: jnp.square(nnx.merge(graphdef, s).teacher_velocity(tokens, sigma, c)).sum()))
    backbone = gradients(state)["backbone"]

    def size(mlp) -> np.ndarray:
        return np.abs(mlp["proj_in"]["kernel"][...]).max((-2, -1))

    blocks, last = backbone["transformer_blocks"], backbone["last_block"]["2"]
    assert size(blocks["img_mlp"]).shape == (2,)
    assert min(*size(blocks["img_mlp"]), *size(blocks["txt_mlp"]), size(last["img_mlp"])) > 0
    assert size(last["txt_mlp"]) == 0


@pytest.mark.parametrize("setting", [{"guidance_embeds": True}, {"zero_cond_t": True}, {"patch_size": 1}])
def test_other_architectures_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        schema.parse(QwenImageConfig, dataclasses.asdict(QWEN_IMAGE) | setting, "transformer/config.json")


def test_rotary_axes_must_add_up_to_the_head():
    with pytest.raises(UserError, match=r"axes_dims_rope \(8, 12, 12\) adds up to 32, but .* attention_head_dim, 64"):
        dataclasses.replace(QWEN_IMAGE, attention_head_dim=64)
