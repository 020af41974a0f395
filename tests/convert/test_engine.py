"""The rule engine: round trips, and every error that a checkpoint can have."""

# L layers

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arcflow_jax.convert import engine
from arcflow_jax.convert.engine import check, export_tensors, import_tensors, nearest
from arcflow_jax.convert.rules import (
    AS_IS,
    CONV,
    LINEAR,
    POINTWISE,
    SWAPPED,
    SWAPPED_LINEAR,
    Form,
    Rule,
    conv,
    fused,
    grouped,
    linear,
)
from arcflow_jax.errors import UserError
from arcflow_jax.networks.states import shapes_of

LAYERS = 3
SHAPES = {  # targets
    "proj.kernel": (3, 4),
    "proj.bias": (4,),
    "parts.0.conv.kernel": (3, 3, 2, 5),
    "parts.0.conv.bias": (5,),
    "parts.1.conv.kernel": (1, 1, 5, 2),
    "parts.1.conv.bias": (2,),
    "blocks.ff.kernel": (LAYERS, 2, 6),
    "blocks.ff.bias": (LAYERS, 6),
    "table": (7, 2),
}
TABLE = types.SimpleNamespace(
    RULES=(
        *linear("proj", "proj"),
        *conv("parts.{i}.conv", "parts.{i}.conv"),
        *linear("blocks.{layer}.ff.0", "blocks.ff"),
        Rule("shared.weight", "table"),
        Rule("optional.weight", "optional"),  # has no target here
    ),
    IGNORED=("position_ids", "blocks.{i}.inv_freq", "lm_head.*"),
    ALIASES={"embed_tokens": "shared", "model": ""},
)


def state_of(arrays) -> nnx.State:
    """A state with the given values, or abstract for shapes."""

    def leaf(x) -> nnx.Param:
        return nnx.Param(jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x)

    def keys(path: str) -> tuple:
        return tuple(int(part) if part.isdigit() else part for part in path.split("."))

    return nnx.from_flat_state([(keys(path), leaf(value)) for path, value in arrays.items()])


ABSTRACT = state_of(SHAPES)


def random_arrays(seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()}


def source(**changes) -> dict[str, np.ndarray]:
    """A checkpoint of `ABSTRACT`; `changes` replace tensors, or remove them if None."""
    tensors = export_tensors(TABLE, state_of(random_arrays()))
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def refused(tensors, **options) -> str:
    with pytest.raises(UserError) as caught:
        import_tensors(TABLE, tensors, ABSTRACT, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(dtype):
    arrays = random_arrays(dtype=dtype)
    tensors = export_tensors(TABLE, state_of(arrays))
    assert tensors["proj.weight"].shape == (4, 3)
    assert tensors["parts.0.conv.weight"].shape == (5, 2, 3, 3)
    assert [tensors[f"blocks.{layer}.ff.0.weight"].shape for layer in range(LAYERS)] == [(6, 2)] * LAYERS
    assert all(tensor.flags.c_contiguous and tensor.dtype == dtype for tensor in tensors.values())
    back = engine.flatten(import_tensors(TABLE, tensors, ABSTRACT))
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        assert back[path].dtype == dtype
        np.testing.assert_array_equal(np.asarray(back[path][...]), array)


def test_layouts_mean_the_same_function():
    tensors = source()
    state = engine.flatten(import_tensors(TABLE, tensors, ABSTRACT))
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_allclose(x @ state["proj.kernel"][...], tensors["proj.weight"] @ x, rtol=1e-6)
    assert state["parts.0.conv.kernel"][1, 2, 0, 4] == tensors["parts.0.conv.weight"][4, 0, 1, 2]
    assert state["blocks.ff.kernel"][2, 1, 5] == tensors["blocks.2.ff.0.weight"][5, 1]


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=4, max_dims=4, max_side=4)))
def test_forms_are_inverse_to_each_other(array):
    even = np.concatenate([array[0, 0], array[0, 0] + 1])
    forms = [(AS_IS, array), (CONV, array), (POINTWISE, array[:, :, :1, :1]), (LINEAR, array[0, 0])]
    for form, x in (*forms, (SWAPPED, even), (SWAPPED_LINEAR, even), (grouped(3, outputs=2), even)):
        np.testing.assert_array_equal(form.to_theirs(form.to_ours(x)), x)
    for form, x in ((AS_IS, array), (CONV, array), (LINEAR, array[0, 0]), (POINTWISE, array[0, 0])):
        np.testing.assert_array_equal(form.to_ours(form.to_theirs(x)), x)


