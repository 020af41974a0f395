"""Programs compiled for TPUs that are not attached: counts against counts by hand, and errors before compilation."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from arcflow_jax.cli.app import main
from arcflow_jax.compile_report import report, topology
from arcflow_jax.compile_report.child import compile_program, needed
from arcflow_jax.compile_report.collectives import Traffic, collectives
from arcflow_jax.compile_report.programs import Program, sampler, training_step
from arcflow_jax.compile_report.topology import environment
from arcflow_jax.errors import UserError
from arcflow_jax.networks.attention import attention, attention_kernel
from arcflow_jax.parallel.mesh import MESH_AXES, make_mesh, replicated
from arcflow_jax.training.recipe import Recipe, read_config
from arcflow_jax.training.work import flops
from tests.helpers.processes import with_devices

ROOT = Path(__file__).parents[2]
FLUX_DEV = ROOT / "configs" / "flux.1-dev"


def count(f, *shapes) -> int:
    return flops(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)


def test_flops_of_loops_and_branches():
    product = 2 * 8 * 16 * 16

    def looped(x, w):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)

    assert count(jax.jit(looped), (8, 16), (16, 16)) == (5 + 2) * product
    # The backward pass of x W: one product for each gradient, and one more forward where it is recomputed
    assert count(jax.grad(lambda x, w: (x @ w).sum(), (0, 1)), (8, 16), (16, 16)) == 3 * product
    squared = jax.checkpoint(lambda x, w: jnp.sin(x @ w))
    assert count(jax.grad(lambda x, w: squared(x, w).sum(), (0, 1)), (8, 16), (16, 16)) == 4 * product
    assert count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (3, 4, 5), (3, 6, 5)) == 2 * 3 * 4 * 5 * 6
    with pytest.raises(ValueError, match="while loop of unknown length"):
        count(lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), (8, 16), (16, 16))


def test_flops_of_convolutions():
    def convolve(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=numbers)

    assert count(convolve, (2, 8, 8, 3), (3, 3, 3, 7)) == 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3)


def test_flops_of_fused_attention():
    """Two products forward; the backward pass computes five, one of which are the scores again."""
    b, s, h, e = 2, 1024, 3, 128
    product = 2 * b * h * s * s * e
    rows = 2 * b * h * s * e  # Σ output · its gradient, outside the kernels
    q = (b, s, h, e)
    with attention_kernel("splash"):
        assert count(attention, q, q, q) == 2 * product
        assert count(jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum()), q, q, q) == (2 + 5) * product + rows
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(axis_sizes=(2, 1, 3, 2))):
            assert count(attention, q, q, q) == 2 * product  # each device computes a twelfth


def test_flops_of_flux_sampling():
    """FLUX.1-dev at 1024², two steps: every weight matrix by its tokens, and attention."""
    config = read_config(str(ROOT / "configs" / "flux.py"), [f"--config.model={FLUX_DEV}"])
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    program = sampler(Recipe.from_config(config), mesh, 1)
    counted = flops(program.function.trace(*program.arguments, **program.keywords).jaxpr.jaxpr)
    n, t, d = 4096, 512, 3072
    double = 19 * ((n + t) * (4 * d * d + 8 * d * d) + 2 * 6 * d * d)  # attention, MLP; modulation of one vector each
    single = 38 * ((n + t) * (3 * d * d + 4 * d * d + 5 * d * d) + 3 * d * d)
    embeddings = n * 64 * d + t * 4096 * d + 2 * (256 * d + d * d) + (768 * d + d * d)
    head = n * d * (1024 + 64 + 60) + 2 * d * d
    scores = (19 + 38) * 2 * (n + t) ** 2 * d
    assert counted == 2 * 2 * (double + single + embeddings + head + scores)
    assert counted / 2 == pytest.approx(74.4e12, rel=0.01)


@pytest.mark.parametrize("steady", [False, True])
def test_flops_of_flux_training(steady):
    """FLUX.1-dev at 1024². Per segment: four teacher calls, the student forward and its recomputation, and the
    gradient, which costs less than two forwards because the base needs none."""
    config = read_config(f"{ROOT / 'configs' / 'flux.py'}:published", [f"--config.model={FLUX_DEV}"])
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    program = training_step(Recipe.from_config(config), mesh, 1, steady=steady)
    counted = flops(program.function.trace(*program.arguments, **program.keywords).jaxpr.jaxpr)
    teacher, student = 74.4e12, 79.1e12
    assert 2 * (4 * teacher + 3 * student) < counted < 2 * (4 * teacher + 3.8 * student)


def test_flops_of_qwen_image_sampling():
    """Qwen-Image, whose blocks are all double ones, with 512 text tokens including padding."""
    config = read_config(str(ROOT / "configs" / "qwen.py"), [f"--config.model={ROOT / 'configs' / 'qwen-image'}"])
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    program = sampler(Recipe.from_config(config), mesh, 1)
    counted = flops(program.function.trace(*program.arguments, **program.keywords).jaxpr.jaxpr)
    n, t, d = 4096, 512, 3072
    blocks = 60 * ((n + t) * (4 * d * d + 8 * d * d) + 2 * 6 * d * d)
    embeddings = n * 64 * d + t * 3584 * d + 256 * d + d * d
    head = n * d * (1024 + 64 + 60) + 2 * d * d
    scores = 60 * 2 * (n + t) ** 2 * d
    assert counted == 2 * 2 * (blocks + embeddings + head + scores)


@pytest.mark.parametrize("steady", [False, True])
def test_flops_of_qwen_image_training(steady):
    """As for FLUX.1-dev, but CFG calls the teacher with and without the prompt: eight times per segment."""
    config = read_config(str(ROOT / "configs" / "qwen.py"), [f"--config.model={ROOT / 'configs' / 'qwen-image'}"])
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    program = training_step(Recipe.from_config(config), mesh, 1, steady=steady)
    counted = flops(program.function.trace(*program.arguments, **program.keywords).jaxpr.jaxpr)
    teacher, student = 78.3e12, 82.7e12
    assert 2 * (8 * teacher + 3 * student) < counted < 2 * (8 * teacher + 3.8 * student)


ON_8_DEVICES = """
    import json, jax
    from jax.sharding import PartitionSpec as P
    from arcflow_jax.compile_report.collectives import collectives

    mesh = jax.make_mesh((8,), ("i",), (jax.sharding.AxisType.Auto,))

    def f(x):  # [4, 32] on each device
        def step(x, _):
            y = jax.lax.psum(jax.numpy.sin(x), "i")
            return jax.lax.ppermute(y, "i", [(i, (i + 1) % 8) for i in range(8)]), None
        x, _ = jax.lax.scan(step, x, length=5)
        whole = jax.lax.all_gather(jax.numpy.cos(x), "i")  # [8, 4, 32]
        return jax.lax.psum_scatter(jax.numpy.sin(whole), "i")

    x = jax.ShapeDtypeStruct((32, 32), "float32", sharding=jax.NamedSharding(mesh, P("i")))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    found = collectives(jax.jit(mapped).lower(x).compile().as_text())
    print(json.dumps({kind: [t.count, t.bytes] for kind, t in found.items()}))
