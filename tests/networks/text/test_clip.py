"""CLIP's text encoder against transformers' CLIPTextModel, through the rule table and the engine."""

# B batch, N tokens, D width

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import check, export_tensors, import_tensors
from arcflow_jax.convert.text import clip as table
from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.demo.shapes import CAPTIONS
from arcflow_jax.errors import UserError
from arcflow_jax.networks import layers
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.text.clip import CLIPTextConfig, CLIPTextEncoder
from tests.helpers.twins import (
    imported,
    language_scale,
    random_network,
    randomize,
    relative_error,
    run,
    scale_centre,
)
from tools.tiny_teacher.text import new_clip, write_clip
from tools.tiny_teacher.tokenizers import make_clip_tokenizer

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 40,
    "pad_token_id": 40,
}
CONFIGS = {
    "first end token": TINY,
    "legacy end token": TINY | {"eos_token_id": 2, "num_hidden_layers": 1},
    "gelu, one head": TINY | {"hidden_act": "gelu", "num_attention_heads": 1, "layer_norm_eps": 1e-3},
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "eos_token_id": 2,
}


def twin(config, device="cpu"):
    """transformers' model with the same model config and random weights."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextConfig as TheirConfig
    from transformers import CLIPTextModel

    with torch.device(device):
        model = CLIPTextModel(TheirConfig(**config)).eval()
    return randomize(model, language_scale, scale_centre) if device == "cpu" else model


def ours(model, config, dtype=jnp.float32):
    parsed = schema.parse(CLIPTextConfig, config, "config.json")
    return imported(table, model, lambda: CLIPTextEncoder(parsed, rngs=nnx.Rngs(0)), dtype)


def prompts_ids():
    """[3, 20]: prompts of several lengths, then the end token 40, in the first also as padding; the last has none.

    Other ids are below and above that of the end token, so its first position differs from that of the highest id.
    """
    rng = np.random.default_rng(0)
    ids = rng.choice([*range(3, 40), *range(41, 60)], (3, 20))
    ids[0, 7:] = 40
    ids[1, 12] = 40
    return ids


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model = twin(config)
    ids = prompts_ids()
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids))
    hidden, pooled = run(ours(model, config), jnp.asarray(ids))
    assert relative_error(hidden, theirs.last_hidden_state) < 1e-5
    assert relative_error(pooled, theirs.pooler_output) < 1e-5
    low_hidden, low_pooled = run(ours(model, config, jnp.bfloat16), jnp.asarray(ids))
    assert low_hidden.dtype == low_pooled.dtype == jnp.bfloat16
    assert relative_error(low_hidden, theirs.last_hidden_state) < 0.03
    assert relative_error(low_pooled, theirs.pooler_output) < 0.03


def test_full_size_table():
    """FLUX.1-dev's text_encoder, CLIP-L: every key is mapped, none is left over, shapes agree."""
    pytest.importorskip("torch")
    shapes = {
        name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in twin(CLIP_L, "meta").state_dict().items()
    }
    encoder = layers.abstract(
        lambda: CLIPTextEncoder(schema.parse(CLIPTextConfig, CLIP_L, "config.json"), rngs=nnx.Rngs(0))
    )
    state = nnx.state(encoder)
    assert sum(len(tensors) for _, tensors in check(table, shapes, shapes_of(state), "CLIP-L")) == len(shapes) == 196
    assert sum(np.prod(shape) for shape in shapes_of(state).values()) == 123_060_480
    hidden, pooled = jax.eval_shape(run, encoder, jax.ShapeDtypeStruct((2, 77), jnp.int32))
    assert (hidden.shape, pooled.shape) == ((2, 77, 768), (2, 768))


def test_names_with_and_without_prefix():
    config = schema.parse(CLIPTextConfig, TINY, "config.json")
    state = nnx.state(random_network(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0))))
    prefixed = export_tensors(table, state)
    assert all(name.startswith("text_model.") for name in prefixed)
    prefixed["text_model.embeddings.position_ids"] = np.arange(20)[None]  # in files of older transformers
    bare = {name.removeprefix("text_model."): tensor for name, tensor in prefixed.items()}
    for tensors in (prefixed, bare):
        jax.tree.map(np.testing.assert_array_equal, import_tensors(table, tensors, state), state)


def test_tiny_teacher_files(tmp_path):
    """transformers loads the files of the bundled teacher unchanged."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextModel

    make_clip_tokenizer(tmp_path / "tokenizer", CAPTIONS.words())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    encoder = random_network(lambda: new_clip(tokenizer, 64, nnx.Rngs(0)))
    write_clip(tmp_path / "encoder", tokenizer, encoder)
    model = CLIPTextModel.from_pretrained(tmp_path / "encoder").eval()
    ids, _ = tokenize(tokenizer, ["a small red ring at the top", ""], token_length(tokenizer))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).pooler_output
    assert relative_error(run(encoder, ids)[1], theirs) < 1e-5


def test_too_many_tokens():
    config = schema.parse(CLIPTextConfig, TINY, "config.json")
    encoder = random_network(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="21 tokens"):
        encoder(jnp.zeros((1, 21), jnp.int32))


def test_unknown_activation_is_refused():
    with pytest.raises(UserError, match="hidden_act is 'relu'"):
        schema.parse(CLIPTextConfig, TINY | {"hidden_act": "relu"}, "config.json")
