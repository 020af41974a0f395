"""The T5 encoder against transformers' T5EncoderModel, through the rule table and the engine."""

# B batch, N tokens, D width

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import check, export_tensors, import_tensors
from arcflow_jax.convert.text import t5 as table
from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.demo.shapes import CAPTIONS
from arcflow_jax.errors import UserError
from arcflow_jax.networks import layers
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.text.t5 import T5Config, T5Encoder, distance_buckets
from tests.helpers.twins import bfloat16_error, imported, random_network, relative_error, rounding_bounds, run
from tools.tiny_teacher.text import new_t5, write_t5
from tools.tiny_teacher.tokenizers import make_t5_tokenizer

TINY = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
CONFIGS = {
    "square": TINY,
    "inner width other than D, few buckets": TINY
    | {"d_kv": 16, "num_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "one layer, one head, other eps": TINY | {"num_layers": 1, "num_heads": 1, "layer_norm_epsilon": 1e-3},
}
XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def twin(config, device="cpu"):
    """transformers' model with the same model config and random weights."""
    torch = pytest.importorskip("torch")
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel

    with torch.device(device):
        model = T5EncoderModel(TheirConfig(feed_forward_proj="gated-gelu", **config)).eval()
    if device == "cpu":
        torch.manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                centre = 1.0 if "layer_norm" in name else 0.0
                scale = 0.3 if weight.ndim == 1 or "shared" in name or "bias" in name else weight.shape[1] ** -0.5
                if name.endswith("q.weight"):
                    scale *= config["d_kv"] ** -0.5  # as T5 starts, in place of scaled scores
                weight.copy_(centre + scale * torch.randn_like(weight))
    return model


def ours(model, config, dtype=jnp.float32):
    parsed = schema.parse(T5Config, config, "config.json")
    return imported(table, model, lambda: T5Encoder(parsed, rngs=nnx.Rngs(0)), dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model = twin(config)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 40))
    ids[0, 25:] = 0  # padding, attended
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    hidden = run(ours(model, config), jnp.asarray(ids))
    assert hidden.shape == (2, 40, config["d_model"])
    assert relative_error(hidden, theirs) < 1e-5
    low = run(ours(model, config, jnp.bfloat16), jnp.asarray(ids))
    assert low.dtype == jnp.bfloat16
    assert relative_error(low, theirs) < 0.03


def test_bfloat16_against_float32():
    """About ten roundings in a row per layer: five in attention, three in the MLP, two in the residual sums."""
    config = schema.parse(T5Config, TINY, "config.json")

    def scale(path: str) -> float:
        return config.d_kv**-0.5 if path.endswith("attention.q.kernel") else 1.0  # T5 does not scale its scores

    encoder = random_network(lambda: T5Encoder(config, rngs=nnx.Rngs(0)), scale)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 40)))
    least, most = rounding_bounds(10 * config.num_layers)
    assert least < bfloat16_error(encoder, ids) < most


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (32, 512)])
def test_distance_buckets(buckets, max_distance):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(
        torch.from_numpy(distances), num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(distance_buckets(distances, buckets, max_distance), theirs.numpy())


def test_full_size_table():
    """FLUX.1-dev's text_encoder_2: every key is mapped, none is left over, shapes agree."""
    pytest.importorskip("torch")
    shapes = {
        name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in twin(XXL, "meta").state_dict().items()
    }
    encoder = layers.abstract(lambda: T5Encoder(T5Config(**XXL), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    state = nnx.state(encoder)
    del shapes["encoder.embed_tokens.weight"]  # the other name of shared.weight
    assert sum(len(tensors) for _, tensors in check(table, shapes, shapes_of(state), "T5-XXL")) == len(shapes) == 219
    assert sum(np.prod(shape) for shape in shapes_of(state).values()) == pytest.approx(4.76e9, rel=0.01)
    hidden = jax.eval_shape(run, encoder, jax.ShapeDtypeStruct((2, 512), jnp.int32))
    assert (hidden.shape, hidden.dtype) == ((2, 512, 4096), jnp.bfloat16)


def test_token_embedding_under_either_name():
    state = nnx.state(random_network(lambda: T5Encoder(T5Config(**TINY), rngs=nnx.Rngs(0))))
    tensors = export_tensors(table, state)
    vectors = tensors.pop("shared.weight")
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        loaded = import_tensors(table, tensors | dict.fromkeys(names, vectors), state)
        jax.tree.map(np.testing.assert_array_equal, loaded, state)
    with pytest.raises(UserError, match=r"1 missing \(shared.weight\)"):
        import_tensors(table, tensors, state)


def test_tiny_teacher_files(tmp_path):
    """transformers loads the files of the bundled teacher unchanged."""
    torch = pytest.importorskip("torch")
    from transformers import T5EncoderModel

    make_t5_tokenizer(tmp_path / "tokenizer", CAPTIONS.words())
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    encoder = random_network(lambda: new_t5(tokenizer, 64, nnx.Rngs(0)))
    write_t5(tmp_path / "encoder", tokenizer, encoder)
    model = T5EncoderModel.from_pretrained(tmp_path / "encoder").eval()
    ids, _ = tokenize(tokenizer, ["a small red ring at the top", ""], token_length(tokenizer))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).last_hidden_state
    assert relative_error(run(encoder, ids), theirs) < 1e-5


def test_other_architecture_is_refused():
    with pytest.raises(UserError, match="feed_forward_proj is 'relu'"):
        schema.parse(T5Config, TINY | {"feed_forward_proj": "relu"}, "config.json")
