"""Style LoRAs in the pipeline: what they change, and what they do not compile; teachers, students, int8."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import generate
from arcflow_jax.cli.app import main
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.families import text
from arcflow_jax.flow.curve import Span
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.models.quantize import quantize_model
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.networks.states import flatten
from arcflow_jax.networks.style import padded
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.safetensors import write_tensors
from tests.helpers.loras import LAYERS, OUTPUT, TEXT, write_lora
from tests.helpers.random_student import write_adapter
from tests.helpers.twins import relative_error
from tools.train_style_lora import export, train

# Those of `random_student.ADAPTER`
ADAPTER_LAYERS = (
    "transformer_blocks.ff.proj_in",
    "transformer_blocks.ff.proj_out",
    "single_transformer_blocks.proj_out",
)


@pytest.fixture(scope="module")
def student(tiny_flux, tmp_path_factory) -> Path:
    return write_adapter(tiny_flux, tmp_path_factory.mktemp("student") / "run", seed=0)


@pytest.fixture(scope="module")
def teacher_pipe(tiny_flux) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(tiny_flux)


@pytest.fixture(scope="module")
def student_pipe(tiny_flux, student) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(tiny_flux, student)


@pytest.fixture(params=["teacher", "student"])
def pipe(request) -> ArcFlowPipeline:
    pipe = request.getfixturevalue(f"{request.param}_pipe")
    yield pipe
    pipe.unload_lora_weights()


def latents(pipe: ArcFlowPipeline, prompt: str = "a red circle") -> np.ndarray:
    """The latent tokens of an image in two steps."""
    return pipe(prompt, num_inference_steps=2, output_type="latent").images


def compiled() -> list[int]:
    """How many programs of each kind have been compiled."""
    return [f._cache_size() for f in (generate.sample_student, generate.sample_teacher, text.apply_encoder)]


def test_switching_compiles_nothing(pipe, tmp_path):
    plain = latents(pipe)
    first = pipe.load_lora_weights(write_lora(tmp_path / "first.safetensors"), scale=0.5)
    results = [latents(pipe)]
    before = compiled()
    second = pipe.load_lora_weights(write_lora(tmp_path / "second.safetensors", seed=1, rank=9), "second")
    assert (first, second) == ("default_0", "second")
    results.append(latents(pipe))  # 4 + 9 fit into 16
    for names, weights in (("second", None), ([first, second], [2, -1.0]), ([second], 0.3)):
        pipe.set_adapters(names, weights)
        results.append(latents(pipe))
    pipe.set_adapters([])
    assert "loras" not in pipe.described()
    np.testing.assert_array_equal(latents(pipe), plain)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(latents(pipe), plain)
    pipe.load_lora_weights(write_lora(tmp_path / "third.safetensors", seed=2, rank=16))
    results.append(latents(pipe))
    assert compiled() == before
    for i, result in enumerate(results):
        assert all(relative_error(result, other) > 1e-3 for other in [plain, *results[:i]]), i


def test_a_lora_that_does_not_fit_into_memory_is_not_loaded(teacher_pipe, tmp_path, monkeypatch):
    first = teacher_pipe.load_lora_weights(write_lora(tmp_path / "first.safetensors"))
    before = teacher_pipe.described()

    def full() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    second = write_lora(tmp_path / "second.safetensors", seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(teacher_pipe, "_apply", full)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            teacher_pipe.load_lora_weights(second, "second")
    teacher_pipe.set_adapters(first)
    assert teacher_pipe.described() == before
    with pytest.raises(UserError, match="no LoRA 'second' is loaded, only 'default_0'"):
        teacher_pipe.set_adapters("second")


def test_a_larger_rank_or_more_layers_compile_once(teacher_pipe, tmp_path):
    pipe = teacher_pipe
    pipe.load_lora_weights(write_lora(tmp_path / "small.safetensors"), "small")
    latents(pipe)
    before = compiled()
    more = LAYERS | {"transformer.x_embedder": (128, 16)}
    pipe.load_lora_weights(write_lora(tmp_path / "large.safetensors", seed=1, rank=17, layers=more), "large")
    latents(pipe)
    once = compiled()
    assert once == [before[0], before[1] + 1, before[2]]
    for names in ("small", "large", ["small", "large"], []):  # ranks do not shrink again
        pipe.set_adapters(names)
        latents(pipe)
    assert compiled() == once
    pipe.unload_lora_weights()


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 256, 257])
def test_padded_ranks(rank):
    assert padded(rank) >= max(rank, 16)
    assert padded(rank) in (16, 2 * rank, *(2**i for i in range(5, 10)))
    assert padded(rank) < 2 * max(rank, 9)


def test_beside_the_weights_is_as_in_the_weights(tiny_flux, pipe, tmp_path):
    """Of a pair of LoRAs, in float32; and fused, the network runs the program of the plain one."""
    pipe.fuse_lora()  # of none
    assert "fused" not in pipe.described()
    before = latents(pipe)
    pipe.load_lora_weights(write_lora(tmp_path / "a.safetensors"), scale=0.7)
    pipe.load_lora_weights(write_lora(tmp_path / "b.safetensors", seed=1, layers=LAYERS | OUTPUT), scale=-0.4)
    apart = latents(pipe)
    assert relative_error(before, apart) > 0.01
    described = pipe.described()
    assert described["loras"] == f"{tmp_path / 'a.safetensors'}:0.7, {tmp_path / 'b.safetensors'}:-0.4"
    programs, kept = compiled(), jax.tree.map(jnp.copy, pipe.transformer.state)
    try:
        pipe.fuse_lora()
        assert relative_error(latents(pipe), apart) < 1e-4
        assert compiled() == programs
        assert pipe.described()["fused"] == described["loras"]
        assert "loras" not in pipe.described()
    finally:
        pipe.transformer.state = kept
        del pipe.origin["fused"]


def test_converted_with_a_lora(tiny_flux, teacher_pipe, tmp_path):
    """It is another base, and makes the images of the LoRA beside the weights. Its text encoder is changed as well."""
    layers = LAYERS | {"text_encoder.text_model.encoder.layers.0.mlp.fc1": clip_shape(teacher_pipe)}
    file = write_lora(tmp_path / "lora.safetensors", layers=layers, strength=0.5)
    out = tmp_path / "fused"
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--source", str(ASSETS / "tiny-flux"), "--out", str(out), "--lora", f"{file}:0.8"])
    assert not caught.value.code
    fused, plain = ModelDirectory.open(out), ModelDirectory.open(tiny_flux)
    assert fused.fingerprint != plain.fingerprint
    prints = [{name: c.fingerprint for name, c in d.description.components.items()} for d in (fused, plain)]
    assert {name for name in prints[0] if prints[0][name] != prints[1][name]} == {"transformer", "text_encoder"}
    without = latents(teacher_pipe)
    teacher_pipe.load_lora_weights(file, scale=0.8)
    expected = latents(teacher_pipe)
    teacher_pipe.unload_lora_weights()
    ours = latents(ArcFlowPipeline.from_pretrained(out))
    # The bundled teacher's weights are stored with 11 bits, which the sums are rounded to
    assert relative_error(ours, expected) < 0.1 * relative_error(without, expected)


def clip_shape(pipe: ArcFlowPipeline) -> tuple[int, int]:
    config = pipe.directory.config("text_encoder")
    return config.intermediate_size, config.hidden_size


@pytest.mark.slow
def test_quantized_weights(tiny_flux, tmp_path):
    """The LoRA is not quantized: it changes the result of a quantized network as it changes that of a plain one."""
    quantized = quantize_model(tiny_flux, tmp_path / "int8", "int8")
    file = write_lora(tmp_path / "lora.safetensors", strength=2.0)
    changes = []
    for model in (tiny_flux, quantized):
        pipe = ArcFlowPipeline.from_pretrained(model)
        without = latents(pipe)
        pipe.load_lora_weights(file)
        changes.append(latents(pipe) - without)
    assert relative_error(*changes) < 0.1
    with pytest.raises(UserError, match="cannot be fused into quantized weights: leave it beside them"):
        pipe.fuse_lora()


def test_offloaded_weights(tiny_flux, teacher_pipe, tmp_path):
    """The LoRA is the same beside weights that wait in host memory, and cannot be fused into them."""
    file = write_lora(tmp_path / "lora.safetensors")
    teacher_pipe.load_lora_weights(file)
    expected = latents(teacher_pipe)
    teacher_pipe.unload_lora_weights()
    offloaded = ArcFlowPipeline.from_pretrained(tiny_flux, offload=True)
    offloaded.load_lora_weights(file)
    np.testing.assert_allclose(latents(offloaded), expected, atol=1e-5)
    with pytest.raises(UserError, match="cannot be fused into offloaded weights"):
        offloaded.fuse_lora()


def test_text_encoders(teacher_pipe, tmp_path):
    """A LoRA on CLIP and T5 alone changes their outputs, and nothing after it is unloaded."""
    pipe = teacher_pipe
    rows, columns = pipe.grid()

    def encode() -> list[np.ndarray]:
        c = pipe.encode(["a red circle"], guidance=1.0, rows=rows, columns=columns)
        return [np.asarray(c.text), np.asarray(c.pooled)]

    t5 = pipe.directory.config("text_encoder_2")
    layers = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": clip_shape(pipe),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_v": (t5.num_heads * t5.d_kv, TEXT),
    }
    plain = encode()
    pipe.load_lora_weights(write_lora(tmp_path / "text.safetensors", layers=layers), "text")
    styled, programs = encode(), compiled()
    assert all(relative_error(*pair) > 0.01 for pair in zip(plain, styled, strict=True))
    pipe.set_adapters("text", 0.0)
    assert all(np.array_equal(*pair) for pair in zip(plain, encode(), strict=True))
    assert compiled() == programs
    pipe.unload_lora_weights()
    assert all(np.array_equal(*pair) for pair in zip(plain, encode(), strict=True))


def test_output_layer_of_a_student(student_pipe, tmp_path):
    """The student's own output layer takes it: at the start of a segment, its velocity changes as the teacher's."""
    pipe, rng = student_pipe, np.random.default_rng(0)
    file = write_lora(tmp_path / "out.safetensors", layers={"transformer.proj_out": (16, 128)})
    hidden, temb = rng.standard_normal((1, 16, 128)).astype(np.float32), np.ones((1, 128), np.float32)
    span = Span(jnp.float32([0.8]), jnp.float32([0.1]))

    def velocity() -> jax.Array:
        applied = pipe.style
        state = pipe.transformer.state if applied is None else nnx.merge_state(pipe.transformer.state, applied.state)
        model = nnx.merge(pipe.graphdef if applied is None else applied.graphdef, state)
        curve = model.head(hidden, temb)
        normed = model.head.norm_out(hidden, temb)
        return curve.velocity(span, span.src), normed

    plain, normed = velocity()
    pipe.load_lora_weights(file, scale=0.5)
    changed, _ = velocity()
    (update,) = pipe.loras["default_0"].updates["transformer"]
    pipe.unload_lora_weights()
    a, b = update.a, update.b[:, :16]
    assert relative_error(changed - plain, 0.5 * normed @ a @ b) < 1e-4


@pytest.mark.parametrize("merge", [True, False])
def test_adapter_scale(tiny_flux, student, teacher_pipe, student_pipe, merge):
    """Merged or apart, it scales the updates of the student's LoRA, and nothing else."""

    def weights(pipe: ArcFlowPipeline) -> dict[str, np.ndarray]:
        model = nnx.merge(pipe.graphdef, pipe.transformer.state)
        found = {path: np.asarray(layer.kernel[...]) for path, layer in linear_layers(model).items()}
        for path, layer in linear_layers(model).items():
            if layer.lora is not None:
                found[path] = found[path] + np.asarray(layer.lora.a[...] @ layer.lora.b[...]) * layer.lora.scale
        return found

    pipe = ArcFlowPipeline.from_pretrained(tiny_flux, student, merge=merge, adapter_scale=0.5)
    teacher, half, full = map(weights, (teacher_pipe, pipe, student_pipe))
    changed = {path for path in teacher if not np.array_equal(teacher[path], full[path])}
    assert changed == {f"backbone.{path}" for path in ADAPTER_LAYERS}
    for path, weight in full.items():
        expected = (teacher[path] + weight) / 2 if path in changed else weight
        np.testing.assert_allclose(half[path], expected, atol=1e-6)
    assert pipe.described()["adapter_scale"] == "0.5"


