"""Qwen-Image's VAE against diffusers' AutoencoderKLQwenImage, through the rule table and the engine."""

# B batch, H, W image size, C latent channels

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import check, export_tensors, import_tensors
from arcflow_jax.convert.vaes import qwen as table
from arcflow_jax.errors import UserError
from arcflow_jax.networks import layers
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.vaes.qwen import AutoencoderKLQwenImage, AutoencoderKLQwenImageConfig
from tests.helpers.twins import relative_error

TINY = AutoencoderKLQwenImageConfig(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 2),
    num_res_blocks=1,
    latents_mean=(0.3, -1.2),
    latents_std=(2.5, 0.7),
)
# model config, and which levels downsample time
CONFIGS = {
    "two levels": (TINY, [False]),
    "four levels as Qwen-Image's": (
        dataclasses.replace(TINY, dim_mult=(1, 2, 4, 4), num_res_blocks=2),
        [False, True, True],
    ),
    "time downsampled at once": (dataclasses.replace(TINY, dim_mult=(2, 1, 3), base_dim=6), [True, False]),
}


def twin(config: AutoencoderKLQwenImageConfig, temporal: list[bool]):
    """diffusers' model with the same model config and random weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    del fields["sample_size"]
    model = diffusers.AutoencoderKLQwenImage(**fields, temperal_downsample=temporal).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if name.endswith("gamma") else 0.0
            scale = 0.3 if name.endswith(("gamma", "bias")) else weight[0].numel() ** -0.5
            weight.copy_(centre + scale * torch.randn_like(weight))
    return model


def abstract(config: AutoencoderKLQwenImageConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(layers.abstract(lambda: AutoencoderKLQwenImage(config, rngs=nnx.Rngs(0))))


def ours(model, config: AutoencoderKLQwenImageConfig) -> AutoencoderKLQwenImage:
    read = schema.parse(AutoencoderKLQwenImageConfig, dict(model.config), "config.json")
    assert read == config
    graphdef, state = abstract(read)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return nnx.merge(graphdef, import_tensors(table, tensors, state))


@nnx.jit
def both_ways(network: AutoencoderKLQwenImage, pixels, z):
    return network.encode(pixels), network.posterior(pixels)[1], network.decode(z)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name):
    torch = pytest.importorskip("torch")
    config, temporal = CONFIGS[name]
    model = twin(config, temporal)
    network = ours(model, config)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)  # [B, H, W, 3]
    z = rng.standard_normal((2, 16 // config.factor, 24 // config.factor, config.z_dim)).astype(np.float32)
    mean, std = (torch.tensor(x).reshape(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))

    def video(x):  # [B, H, W, C] -> [B, C, 1, H, W]
        return torch.from_numpy(x.transpose(0, 3, 1, 2)[:, :, None].copy())

    def image(x):
        return x[:, :, 0].numpy().transpose(0, 2, 3, 1)

    with torch.no_grad():
        posterior = model.encode(video(pixels)).latent_dist
        their_latents = (posterior.mean - mean) / std
        their_pixels = model.decode(video(z) * std + mean).sample
    with jax.default_matmul_precision("highest"):
        latents, log_variance, decoded = both_ways(network, pixels, z)
    assert relative_error(latents, image(their_latents)) < 1e-5
    assert relative_error(log_variance, image(posterior.logvar)) < 1e-5
    assert relative_error(decoded, image(their_pixels)) < 1e-5
    assert 0.05 < np.abs(np.asarray(decoded)).mean() < 0.95  # neither black nor all clipped


def test_full_size():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.AutoencoderKLQwenImage()
    _, state = abstract(schema.parse(AutoencoderKLQwenImageConfig, dict(model.config), "config.json"))
    # arrays of the checkpoint's shapes that take no memory
    tensors = {name: np.broadcast_to(np.float32(0), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    used = {name for fill, _ in check(table, tensors, shapes_of(state), "Qwen-Image's VAE") for name in fill.names}
    assert {name.split(".")[-2] for name in tensors.keys() - used} == {"time_conv"}
    assert len(tensors) - len(used) == 8  # two levels downsample time, and two upsample it


def test_round_trip():
    _, state = abstract(TINY)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), state)
    tensors = export_tensors(table, state)
    assert tensors["encoder.conv_in.weight"].shape == (4, 3, 3, 3, 3)
    assert not np.any(tensors["encoder.conv_in.weight"][:, :, :2])
    jax.tree.map(np.testing.assert_array_equal, import_tensors(table, tensors, state), state)


def test_decoder_in_bfloat16_and_alone():
    graphdef, state = abstract(TINY)
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(rng.standard_normal(x.shape) / np.prod(x.shape[:-1]) ** 0.5, jnp.float32)  # noqa: E731
    network = nnx.merge(graphdef, jax.tree.map(random, state))
    z = jax.random.normal(jax.random.key(0), (1, 8, 8, TINY.z_dim))
    decode = nnx.jit(AutoencoderKLQwenImage.decode)
    rounded = decode(network, z.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    decoded = decode(network, z)
    assert relative_error(rounded.astype(jnp.float32), decoded) < 0.05
    np.testing.assert_array_equal(decode(network.decoder_alone(), z), decoded)


def test_size_must_divide():
    with pytest.raises(ValueError, match="17×16"):
        nnx.eval_shape(lambda: AutoencoderKLQwenImage(TINY, rngs=nnx.Rngs(0)).encode(jnp.zeros((1, 17, 16, 3))))


def test_other_architectures_are_refused():
    with pytest.raises(UserError, match="attn_scales"):
        schema.parse(AutoencoderKLQwenImageConfig, dataclasses.asdict(TINY) | {"attn_scales": [0.5]}, "vae/config.json")
