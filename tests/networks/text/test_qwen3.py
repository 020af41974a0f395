"""Qwen3's language model against transformers', as diffusers' Flux2KleinPipeline calls it."""

# B batch, N tokens, D width

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import check
from arcflow_jax.convert.text import qwen3 as table
from arcflow_jax.errors import UserError
from arcflow_jax.networks import layers
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.text.qwen3 import READ, Qwen3Config, Qwen3Text
from tests.helpers.twins import (
    bfloat16_error,
    imported,
    language_scale,
    norm_centre,
    random_network,
    randomize,
    relative_error,
    rounding_bounds,
    run,
)

TINY = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
CONFIGS = {
    "shared keys": TINY,
    "one head of keys, more layers, other eps and frequencies": TINY
    | {"num_key_value_heads": 1, "num_hidden_layers": 30, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
}
FULL = TINY | {"vocab_size": 151_936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
FULL |= {"head_dim": 128}
QWEN3 = {
    "4B": FULL | {"hidden_size": 2560, "intermediate_size": 9728},
    "8B": FULL | {"hidden_size": 4096, "intermediate_size": 12_288},
}


def twin(config, device="cpu"):
    """transformers' model with the same model config and random weights."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config as TheirConfig
    from transformers import Qwen3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    with torch.device(device):
        model = Qwen3ForCausalLM(TheirConfig(**config, rope_parameters=rope)).eval()
    return randomize(model, language_scale, norm_centre) if device == "cpu" else model


def abstract(config) -> tuple[nnx.GraphDef, nnx.State]:
    read = schema.parse(Qwen3Config, config, "config.json")
    return nnx.split(layers.abstract(lambda: Qwen3Text(read, rngs=nnx.Rngs(0))))


def ours(model, dtype=jnp.float32) -> Qwen3Text:
    config = schema.parse(Qwen3Config, json.loads(model.config.to_json_string(use_diff=False)), "config.json")
    return imported(table, model, lambda: Qwen3Text(config, rngs=nnx.Rngs(0)), dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name):
    """In the padding as well, which FLUX.2 reads."""
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model = twin(config)
    ids = np.random.default_rng(0).integers(1, config["vocab_size"], (2, 20))
    ids[1, 7:] = 3  # which also stands in the prompts
    ids[0, 4] = 3
    padding = np.arange(20) >= np.array([[20], [7]])
    with torch.no_grad():
        states = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy((~padding).astype(np.int64)),
            output_hidden_states=True,
        ).hidden_states
    theirs = torch.stack([states[layer] for layer in READ], dim=2).reshape(2, 20, -1).numpy()
    marked = jnp.asarray(np.where(padding, ~ids, ids), jnp.int32)
    with jax.default_matmul_precision("highest"):
        hidden = run(ours(model), marked)
    assert hidden.shape == (2, 20, 3 * config["hidden_size"])
    assert relative_error(hidden, theirs) < 1e-5


def test_bfloat16_against_float32():
    """About twelve roundings in a row per layer: seven in attention, three in the MLP, two in the residual sums."""
    config = schema.parse(Qwen3Config, TINY, "config.json")
    encoder = random_network(lambda: Qwen3Text(config, rngs=nnx.Rngs(0)))
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (2, 20))
    least, most = rounding_bounds(12 * READ[-1])
    assert least < bfloat16_error(encoder, jnp.asarray(ids)) < most


@pytest.mark.parametrize("size", QWEN3)
def test_full_size_table(size):
    """Every key of the layers that are read is mapped; the others are left out."""
    model = twin(QWEN3[size], "meta")
    tensors = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in model.state_dict().items()}
    graphdef, state = abstract(QWEN3[size])
    used = {name for fill, _ in check(table, tensors, shapes_of(state), f"Qwen3-{size}") for name in fill.names}
    later = {f"model.layers.{number}." for number in range(27, 36)}
    left = tensors.keys() - used
    assert {name for name in left if not name.startswith(tuple(later))} == {"model.norm.weight", "lm_head.weight"}
    assert sum(np.prod(tensors[name].shape) for name in used) == sum(map(np.prod, shapes_of(state).values()))
    hidden = jax.eval_shape(run, nnx.merge(graphdef, state), jax.ShapeDtypeStruct((2, 512), jnp.int32))
    assert hidden.shape == (2, 512, 3 * QWEN3[size]["hidden_size"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_hidden_layers": 27}, r"num_hidden_layers is 27, but has to be above 27: .* after layers 9, 18, 27"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type"),
    ],
)
def test_other_architectures_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        schema.parse(Qwen3Config, TINY | setting, "config.json")
