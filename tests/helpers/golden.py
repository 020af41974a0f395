"""The authors' reference values in tests/data/golden, brought into the layout of this library.

They come from the authors' own PyTorch code (ArcFlow, commit 4294909), as images [.., C, H, W] cut to the first
2×4 latent pixels. Only the inputs of case 05 are whole, because its loss is a mean over all pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from arcflow_jax.convert.adapter import AdapterTable
from arcflow_jax.convert.backbones import flux as table
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.families.latents import position_ids
from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.networks import layers
from arcflow_jax.networks.backbones.flux import Flux, FluxConditioning
from arcflow_jax.networks.student import AdapterConfig, ArcModel, split_model
from tests.helpers.paths import GOLDEN
from tests.helpers.twins import FLUX, relative_error

CLAMP = 1e-4  # the authors clamp |g · Δσ| to at least this


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a case, by name, e.g. "inputs/means"."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def pixels(image: np.ndarray) -> np.ndarray:  # [.., C, H, W] -> [.., N, C, 4]
    *lead, channels, height, width = image.shape
    patches = image.reshape(-1, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(*lead, -1, channels, 4)


def tokens(image: np.ndarray) -> np.ndarray:  # [.., C, H, W] -> [.., N, 4C]
    x = pixels(image)
    return x.reshape(*x.shape[:-2], -1)


def mixture(means: np.ndarray, logits: np.ndarray, log_momenta: np.ndarray) -> Mixture:
    """From [B, K, C, H, W], [B, K, 1, H, W] and [B, K - 1, 1, H, W]; also for the gradient of a mixture."""
    means, logits, log_momenta = (np.moveaxis(pixels(a), 1, 2) for a in (means, logits, log_momenta))
    return Mixture(jnp.asarray(means), jnp.asarray(logits[..., 0, :]), jnp.asarray(log_momenta[..., 0, :]))


def authors_phi(z: jax.Array) -> jax.Array:  # [.., K, 4]
    """The authors' φ: |z| is at least `CLAMP`, except in the first mode, which has no momentum."""
    clamped = jnp.where(z < 0, -1.0, 1.0) * jnp.maximum(jnp.abs(z), CLAMP)
    return (jnp.expm1(clamped) / clamped).at[..., 0, :].set(1.0)


# The authors' tiny FLUX student, cases 06a to 06d

RELEASED = GOLDEN / "arcflux_tiny_adapter"  # the student of case 06d, exported by the authors' code
TEACHER_FILE = GOLDEN / "flux_tiny_teacher.safetensors"
TEACHER = dataclasses.replace(FLUX, num_single_layers=2)
LORA = AdapterConfig(
    modes=4,
    rank=4,
    alpha=4,
    dropout=0.0,
    targets=(
        "single_transformer_blocks.proj_mlp",
        "single_transformer_blocks.proj_out",
        "transformer_blocks.ff.*",
        "transformer_blocks.ff_context.*",
        "time_text_embed.timestep_embedder.*",
    ),
)


def student_case(case: str) -> dict[str, np.ndarray]:
    """The arrays of a case, by the beginning of its name, e.g. "06c"."""
    (path,) = GOLDEN.glob(f"{case}_*.npz")
    return load(path.stem)


def new_student(adapter: AdapterConfig) -> ArcModel:
    """A student of the same model config as the authors', with random weights."""
    rngs = nnx.Rngs(0)
    return ArcModel(Flux(TEACHER, rngs=rngs), param_dtype=jnp.float32, rngs=rngs).attach_student(adapter, rngs)


def authors_student(adapter: AdapterConfig, tensors: Mapping[str, np.ndarray] | None = None) -> ArcModel:
    """The authors' tiny teacher with the student of an export, or with a student of zeros, to be initialized."""
    graphdef, base, state = split_model(layers.abstract(lambda: new_student(adapter)))
    base = import_tensors(table, load_file(TEACHER_FILE), base)
    if tensors is None:
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    else:
        state = import_tensors(AdapterTable(table), tensors, state)
    return nnx.merge(graphdef, base, state)


def student_inputs(values: dict[str, np.ndarray], prefix: str = "") -> tuple[np.ndarray, np.ndarray, FluxConditioning]:
    """Tokens, σ and conditioning of a case; with the prefix "neg_" those of the negative prompts."""
    latents = values["inputs/latents"]
    conditioning = FluxConditioning(
        text=values[f"inputs/{prefix}encoder_hidden_states"],
        pooled=values[f"inputs/{prefix}pooled_projections"],
        guidance=values[f"inputs/{prefix}guidance"],
        positions=position_ids(latents.shape[2] // 2, latents.shape[3] // 2),
    )
    return tokens(latents), values["inputs/timestep"], conditioning


def check_mixture(ours: Mixture, values: dict[str, np.ndarray]) -> None:
    """Asserts that a student predicts the mixture of a case. Logits count up to a constant per pixel."""
    for k in range(values["outputs/means"].shape[1]):
        means = ours.means[:, :, k].reshape(*ours.means.shape[:2], -1)
        assert relative_error(means, tokens(values["outputs/means"][:, k])) < 1e-5
    weights = jax.nn.log_softmax(ours.logits, axis=2)
    for array, name in ((weights, "logweights"), (ours.log_momenta, "loggammas")):
        theirs = values[f"outputs/{name}"]
        assert array.shape[2] == theirs.shape[1]
        for k in range(theirs.shape[1]):
            assert relative_error(array[:, :, k], tokens(theirs[:, k])) < 1e-5
