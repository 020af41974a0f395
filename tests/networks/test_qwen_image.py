"""Qwen-Image's transformer against diffusers', through the converter's table, and what padding does to it: nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.convert import qwen_image as table
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import centred_positions
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.networks.qwen_image import QwenImage, QwenImageConditioning, QwenImageConfig
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.storage.files import parse_config

TINY = QwenImageConfig(
    in_channels=64,
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=48,
    axes_dims_rope=(8, 12, 12),
)
THREE_HEADS = dataclasses.replace(
    TINY,
    in_channels=16,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=20,
    axes_dims_rope=(4, 6, 6),
)
# geometry, rows, columns, length of each text
CASES = {
    "unequal lengths": (TINY, 4, 6, (7, 3)),
    "odd sides": (TINY, 5, 3, (2, 9)),
    "one row, three heads": (THREE_HEADS, 1, 8, (5, 5)),
    "one token of text": (THREE_HEADS, 6, 2, (1, 4)),
}


def new_teacher(config: QwenImageConfig, dtype=jnp.float32) -> ArcModel:
    rngs = nnx.Rngs(0)
    return ArcModel(QwenImage(config, dtype=dtype, rngs=rngs), param_dtype=jnp.float32, rngs=rngs)


def teacher(config: QwenImageConfig, tensors, dtype=jnp.float32) -> ArcModel:
    """The teacher with a checkpoint's weights."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: new_teacher(config, dtype)))
    return nnx.merge(graphdef, import_tensors(table, tensors, abstract))


@nnx.jit
def velocity(model: ArcModel, tokens, sigma, conditioning):
    return model.teacher_velocity(tokens, sigma, conditioning)


def inputs(config: QwenImageConfig, rows: int, columns: int, lengths: tuple[int, ...]):
    """Tokens, σ and conditioning; the padding of the text is not zero, so that it shows if it is read."""
    rng = np.random.default_rng(0)
    b, n = len(lengths), rows * columns
    tokens = rng.standard_normal((b, n, config.in_channels)).astype(np.float32)
    sigma = np.linspace(0.9, 0.31, b, dtype=np.float32)
    conditioning = QwenImageConditioning(
        text=10 * rng.standard_normal((b, max(lengths), config.joint_attention_dim)).astype(np.float32),
        lengths=np.array(lengths, np.int32),
        positions=centred_positions(rows, columns),
    )
    return tokens, sigma, conditioning


def relative_error(ours, theirs) -> float:
    """The largest error over the largest value."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def new_twin(config: QwenImageConfig):
    """diffusers' model of the same geometry, with nothing left at a trivial value."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    channels = config.in_channels // 4
    twin = diffusers.QwenImageTransformer2DModel(**dataclasses.asdict(config), out_channels=channels).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 / max(1, parameter[0].numel()) ** 0.5 + 0.02)
    return twin


def twin_velocity(twin, tokens, sigma, conditioning, rows: int, columns: int) -> np.ndarray:
    """What diffusers' model gives for the same inputs."""
    import torch

    mask = np.arange(conditioning.text.shape[1]) < np.asarray(conditioning.lengths)[:, None]
    with torch.no_grad():
        return twin(
            hidden_states=torch.from_numpy(tokens),
            timestep=torch.from_numpy(sigma),
            encoder_hidden_states=torch.from_numpy(conditioning.text),
            encoder_hidden_states_mask=torch.from_numpy(mask),
            img_shapes=[[(1, rows, columns)]] * len(tokens),
        ).sample.numpy()


@pytest.mark.parametrize("case", CASES)
def test_teacher_is_diffusers_transformer(case):
    config, rows, columns, lengths = CASES[case]
    twin = new_twin(config)
    tokens, sigma, c = inputs(config, rows, columns, lengths)
    theirs = twin_velocity(twin, tokens, sigma, c, rows, columns)
    tensors = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    with jax.default_matmul_precision("highest"):
        ours = velocity(teacher(config, tensors), tokens, sigma, c)
    assert relative_error(ours, theirs) < 1e-5
    if case == "odd sides":
        rounded = velocity(teacher(config, tensors, jnp.bfloat16), tokens, sigma, c)
        assert rounded.dtype == jnp.float32
        assert relative_error(rounded, theirs) < 0.03


def test_prompt_depends_on_neither_batch_mates_nor_padding():
    model = new_teacher(TINY)
    tokens, sigma, c = inputs(TINY, 4, 4, (2, 6, 3))
    together = velocity(model, tokens, sigma, c)
    for padded in (2, 9):
        text = np.full((1, padded, TINY.joint_attention_dim), 1e4, np.float32)
        text[0, :2] = c.text[0, :2]
        alone = QwenImageConditioning(text, c.lengths[:1], c.positions)
        ours = velocity(model, tokens[:1], sigma[:1], alone)
        np.testing.assert_allclose(ours[0], together[0], rtol=1e-5, atol=1e-5 * np.abs(together).max())


def test_what_is_padded_does_matter_within_the_length():
    """The test above would hold for a network that reads no text at all."""
    model = new_teacher(TINY)
    tokens, sigma, c = inputs(TINY, 4, 4, (2, 6, 3))
    longer = dataclasses.replace(c, lengths=c.lengths + np.array([1, 0, 0], np.int32))
    change = np.abs(velocity(model, tokens, sigma, longer) - velocity(model, tokens, sigma, c)).max((1, 2))
    assert change[0] > 1e-3
    assert change[1:].max() < 1e-6


def test_repeated_conditioning():
    _, _, c = inputs(TINY, 2, 2, (2, 6, 3))
    twice = c.repeat(2)
    assert (c.batch_size, twice.batch_size) == (3, 6)
    np.testing.assert_array_equal(twice.lengths, [2, 2, 6, 6, 3, 3])
    np.testing.assert_array_equal(twice.text[2:4], np.stack([c.text[1]] * 2))
    assert twice.positions.shape == (4, 3)


def test_paired_with_negatives():
    _, _, c = inputs(TINY, 2, 2, (2, 6, 3))
    negative = dataclasses.replace(c, text=-c.text, lengths=np.ones(3, np.int32))
    pairs = c.paired(negative)
    np.testing.assert_array_equal(pairs.lengths, [2, 1, 6, 1, 3, 1])
    np.testing.assert_array_equal(pairs.text[2:4], [c.text[1], -c.text[1]])
    assert pairs.positions.shape == (4, 3)


def test_true_guidance_plain_and_rescaled():
    """Of prompt and negative, each with a length of its own, in one call; norm-preserving as diffusers."""
    model = new_teacher(THREE_HEADS)
    tokens, sigma, c = inputs(THREE_HEADS, 2, 2, (2, 4))
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
    """As LoRA's targets assume."""
    model = new_teacher(TINY)
    tokens, sigma, c = inputs(TINY, 2, 2, (2, 3))
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
        parse_config(QwenImageConfig, dataclasses.asdict(TINY) | setting, "transformer/config.json")
