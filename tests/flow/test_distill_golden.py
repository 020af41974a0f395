"""The distillation loss against values of the authors' own code."""

# B batch, D features of a token, M visited states of a segment

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.flow import distill, momentum
from arcflow_jax.flow.distill import Distillation, Draws, segment_loss
from arcflow_jax.flow.schedule import sigma_of
from tests.helpers import golden

# Teacher share, start (timesteps) and length of the examples' segments, settings
VARIANTS = {
    "r1.0_seg0": (1.0, (1.0, 1.0), 0.5, {}),
    "r1.0_seg1": (1.0, (0.5, 0.5), 0.5, {}),
    "r0.5_seg0": (0.5, (1.0, 1.0), 0.5, {}),
    "r0.5_seg1": (0.5, (0.5, 0.5), 0.5, {}),
    "r0.0_seg0": (0.0, (1.0, 1.0), 0.5, {}),
    "r0.0_seg1": (0.0, (0.5, 0.5), 0.5, {}),
    "win0_r0.5": (0.5, (1.0, 1.0), 0.5, {"window": 0}),
    "win0_r0.0": (0.0, (1.0, 1.0), 0.5, {"window": 0}),
    "drop0.9_r0.5": (0.5, (1.0, 1.0), 0.5, {"mode_dropout": 0.9}),
    "nodrop_default2": (0.5, (1.0, 1.0), 0.5, {"mode_dropout": 0.0, "states": 2, "window": 0}),
    "tensorseg_r0.3": (0.3, (1.0, 0.2), (0.4, 0.2), {}),
}


def authors_teacher(x, sigma):
    return jnp.tanh(0.7 * x - 1.3 * sigma[:, None, None])


class Golden:
    """One variant of case 05: its inputs and its outputs (cut to the first 2×4 pixels: tokens 0 and 1)."""

    def __init__(self, name: str, *, steady: bool = False):
        case = golden.load("05_piid_segment")
        share, start, length, changes = VARIANTS[name]
        self.settings = dataclasses.replace(Distillation(), **changes)
        self.mixture = golden.mixture(*(case[f"inputs/{key}"] for key in ("means", "logits", "loggammas")))
        modes = case.get(f"inputs/{name}/rand_drop", np.zeros((2, 4, 1, 1, 1)))[..., 0, 0, 0]
        student, teacher = (case[f"inputs/{name}/rand_{who}"] for who in ("student", "teacher"))
        self.rest = (
            jnp.asarray(golden.tokens(case["inputs/x_t_src"])),
            jnp.float32(start),
            jnp.broadcast_to(jnp.float32(length), (2,)),
            Draws(*(jnp.float32(u) for u in (modes, student, teacher))),
            None if steady else jnp.float32(share),
        )
        self.out = {key.split("/")[-1]: value for key, value in case.items() if f"s/{name}/" in key}

    def tokens_of(self, name: str) -> np.ndarray:  # [M, B, 2, D]
        return golden.tokens(self.out[name]).reshape(self.settings.states, 2, 2, 64)


@functools.partial(jax.jit, static_argnames="settings")
def golden_segment(mixture, x, start, length, draws, share, settings):
    visits = distill.visit(mixture, authors_teacher, x, start, length, draws, settings=settings, teacher_share=share)
    predicted = distill.predicted_velocity(mixture, visits, start, length, settings=settings)
    return visits, predicted, golden_loss(mixture, x, start, length, draws, share, settings)


def golden_loss(mixture, x, start, length, draws, share, settings):
    return segment_loss(mixture, authors_teacher, x, start, length, draws, settings=settings, teacher_share=share)


@pytest.mark.parametrize(
    ("name", "steady"),
    [(name, False) for name in VARIANTS] + [("r0.0_seg0", True), ("r0.0_seg1", True), ("win0_r0.0", True)],
)
def test_segment_equals_golden(name, steady):
    case = Golden(name, steady=steady)
    visits, predicted, (loss, end, log) = golden_segment(case.mixture, *case.rest, settings=case.settings)
    # Timesteps to rounding; states to what the clamp of the authors' φ changes; velocities to 1e-4
    np.testing.assert_allclose(sigma_of(visits.arrive, 3.2).ravel(), case.out["timesteps"], atol=5e-7)
    np.testing.assert_allclose(visits.states[:, :, :2], case.tokens_of("x_t_a"), atol=5e-5)
    np.testing.assert_allclose(visits.targets[:, :, :2], case.tokens_of("tgt_u"), atol=5e-5)
    np.testing.assert_allclose(predicted[:, :, :2], case.tokens_of("pred_u"), atol=1e-4)
    np.testing.assert_allclose(end[:, :2], golden.tokens(case.out["x_t_dst"]), atol=5e-5)
    assert loss == pytest.approx(float(case.out["loss"]), rel=2e-6)
    assert log["loss"] == loss


@functools.partial(jax.jit, static_argnames="settings")
def authors_gradient(mixture, *rest, settings):
    """With the authors' φ, which has no gradient where it is clamped."""
    with mock.patch.object(momentum, "phi", golden.authors_phi):
        return jax.grad(lambda mixture: golden_loss(mixture, *rest, settings)[0])(mixture)


@pytest.mark.parametrize("name", ["r1.0_seg0", "r0.5_seg0", "r0.0_seg1", "tensorseg_r0.3"])
def test_gradient_equals_golden(name):
    case = Golden(name)
    ours = authors_gradient(case.mixture, *case.rest, settings=case.settings)
    theirs = golden.mixture(*(case.out[key] for key in ("means", "logweights", "loggammas")))
    for field in ("means", "logits", "log_momenta"):
        expected = getattr(theirs, field)
        atol = 2e-5 * float(jnp.abs(expected).max())  # the gradient of their φ loses digits just above the clamp
        np.testing.assert_allclose(getattr(ours, field)[:, :2], expected, rtol=0, atol=atol)
