"""FLUX.2's VAE against diffusers' AutoencoderKLFlux2 and what its pipeline does with the latents."""

# B batch, H, W image size, C latent channels

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import check, import_tensors
from arcflow_jax.convert.vaes import flux2 as table
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import pack, unpack
from arcflow_jax.networks import layers
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.vaes import vae as strips
from arcflow_jax.networks.vaes.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from tests.helpers.twins import randomize, relative_error, scale_centre, vae_scale

TINY = AutoencoderKLFlux2Config(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16
)
CONFIGS = {
    "two levels": TINY,
    "a smaller decoder, another eps": dataclasses.replace(
        TINY, block_out_channels=(8, 8, 16), decoder_block_out_channels=(4, 8, 8), batch_norm_eps=0.1
    ),
    "without the convolutions beside encoder and decoder": dataclasses.replace(
        TINY, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False
    ),
}
FULL = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
}


def twin(config, device="cpu"):
    """diffusers' model with the same model config and random weights and statistics."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    with torch.device(device):
        model = diffusers.AutoencoderKLFlux2(**config, **blocks).eval()
    if device == "cpu":
        randomize(model, vae_scale, scale_centre)
        with torch.no_grad():
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.2, 4.0)
    return model


def read(model) -> AutoencoderKLFlux2Config:
    """The config that the converter reads of a model that diffusers saved."""
    return schema.parse(AutoencoderKLFlux2Config, json.loads(model.to_json_string()), "config.json")


def abstract(config) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(layers.abstract(lambda: AutoencoderKLFlux2(config, rngs=nnx.Rngs(0))))


@nnx.jit
def both_ways(network: AutoencoderKLFlux2, pixels, z):
    return network.encode(pixels), network.posterior(pixels)[1], network.decode(z)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    model = twin(dataclasses.asdict(config))
    assert read(model) == config
    graphdef, state = abstract(config)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    network = nnx.merge(graphdef, import_tensors(table, tensors, state))
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)  # [B, H, W, 3]
    tokens = rng.standard_normal((2, (8 // config.factor) * (12 // config.factor), 16)).astype(np.float32)
    size = (8 // config.factor, 12 // config.factor)  # of tokens

    pipeline = diffusers.Flux2KleinPipeline
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).latent_dist
        patches = (pipeline._patchify_latents(posterior.mean) - mean) / deviation
        their_tokens = pipeline._pack_latents(patches)
        z = torch.from_numpy(tokens).permute(0, 2, 1).reshape(2, 16, *size) * deviation + mean
        their_pixels = model.decode(pipeline._unpatchify_latents(z)).sample
    with jax.default_matmul_precision("highest"):
        latents, log_variance, decoded = both_ways(network, pixels, unpack(jnp.asarray(tokens), *size))
    assert relative_error(pack(latents), their_tokens.numpy()) < 1e-5
    assert relative_error(log_variance, posterior.logvar.numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert relative_error(decoded, their_pixels.numpy().transpose(0, 2, 3, 1)) < 1e-5


def test_in_tiles_and_without_encoder(monkeypatch):
    graphdef, state = abstract(TINY)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0, 0.3, x.shape), jnp.float32), state)
    latents = jnp.asarray(rng.standard_normal((1, 8, 6, 4)), jnp.float32)
    whole = jax.jit(nnx.merge(graphdef, weights).decode)(latents)
    monkeypatch.setattr(strips, "STRIP", 2**6)
    alone = nnx.merge(graphdef, weights).decoder_alone()
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(alone))} == {"decoder"}
    np.testing.assert_allclose(jax.jit(lambda z: alone.decode(z, tiled=True))(latents), whole, rtol=1e-4, atol=1e-4)
    assert float(jnp.std(whole)) > 1e-3


def test_full_size_table():
    """Every key of the checkpoint is mapped, but for the count of the batches that the statistics are of."""
    model = twin(FULL, "meta")
    tensors = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in model.state_dict().items()}
    _, state = abstract(read(model))
    used = {name for fill, _ in check(table, tensors, shapes_of(state), "FLUX.2's VAE") for name in fill.names}
    assert tensors.keys() - used == {"bn.num_batches_tracked"}
    numbers = sum(tensor.numel() for name, tensor in model.state_dict().items() if name in used)
    assert sum(np.prod(shape) for shape in shapes_of(state).values()) == numbers


@pytest.mark.parametrize("setting", [{"act_fn": "gelu"}, {"patch_size": [1, 1]}])
def test_other_architectures_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        schema.parse(AutoencoderKLFlux2Config, dataclasses.asdict(TINY) | setting, "vae/config.json")