def test_grouped_features_of_two_parts():
    """In the outputs and in the inputs of a layer, and of its LoRA."""
    order = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]  # two features of each part at a time
    weight = np.arange(24).reshape(12, 2)
    out, into = grouped(4, outputs=2), grouped(4, inputs=2)  # of four, two divide the six features of a part
    np.testing.assert_array_equal(out.to_ours(weight), weight[order].T)
    np.testing.assert_array_equal(into.to_ours(weight.T), weight[order])
    for form, transposed in ((out, False), (into, True)):
        a, b = form.lora
        x, plain, moved = np.arange(8).reshape(4, 2), *((b, a) if transposed else (a, b))
        np.testing.assert_array_equal(plain.to_ours(x), x.T)
        found = moved.to_ours(weight.T if transposed else weight)
        np.testing.assert_array_equal(found, weight[order] if transposed else weight[order].T)
        assert moved.to_theirs(found).shape == (weight.T if transposed else weight).shape


@settings(deadline=None, max_examples=30)
@given(st.sets(st.sampled_from(sorted(source())), min_size=1), st.sets(st.text("abc.", min_size=1, max_size=6)))
def test_missing_and_left_over_tensors_are_counted(removed, added):
    added = {f"extra.{name}" for name in added}
    tensors = {name: tensor for name, tensor in source().items() if name not in removed}
    message = refused(tensors | {name: np.zeros(1, np.float32) for name in added})
    assert f"{len(removed)} missing (" in message
    assert (f"{len(added)} left over (" in message) == bool(added)
    assert len(message) < 400


def test_one_error_lists_everything_that_is_wrong():
    message = refused(
        source(
            proj__weight=np.zeros((3, 4), np.float32),
            proj__bias=np.zeros(4, np.int32),
            shared__weight=None,
            blocks__3__ff__0__bias=np.zeros(6, np.float32),
        ),
        where="teacher",
    )
    assert message == (
        "teacher: 1 missing (shared.weight); 1 left over (blocks.3.ff.0.bias); 2 wrong "
        "(proj.bias is int32 instead of float32 or float16 or bfloat16, proj.weight is [3, 4] instead of [4, 3])"
    )


def test_layer_missing_in_the_middle():
    assert "1 missing (blocks.1.ff.0.weight)" in refused(source(blocks__1__ff__0__weight=None))