"""


def test_collectives_of_a_compiled_program():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_8_DEVICES)],
        env=os.environ | with_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    part = 4 * 32 * 4  # bytes of one device's [4, 32]
    assert json.loads(done.stdout) == {
        "all-reduce": [5, 5 * part],
        "all-gather": [1, 8 * part],
        "reduce-scatter": [1, part],
        "collective-permute": [5, 5 * part],
    }


# XLA's output for TPUs: collectives are asynchronous, and a loop's length is in its condition only
TPU_HLO = """
HloModule jit_f

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %all-gather-start = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}) all-gather-start(%x), dimensions={0}
  %all-gather-done = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start)
}

%condition (arg: (s32[], bf16[4,8])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %constant.7 = s32[]{:T(128)} constant(19)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.7), direction=LT
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) while(%t), condition=%condition, body=%body
  ROOT %all-reduce = (f32[8]{0:T(128)}, pred[3]{0:T(128)}) all-reduce(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add
}
"""


def test_collectives_of_a_tpu_program():
    assert collectives(TPU_HLO) == {
        "all-reduce": Traffic(1, 8 * 4 + 3),
        "all-gather": Traffic(19, 19 * 16 * 8 * 2),
    }


def test_a_program_in_two_parts():
    """What the second part has beside it counts; the larger peak is the peak of both."""
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=replicated(mesh))
    first = Program(jax.jit(lambda x: x @ x), (x,), {}, passes=1)
    second = Program(jax.jit(lambda x: x @ x @ x), (x,), {}, passes=1)
    beside = dataclasses.replace(second, beside=(x, x, x))
    alone, then, beside, both = (
        compile_program(mesh, each) for each in (first, second, beside, dataclasses.replace(first, then=beside))
    )
    assert beside["peak"] == then["peak"] + 3 * 64 * 64 * 4
    assert both["peak"] == beside["peak"] > alone["peak"] == 2 * 64 * 64 * 4
    assert both["arguments"] == alone["arguments"]
    assert both["flops"] == 3 * 2 * 64**3


def test_needed_memory_is_read_from_the_message():
    message = "RESOURCE_EXHAUSTED: CompileTimeHbmOom: program needs (26.04G) exceeds available HBM (15.75G)"
    assert needed(message) == 26.04 * 2**30
    assert needed("no figures") is None


def write_tiny_model(folder: Path) -> Path:
    """FLUX.1-dev's config files, reduced to two blocks of two heads."""
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "tokenizer_2/tokenizer_config.json"):
        values = json.loads((FLUX_DEV / name).read_text())
        if name.startswith("transformer"):
            values |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64}
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return folder