def test_refusals(teacher_pipe, tmp_path):
    pipe = teacher_pipe
    file = write_lora(tmp_path / "lora.safetensors")
    pipe.load_lora_weights(file, "style")
    try:
        with pytest.raises(UserError, match="a LoRA 'style' is loaded already"):
            pipe.load_lora_weights(file, "style")
        with pytest.raises(UserError, match="no LoRA 'other' is loaded, only 'style'"):
            pipe.set_adapters(["style", "other"])
        with pytest.raises(UserError, match="adapter_weights has 2 numbers for 1 LoRAs"):
            pipe.set_adapters("style", [1.0, 2.0])
        with pytest.raises(UserError, match="weight of style is nan"):
            pipe.set_adapters("style", float("nan"))
        with pytest.raises(UserError, match="scale is inf"):
            pipe.load_lora_weights(file, "again", scale=float("inf"))
        assert list(pipe.loras) == ["style"]
    finally:
        pipe.unload_lora_weights()


def test_command_line(tiny_flux, tmp_path, capsys):
    file, images = write_lora(tmp_path / "lora.safetensors"), tmp_path / "images"
    options = ["--model", str(tiny_flux), "--teacher", "--steps", "2", "--prompt", "a red circle", "--out", str(images)]
    with pytest.raises(SystemExit) as caught:
        main(["sample", *options, "--lora", f"{file}:0.5", "--lora", str(file)])
    assert not caught.value.code, capsys.readouterr().err
    from arcflow_jax.data.images import read_image

    (image,) = images.glob("*.png")
    assert read_image(image).info["loras"] == f"{file}:0.5, {file}:1"