@pytest.mark.parametrize("name", ["proj.weight", "blocks.2.ff.0.bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(name, value):
    tensors = source()
    tensors[name].flat[-1] = value
    assert refused(tensors) == f"checkpoint: {name} holds NaN or infinite values in float32"


def test_a_value_below_the_least():
    table = types.SimpleNamespace(RULES=(Rule("variance", "variance", least=0.0),))
    good, bad = np.array([0, 2], np.float32), np.array([2, -0.25], np.float32)
    target = nnx.State({"variance": nnx.Param(good)})
    assert (import_tensors(table, {"variance": good}, target)["variance"][...] == good).all()
    with pytest.raises(UserError, match=r"^vae: variance holds -0.25, but has to be at least 0$"):
        import_tensors(table, {"variance": bad}, target, where="vae")


def test_overflow_of_the_chosen_dtype():
    tensors = source(proj__bias=np.full(4, 3.4e38, np.float32))
    assert "proj.bias holds NaN or infinite values in bfloat16" in refused(tensors, dtype=jnp.bfloat16)


def test_dtype():
    state = import_tensors(TABLE, source(), ABSTRACT, dtype=jnp.bfloat16)
    assert all(variable.dtype == jnp.bfloat16 for variable in engine.flatten(state).values())
    mixed = source(blocks__0__ff__0__bias=np.zeros(6, ml_dtypes.bfloat16), proj__bias=np.zeros(4, np.float16))
    state = engine.flatten(import_tensors(TABLE, mixed, ABSTRACT))
    assert state["blocks.ff.bias"].dtype == jnp.float32  # the widest of its layers
    assert state["proj.bias"].dtype == jnp.float16


def test_ignored_names():
    unused = {
        "position_ids": np.arange(3),
        "blocks.11.inv_freq": np.full(2, np.nan),
        "lm_head.any.thing": np.zeros(1, np.int8),
    }
    import_tensors(TABLE, source() | unused, ABSTRACT)
    for name in ("position_idsx", "blocks.x.inv_freq", "lm_head"):
        assert f"1 left over ({name})" in refused(source() | {name: np.zeros(1, np.float32)})


def test_aliases():
    tensors = {f"model.{name}": tensor for name, tensor in source().items() if name != "shared.weight"}
    tensors["embed_tokens.weight"] = source()["shared.weight"]
    state = import_tensors(TABLE, tensors, ABSTRACT)
    jax.tree.map(np.testing.assert_array_equal, state, import_tensors(TABLE, source(), ABSTRACT))
    assert "1 left over (embed_tokensx.weight)" in refused(source(embed_tokensx__weight=np.zeros(1, np.float32)))
    tensors["model.proj.bias"] = np.full(4, np.nan, np.float32)
    assert "model.proj.bias holds NaN" in refused(tensors)  # the name in the file, not the canonical one


def test_alias_beside_its_canonical_name():
    same = source()["shared.weight"].copy()
    import_tensors(TABLE, source(embed_tokens__weight=same), ABSTRACT)
    message = refused(source(embed_tokens__weight=same + 1))
    assert "shared.weight and embed_tokens.weight are two names of one tensor, but their values differ" in message


def test_nothing_is_read_before_all_names_and_shapes_are_right():
    class Unread:
        dtype = np.dtype(np.float32)

        def __init__(self, shape):
            self.shape = shape

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("read")

    lazy = {name: Unread(tensor.shape) for name, tensor in source().items()}
    assert len(list(check(TABLE, lazy, shapes_of(ABSTRACT), "lazy"))) == len(SHAPES)
    with pytest.raises(UserError):
        import_tensors(TABLE, lazy | {"proj.bias": Unread((5,))}, ABSTRACT)


def test_a_table_must_cover_every_target_once():
    with pytest.raises(ValueError, match=r"^table is the target of 0 rules"):
        import_tensors(types.SimpleNamespace(RULES=TABLE.RULES[:-2]), source(), ABSTRACT)
    twice = types.SimpleNamespace(RULES=(*TABLE.RULES, Rule("other", "table", Form(np.negative, np.negative))))
    with pytest.raises(ValueError, match=r"^table is the target of 2 rules"):
        import_tensors(twice, source(), ABSTRACT)


FUSED = types.SimpleNamespace(
    RULES=(
        *fused("blocks.{layer}.qkv", "blocks.q", "blocks.k", "blocks.v"),
        Rule("last.weight", "last.kernel", SWAPPED_LINEAR),
        Rule("last.bias", "last.bias", SWAPPED),
    )
)
FUSED_SHAPES = {
    **{f"blocks.{name}.kernel": (LAYERS, 4, width) for name, width in (("q", 2), ("k", 3), ("v", 5))},
    **{f"blocks.{name}.bias": (LAYERS, width) for name, width in (("q", 2), ("k", 3), ("v", 5))},
    "last.kernel": (4, 6),
    "last.bias": (6,),
}


def fused_source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"blocks.{i}.qkv.weight": (10, 4) for i in range(LAYERS)}
    shapes |= {f"blocks.{i}.qkv.bias": (10,) for i in range(LAYERS)} | {"last.weight": (6, 4), "last.bias": (6,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_fused_and_swapped():
    tensors = fused_source()
    state = import_tensors(FUSED, tensors, state_of(FUSED_SHAPES))
    arrays = {path: np.asarray(variable[...]) for path, variable in engine.flatten(state).items()}
    for i in range(LAYERS):
        weight, bias = tensors[f"blocks.{i}.qkv.weight"], tensors[f"blocks.{i}.qkv.bias"]
        for name, rows in (("q", slice(0, 2)), ("k", slice(2, 5)), ("v", slice(5, 10))):
            np.testing.assert_array_equal(arrays[f"blocks.{name}.kernel"][i], weight[rows].T)
            np.testing.assert_array_equal(arrays[f"blocks.{name}.bias"][i], bias[rows])
    order = [3, 4, 5, 0, 1, 2]
    np.testing.assert_array_equal(arrays["last.kernel"], tensors["last.weight"][order].T)
    np.testing.assert_array_equal(arrays["last.bias"], tensors["last.bias"][order])
    back = export_tensors(FUSED, state)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name], tensor)


def test_a_fused_tensor_is_reported_once():
    tensors = fused_source()
    del tensors["blocks.0.qkv.bias"]
    tensors["blocks.1.qkv.weight"] = np.zeros((11, 4), np.float32)
    with pytest.raises(UserError) as caught:
        import_tensors(FUSED, tensors, state_of(FUSED_SHAPES))
    assert str(caught.value) == (
        "checkpoint: 1 missing (blocks.0.qkv.bias); 1 wrong (blocks.1.qkv.weight is [11, 4] instead of [10, 4])"
    )


def test_the_nearest_table():
    tables = [TABLE, FUSED]
    assert nearest(tables, source()) is TABLE
    assert nearest(tables, fused_source()) is FUSED
    assert nearest(tables, [f"model.{name}" for name in source()]) is TABLE
    assert nearest(tables, ["blocks.0.qkv.weight", "unknown", "shared.weightx"]) is FUSED
    assert nearest(tables, ["unknown"]) is TABLE