@pytest.fixture
def tiny_model(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "model")


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["compile-report", "--config", str(ROOT / "configs" / "flux.py"), *map(str, arguments)])
    return caught.value.code or 0, *capfd.readouterr()


def test_report_on_the_command_line(capfd, tmp_path, tiny_model):
    pytest.importorskip("libtpu")
    out = tmp_path / "report.json"
    common = (f"--config.model={tiny_model}", "--height", 256, "--width", 256, "--out", out)
    code, stdout, stderr = run(capfd, "--topology", "v5e:1x1", *common)
    assert code == 0, stderr
    assert "v5e:1x1" in stdout
    assert "s at 50 %" in stdout
    (row,) = json.loads(out.read_text())
    assert row["status"] == "compiled"


# Checks and compiles cases as the child process does, but all in one, because starting it takes longest
IN_ONE_PROCESS = """
import json, sys
from arcflow_jax.compile_report.child import build, compile_program
from arcflow_jax.errors import UserError

def answer(case):
    try:
        return compile_program(*build(**case))
    except UserError as error:
        return {"error": str(error)}

print(json.dumps([answer(case) for case in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict]:
    """What the child answers to each case; of those that compile, the row."""
    pytest.importorskip("libtpu")
    model = f"--config.model={write_tiny_model(tmp_path_factory.mktemp('compile') / 'model')}"
    flux = str(ROOT / "configs" / "flux.py")

    def case(program: str, topology: str, mesh: tuple[int, ...], batch: int, *overrides: str) -> report.Case:
        return report.Case(program, flux, (model, *overrides), topology, mesh, batch)

    small = ("--config.adapter.rank=8", "--config.distillation.nfe=1", "--config.distillation.states=1")
    cases = {
        "sharded": case("sampler", "v5e:2x2", (1, 1, 2, 2), 1, "--config.resolutions=((512, 1024),)"),
        "too large": case("sampler", "v5e:1x1", (1, 1, 1, 1), 4096),
        "two slices": case("train", "v5e:2x2*2", (2, 4, 1, 1), 8, "--config.resolutions=((256, 256),)", *small),
        "topology": case("sampler", "v6e:3x3", (1, 1, 1, 1), 1),
        "mesh": case("sampler", "v5e:2x2", (1, 1, 3, 1), 1),
        "slices": case("sampler", "v5e:2x2*2", (1, 8, 1, 1), 1),
        "batch": case("sampler", "v5e:2x2", (4, 1, 1, 1), 1),
        "model": case("sampler", "v5e:2x2", (1, 1, 4, 1), 1, "--config.model=/nowhere"),
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        input=json.dumps([dataclasses.asdict(each) for each in cases.values()]),
        env=environment(["v5e:1x1"]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = zip(cases.items(), json.loads(done.stdout.splitlines()[-1]), strict=True)
    return {name: each if "error" in each else report.row(case, each) for (name, case), each in found}


def test_sampler_on_several_devices(answers):
    row = answers["sharded"]
    assert row["status"] == "compiled"
    assert row["mesh"] == [1, 1, 2, 2]
    assert row["peak"] >= row["arguments"] + row["temporaries"] > 0
    assert row["collectives"]
    n, t, d = 32 * 64, 512, 256
    assert row["flops"] > 2 * 2 * (12 * 2 * d * d * (n + t) + 2 * 2 * (n + t) ** 2 * d)  # blocks and attention alone
    assert row["roofline"]["seconds"] >= row["flops"] / 4 / 197e12


def test_training_on_two_slices(answers):
    row = answers["two slices"]
    assert row["status"] == "compiled"
    assert row["devices"] == 8
    assert row["roofline"]["half_peak"] == pytest.approx(2 * row["flops"] / 8 / 197e12)
    assert "all-gather" in row["collectives"]


def test_out_of_memory_is_a_row(answers, capfd):
    assert answers["too large"]["needed"] > answers["too large"]["capacity"]
    report.table([answers["too large"]])
    assert "out of memory" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("topology", "the compiler rejects topology 'v6e:3x3'"),
        ("mesh", "4 devices"),
        ("slices", "the 2 TPU slices"),
        ("batch", "batch 1 does not divide by data × fsdp = 4"),
        ("model", "model directory /nowhere does not exist"),
    ],
)
def test_cases_that_do_not_fit(answers, case, message):
    assert message in answers[case]["error"]


def test_errors_come_before_any_compilation(capfd, tmp_path, tiny_model, monkeypatch):
    def refused(message: str, *arguments: object) -> None:
        code, _, stderr = run(capfd, *arguments)
        assert code == 2
        assert stderr.count("\n") == 1, stderr
        assert message in stderr

    model = f"--config.model={tiny_model}"
    refused("mesh '4': '4' is not AXIS=SIZE, where AXIS is one of data", "--topology", "v5e:2x2", "--mesh", "4", model)
    refused("--height and --width go together", "--topology", "v5e:2x2", "--height", 512, model)
    with monkeypatch.context() as patched:
        patched.setattr(topology.importlib.util, "find_spec", lambda name: None)
        refused("libtpu, the compiler for TPUs, is not installed", "--topology", "v5e:2x2", model)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    refused("unknown topology 'v5p-8': give one of v5e, v5p", "--topology", "v5p-8", model)

    # The child process checks all cases before it compiles the first
    asked = []

    def ask(cases, limit, *, compiling):
        asked.append((len(cases), compiling))
        raise UserError("the second does not fit")

    monkeypatch.setattr(report, "ask", ask)
    refused("the second does not fit", "--topology", "v5e:2x2", "--topology", "v6e:2x2", model)
    assert asked == [(2, False)]


def test_tool_is_the_same_entry_point(tmp_path):
    tool = ROOT / "tools" / "compile_report.py"
    done = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--topology" in done.stdout
