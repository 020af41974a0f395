"""FLUX.1's VAE against diffusers' AutoencoderKL, through the rule table and the engine."""

# B batch, H, W image size, C latent channels

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.convert.vaes import kl as table
from arcflow_jax.errors import UserError
from arcflow_jax.networks import layers
from arcflow_jax.networks.vaes.kl import AutoencoderKL, AutoencoderKLConfig
from tests.helpers.twins import randomize, relative_error, scale_centre, vae_scale

TINY = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    sample_size=16,
)
CONFIGS = {
    "two levels": TINY,
    "four levels as FLUX's": dataclasses.replace(
        TINY, block_out_channels=(8, 8, 16, 16), layers_per_block=2, latent_channels=16
    ),
    "equal widths, one group, no attention": dataclasses.replace(
        TINY, block_out_channels=(8, 8, 8), norm_num_groups=1, mid_block_add_attention=False, shift_factor=-2.0
    ),
    "one level": dataclasses.replace(TINY, block_out_channels=(8,), layers_per_block=3, scaling_factor=7.0),
}


def twin(config: AutoencoderKLConfig):
    """diffusers' model with the same model config and random weights."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_out_channels)
    model = diffusers.AutoencoderKL(
        **dataclasses.asdict(config),
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomize(model, vae_scale, scale_centre)


def ours(model, config: AutoencoderKLConfig) -> AutoencoderKL:
    read = schema.parse(AutoencoderKLConfig, dict(model.config), "config.json")
    assert read == config
    graphdef, state = nnx.split(layers.abstract(lambda: AutoencoderKL(read, rngs=nnx.Rngs(0))))
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return nnx.merge(graphdef, import_tensors(table, tensors, state))


@nnx.jit
def both_ways(network: AutoencoderKL, pixels, z):
    return network.encode(pixels), network.posterior(pixels)[1], network.decode(z)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model = twin(config)
    network = ours(model, config)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)  # [B, H, W, 3]
    z = rng.standard_normal((2, 16 // config.factor, 24 // config.factor, config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist
        their_latents = (posterior.mean - config.shift_factor) * config.scaling_factor
        their_pixels = model.decode(
            torch.from_numpy(z.transpose(0, 3, 1, 2)) / config.scaling_factor + config.shift_factor
        ).sample
    with jax.default_matmul_precision("highest"):
        latents, log_variance, decoded = both_ways(network, pixels, z)
    assert relative_error(latents, their_latents.numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert relative_error(log_variance, posterior.logvar.numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert relative_error(decoded, their_pixels.numpy().transpose(0, 2, 3, 1)) < 1e-5


def test_bfloat16_agrees_with_float32():
    config = dataclasses.replace(TINY, block_out_channels=(8,))
    graphdef, abstract = nnx.split(layers.abstract(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(rng.standard_normal(x.shape) / np.prod(x.shape[:-1]) ** 0.5, jnp.float32)  # noqa: E731
    network = nnx.merge(graphdef, jax.tree.map(random, abstract))
    z = jax.random.normal(jax.random.key(0), (1, 8, 8, config.latent_channels))
    decode = nnx.jit(AutoencoderKL.decode)
    rounded = decode(network, z.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert relative_error(rounded.astype(jnp.float32), decode(network, z)) < 0.05


def test_size_must_divide():
    with pytest.raises(ValueError, match="17×16"):
        nnx.eval_shape(lambda: AutoencoderKL(TINY, rngs=nnx.Rngs(0)).encode(jnp.zeros((1, 17, 16, 3))))


@pytest.mark.parametrize("setting", [{"act_fn": "gelu"}, {"use_quant_conv": True}, {"latents_mean": [0.0] * 4}])
def test_other_architectures_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        schema.parse(AutoencoderKLConfig, dataclasses.asdict(TINY) | setting, "vae/config.json")
