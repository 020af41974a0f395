"""Qwen2.5-VL's language model against transformers', as diffusers' QwenImagePipeline calls it."""

# B batch, N tokens, D width

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import check, export_tensors, import_tensors
from arcflow_jax.convert.text import qwen2_5_vl as table
from arcflow_jax.errors import UserError
from arcflow_jax.networks import layers
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.text.qwen2_5_vl import Qwen2_5VLConfig, Qwen2_5VLText
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
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
CONFIGS = {
    "shared keys": TINY,
    "one head of keys, other eps and frequencies": TINY
    | {"num_key_value_heads": 1, "num_hidden_layers": 1, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
    "a head of keys each": TINY | {"num_key_value_heads": 4, "num_hidden_layers": 2},
}
QWEN_7B = TINY | {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "fullatt_block_indexes": [0]}


def twin(config, device="cpu"):
    """transformers' model with the same model config, including a vision tower, and random weights."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    part = config["hidden_size"] // config["num_attention_heads"] // 2
    rope = {"rope_type": "default", "mrope_section": [part - 2 * (part // 3), part // 3, part // 3]}
    text = config | {"rope_parameters": rope | {"rope_theta": config["rope_theta"]}, "pad_token_id": 0}
    their_config = Qwen2_5_VLConfig(text_config=text, vision_config=VISION | {"out_hidden_size": config["hidden_size"]})
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(their_config).eval()
    return randomize(model, language_scale, norm_centre) if device == "cpu" else model


def abstract(config) -> tuple[nnx.GraphDef, nnx.State]:
    read = schema.parse(Qwen2_5VLConfig, config, "config.json")
    return nnx.split(layers.abstract(lambda: Qwen2_5VLText(read, rngs=nnx.Rngs(0))))


def ours(model, dtype=jnp.float32) -> Qwen2_5VLText:
    config = schema.parse(Qwen2_5VLConfig, json.loads(model.config.to_json_string(use_diff=False)), "config.json")
    return imported(table, model, lambda: Qwen2_5VLText(config, rngs=nnx.Rngs(0)), dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name):
    """With either padding side: diffusers' pipeline keeps the states of the tokens that are not padding."""
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model = twin(config)
    lengths = (40, 13)
    ids = np.random.default_rng(0).integers(1, config["vocab_size"], (2, 40))
    ids[1, 13:] = 0
    hidden = run(ours(model), jnp.asarray(ids))
    assert hidden.shape == (2, 40, config["hidden_size"])
    rounded = run(ours(model, jnp.bfloat16), jnp.asarray(ids))
    assert rounded.dtype == jnp.bfloat16
    for side in ("right", "left"):
        theirs = ids if side == "right" else np.stack([ids[0], np.roll(ids[1], 27)])
        mask = torch.from_numpy((theirs != 0).astype(np.int64))
        with torch.no_grad():
            states = model(
                input_ids=torch.from_numpy(theirs.copy()), attention_mask=mask, output_hidden_states=True
            ).hidden_states[-1]
        for i, length in enumerate(lengths):
            kept = states[i][mask[i].bool()].numpy()
            assert relative_error(hidden[i, :length], kept) < 1e-5
            assert relative_error(rounded[i, :length], kept) < 0.05


def test_bfloat16_against_float32():
    """About twelve roundings in a row per layer: seven in attention, three in the MLP, two in the residual sums."""
    config = schema.parse(Qwen2_5VLConfig, TINY, "config.json")
    encoder = random_network(lambda: Qwen2_5VLText(config, rngs=nnx.Rngs(0)))
    ids = jnp.asarray(np.random.default_rng(0).integers(1, config.vocab_size, (2, 40)))
    least, most = rounding_bounds(12 * config.num_hidden_layers)
    assert least < bfloat16_error(encoder, ids) < most


def test_full_size_table():
    """Qwen-Image's text_encoder: every key of the language model is mapped, and only the vision tower is left out."""
    pytest.importorskip("torch")
    tensors = {
        name: np.broadcast_to(np.float32(0), tensor.shape)
        for name, tensor in twin(QWEN_7B, "meta").state_dict().items()
    }
    graphdef, state = abstract(QWEN_7B)
    used = {name for fill, _ in check(table, tensors, shapes_of(state), "Qwen2.5-VL-7B") for name in fill.names}
    assert {name for name in tensors.keys() - used if "visual" not in name} == {"lm_head.weight"}
    assert sum(np.prod(shape) for shape in shapes_of(state).values()) == 7_070_619_136
    hidden = jax.eval_shape(run, nnx.merge(graphdef, state), jax.ShapeDtypeStruct((2, 546), jnp.int32))
    assert hidden.shape == (2, 546, 3584)


def test_names_before_and_since_transformers_4_52():
    _, state = abstract(TINY)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), state)
    tensors = export_tensors(table, state)
    newer = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    vision = np.zeros(3, np.float32)
    for source in (tensors | {"visual.merger.ln_q.weight": vision}, newer | {"model.visual.blocks.0.x": vision}):
        jax.tree.map(np.testing.assert_array_equal, import_tensors(table, source, state), state)
    with pytest.raises(UserError, match="left over"):
        import_tensors(table, tensors | {"model.vision.weight": vision}, state)


def test_config_before_and_since_transformers_5():
    flat = TINY | {"rope_theta": 500.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    nested = {"hidden_size": 99, "text_config": TINY | {"rope_parameters": rope}}
    assert schema.parse(Qwen2_5VLConfig, flat, "old") == schema.parse(Qwen2_5VLConfig, nested, "new")
    assert schema.parse(Qwen2_5VLConfig, flat, "old").rope_theta == 500.0
    for setting in ({"rope_scaling": {"rope_type": "yarn"}}, {"use_sliding_window": True}):
        with pytest.raises(UserError, match=r"rope_type|use_sliding_window"):
            schema.parse(Qwen2_5VLConfig, TINY | setting, "config.json")