def test_command_line_refuses_a_scale_of_no_student(tiny_flux, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--model", str(tiny_flux), "--teacher", "--adapter-scale", "0.5", "--prompt", "a red circle"])
    assert caught.value.code == 2
    assert "leave --adapter-scale out" in capsys.readouterr().err


def test_conversion_of_a_lora_of_another_model(tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", layers={"transformer.transformer_blocks.7.attn.to_q": (128, 128)})
    with pytest.raises(UserError, match=r"2 unknown \(transformer.transformer_blocks.7.attn.to_q.lora_A.weight, "):
        convert_model(ASSETS / "tiny-flux", tmp_path / "out", loras=[(file, 1.0)])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_tool_writes_what_it_trains(teacher_pipe, tmp_path):
    pipe, file = teacher_pipe, tmp_path / "stripes.safetensors"
    lora = train(pipe, "stripes", rank=4, steps=2, batch=2, images=4, rate=1e-2)
    write_tensors(file, export(pipe.directory, lora))
    pipe.load_lora_weights(file)
    ours, trained = flatten(pipe.style.state), flatten(lora)
    pipe.unload_lora_weights()
    assert ours.keys() == trained.keys()
    assert len(ours) == 2 * (12 + 5)  # linear layers with LoRA in a double and in a single block
    for path, variable in trained.items():
        own = ours[path][..., :4] if path.endswith(".a") else ours[path][..., :4, :]
        assert np.abs(variable[...]).max() > 0
        np.testing.assert_array_equal(own, variable[...])
