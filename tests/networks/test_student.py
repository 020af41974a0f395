"""Teacher and student on one base model, against the authors' values (cases 06a to 06d) and peft."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from arcflow_jax.convert.adapter import AdapterTable
from arcflow_jax.convert.backbones import flux as table
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.errors import UserError
from arcflow_jax.families.flux import FAMILY
from arcflow_jax.networks import layers
from arcflow_jax.networks.backbones.flux import Flux, FluxConfig
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.networks.layers import Base, Linear, LoRA
from arcflow_jax.networks.lora import merged_kernel
from arcflow_jax.networks.student import AdapterConfig, ArcModel, merged_graphdef, merged_state, split_model
from configs.flux import get_config
from tests.helpers import golden
from tests.helpers.paths import GOLDEN
from tests.helpers.students import curve
from tests.helpers.twins import flux_inputs, flux_twin_output, relative_error, velocity


@nnx.jit
def initialize(model: ArcModel) -> None:
    model.initialize_student(jax.random.key(0))


def test_golden_06a_head_starts_from_the_teacher():
    values = golden.student_case("06a")
    model = golden.authors_student(golden.LORA)
    model.head.initialize_from(model.output, values["inputs/randn_1"].reshape(4, 16))
    for name in ("means", "logweights", "loggamma"):
        layer = getattr(model.head, f"proj_out_{name}")
        np.testing.assert_allclose(layer.kernel[...].T, values[f"outputs/proj_out_{name}.weight"], atol=1e-6)
        np.testing.assert_allclose(layer.bias[...], values[f"outputs/proj_out_{name}.bias"], atol=1e-6)


def test_golden_06b_teacher_velocity():
    values = golden.student_case("06b")
    model = golden.authors_student(golden.LORA)
    positive = velocity(model, *golden.student_inputs(values))
    assert relative_error(positive, golden.tokens(values["outputs/u"])) < 1e-5
    negative = velocity(model, *golden.student_inputs(values, prefix="neg_"))
    guided = positive + 3 * (positive - negative)
    assert relative_error(guided, golden.tokens(values["outputs/u_cfg4"])) < 2e-5


def test_cfg_is_both_calls_in_one():
    """Each example with its own negative prompt. The guidance embedding gets 1."""
    values = golden.student_case("06b")
    model = golden.authors_student(golden.LORA)
    tokens, sigma, positive = golden.student_inputs(values)
    _, _, negative = golden.student_inputs(values, prefix="neg_")
    unguided = (dataclasses.replace(c, guidance=jnp.ones(len(tokens))) for c in (positive, negative))
    u, away = (velocity(model, tokens, sigma, c) for c in unguided)
    guided = velocity(model, tokens, sigma, Guided(positive, negative, 4.0))
    assert relative_error(guided, away + 4 * (u - away)) < 1e-5
    assert relative_error(u, away) > 0.1


def test_golden_06c_student_without_lora():
    values = golden.student_case("06c")
    model = golden.authors_student(
        dataclasses.replace(golden.LORA, targets=()), load_file(GOLDEN / "06c_head.safetensors")
    )
    golden.check_mixture(curve(model, *golden.student_inputs(values)), values)


def test_golden_06d_student_with_lora():
    values = golden.student_case("06d")
    exported = load_file(golden.RELEASED / "diffusion_pytorch_model.safetensors")
    model = golden.authors_student(golden.LORA, exported)
    golden.check_mixture(curve(model, *golden.student_inputs(values)), values)
    assert json.loads((golden.RELEASED / "config.json").read_text())["num_gaussians"] == golden.LORA.modes


def test_student_starts_as_the_teacher():
    model = golden.authors_student(golden.LORA)
    tokens, sigma, conditioning = flux_inputs(golden.TEACHER)
    model.head.initialize_from(model.output, jnp.zeros((4, 16)))
    mixture = curve(model, tokens, sigma, conditioning)
    mean = mixture.means.mean(2).reshape(tokens.shape)
    assert relative_error(mean, np.asarray(velocity(model, tokens, sigma, conditioning))) < 1e-5


def test_lora_is_peft():
    torch, peft, diffusers = map(pytest.importorskip, ("torch", "peft", "diffusers"))
    torch.manual_seed(0)
    twin = diffusers.FluxTransformer2DModel(**dataclasses.asdict(golden.TEACHER)).eval()
    tensors = {name: tensor.numpy().copy() for name, tensor in twin.state_dict().items()}
    targets = r".*\.(ff\.net\.0\.proj|ff\.net\.2|proj_mlp)|single_transformer_blocks\.\d+\.proj_out"
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets), twin)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    lora = {name.replace(".default", ""): t.numpy() for name, t in twin.state_dict().items() if "lora" in name}

    config = AdapterConfig(
        modes=1,
        rank=3,
        alpha=6,
        dropout=0.0,
        targets=("transformer_blocks.ff.*", "single_transformer_blocks.proj_*"),
    )
    graphdef, base, state = split_model(layers.abstract(lambda: golden.new_student(config)))
    head = {key: value for key, value in nnx.to_flat_state(state) if key[0] == "head"}
    lora_state = nnx.from_flat_state([(k, v) for k, v in nnx.to_flat_state(state) if k[0] != "head"])
    lora_state = import_tensors(AdapterTable(table), lora, lora_state)
    zeros = nnx.from_flat_state([(k, v.replace(jnp.zeros(v.shape))) for k, v in head.items()])
    base = import_tensors(table, tensors, base)
    model = nnx.merge(graphdef, base, nnx.merge_state(lora_state, zeros))

    # With the teacher's output layer as its head, the student is the twin with its adapters
    model.head.initialize_from(model.output, jnp.zeros((1, 16)))
    tokens, sigma, c = flux_inputs(golden.TEACHER)
    ours = curve(model, tokens, sigma, c).means.reshape(tokens.shape)
    theirs = flux_twin_output(twin, tokens, sigma, c)
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(velocity(model, tokens, sigma, c), theirs) > 1e-2


def test_gradient_and_dropout_reach_the_adapter_only():
    model = golden.authors_student(golden.LORA)
    initialize(model)
    graphdef, base, adapter = split_model(model)
    tokens, sigma, conditioning = flux_inputs(golden.TEACHER)

    def loss(adapter, key):
        mixture = nnx.merge(graphdef, base, adapter).student_curve(tokens, sigma, conditioning, key)
        return (mixture.means**2).mean() + (mixture.log_momenta**2).mean()

    grads = jax.jit(jax.grad(loss))(adapter, None)
    names = {".".join(map(str, path)): np.abs(value[...]).max() for path, value in nnx.to_flat_state(grads)}
    assert len([name for name in names if name.endswith("lora.b")]) == 8
    for name, size in names.items():
        # B is zero at first, so A has no gradient yet
        expected_zero = name.endswith("lora.a") or "logweights" in name
        assert (size == 0) == expected_zero, name
    assert not any(isinstance(v, Base) for _, v in nnx.to_flat_state(adapter))


def test_lora_dropout_is_drawn_per_layer_and_from_the_key():
    config = dataclasses.replace(golden.LORA, dropout=0.5)
    model = golden.authors_student(config)
    initialize(model)
    for path, module in nnx.iter_modules(model):
        if path and path[-1] == "lora":
            module.b[...] = jnp.ones_like(module.b[...])
    args = flux_inputs(golden.TEACHER)
    a, again, b = (curve(model, *args, jax.random.key(seed)).means for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert not np.allclose(a, b)
    assert not np.allclose(a, curve(model, *args).means)


def test_merged_student_is_the_student():
    exported = load_file(golden.RELEASED / "diffusion_pytorch_model.safetensors")
    model = golden.authors_student(golden.LORA, exported)
    args = flux_inputs(golden.TEACHER)
    expected = curve(model, *args)
    graphdef, base, adapter = split_model(model)
    merged = nnx.merge(merged_graphdef(graphdef, base, adapter), merged_state(graphdef, base, adapter))
    assert not any("lora" in map(str, path) for path, _ in nnx.to_flat_state(nnx.state(merged)))
    assert relative_error(curve(merged, *args).means, np.asarray(expected.means)) < 1e-5
    # Without LoRA the result would be another
    assert relative_error(velocity(model, *args), np.asarray(velocity(merged, *args))) > 1e-3


@pytest.mark.parametrize("layers", [(), (3,)])
def test_lora_starts_normal_with_standard_deviation_one_over_r(layers):
    """A ~ N(0, 1/r²), peft's "gaussian", and B = 0. Bounds are five standard errors of each statistic."""
    rank, d_in = 256, 640
    linear = Linear(d_in, 8, rngs=nnx.Rngs(0))
    linear.kernel.set_value(jnp.zeros((*layers, d_in, 8)))
    lora = LoRA(linear.kernel, rank, alpha=rank, dropout=0.0, salt=1)
    lora.initialize(jax.random.key(0))
    a = np.asarray(lora.a[...], np.float64) * rank
    n = a.size
    assert a.shape == (*layers, d_in, rank)
    assert abs(a.mean()) < 5 / n**0.5
    assert abs(a.std() - 1) < 5 / (2 * n) ** 0.5  # the standard error of a standard deviation, σ/√(2n)
    for width, share in ((1.0, 0.682689), (2.0, 0.954500)):  # what a normal distribution has within ±width
        assert abs((np.abs(a) < width).mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert not lora.b[...].any()


def test_layers_start_from_different_random_numbers():
    model = golden.authors_student(golden.LORA)
    initialize(model)
    first, second = model.backbone.transformer_blocks.ff, model.backbone.transformer_blocks.ff_context
    assert first.proj_in.lora.a.shape == second.proj_in.lora.a.shape
    assert not np.array_equal(first.proj_in.lora.a[...], second.proj_in.lora.a[...])


@pytest.mark.parametrize(("dtype", "step"), [(jnp.float32, 2**-23), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_merged_kernel_against_float64(lead, dtype, step):
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.standard_normal((*lead, *shape)) for shape in ((24, 40), (24, 5), (5, 40)))
    kernel, a, b = jnp.asarray(kernel, dtype), jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    merged = jax.jit(merged_kernel)(kernel, a, b, 0.5)
    exact = np.float64(kernel) + np.float64(a) @ np.float64(b) * 0.5
    assert merged.dtype == dtype
    # Half a step of the result, and what float32 loses in sums of numbers of the size of one
    np.testing.assert_allclose(np.float64(merged), exact, rtol=step / 2, atol=1e-5)


def test_lora_target_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"'transformer_blocks\.mlp\.\*' matches no linear layer"):
        layers.abstract(
            lambda: golden.new_student(dataclasses.replace(golden.LORA, targets=("transformer_blocks.mlp.*",)))
        )


def test_published_student_of_flux_dev_is_the_authors():
    """Shapes only. The counts are those of the authors' own model; test_recipes has the shares of all recipes."""
    config = FluxConfig(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )
    adapter = AdapterConfig(**get_config("published").adapter).with_targets(FAMILY.lora_targets)

    def build() -> ArcModel:
        rngs = nnx.Rngs(0)
        return ArcModel(Flux(config, rngs=rngs), param_dtype=jnp.bfloat16, rngs=rngs).attach_student(adapter, rngs)

    _, base, trained = split_model(layers.abstract(build))
    counts = [sum(math.prod(x.shape) for x in jax.tree.leaves(state)) for state in (base, trained)]
    assert counts == [11_901_408_320, 652_405_884]
