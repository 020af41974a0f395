"""The distillation loss: against the authors' values, and what has to hold for any student and teacher."""

# B batch, N tokens, D features of a token, K modes, M visited states

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from arcflow_jax import distill, momentum
from arcflow_jax.distill import Distillation, Draws, distillation_loss, segment_loss, teacher_share, visit_times
from arcflow_jax.errors import UserError
from arcflow_jax.momentum import Mixture
from arcflow_jax.schedule import warp

B, N, D, K = 2, 3, 8, 3
SETTINGS = Distillation()


def assert_close(actual, desired):
    """To float32's rounding, relative to the largest value."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=2e-6 * np.abs(desired).max())


# The authors' values. Their variants: teacher share, raw start and length of each example's segment, settings

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
    """One variant of case 05: what goes in, and what came out (cut to the first 2×4 pixels: tokens 0 and 1)."""

    def __init__(self, name: str, *, steady: bool = False):
        case = golden.load("05_piid_segment")
        share, start, length, changes = VARIANTS[name]
        self.settings = dataclasses.replace(SETTINGS, **changes)
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
    visits = distill.visit(mixture, authors_teacher, x, start, length, draws, settings=settings, share=share)
    predicted = distill.predict(mixture, visits, start, length, settings=settings)
    return visits, predicted, golden_loss(mixture, x, start, length, draws, share, settings)


def golden_loss(mixture, x, start, length, draws, share, settings):
    return segment_loss(mixture, authors_teacher, x, start, length, draws, settings=settings, share=share)


@pytest.mark.parametrize(
    ("name", "steady"),
    [(name, False) for name in VARIANTS] + [("r0.0_seg0", True), ("r0.0_seg1", True), ("win0_r0.0", True)],
)
def test_segment_equals_golden(name, steady):
    case = Golden(name, steady=steady)
    visits, predicted, (loss, end, log) = golden_segment(case.mixture, *case.rest, settings=case.settings)
    # Times within rounding; states within what the clamp of the authors' φ moves them by; velocities as suggested
    np.testing.assert_allclose(warp(visits.arrive, 3.2).ravel(), case.out["timesteps"], atol=5e-7)
    np.testing.assert_allclose(visits.states[:, :, :2], case.tokens_of("x_t_a"), atol=5e-5)
    np.testing.assert_allclose(visits.targets[:, :, :2], case.tokens_of("tgt_u"), atol=5e-5)
    np.testing.assert_allclose(predicted[:, :, :2], case.tokens_of("pred_u"), atol=1e-4)
    np.testing.assert_allclose(end[:, :2], golden.tokens(case.out["x_t_dst"]), atol=5e-5)
    assert loss == pytest.approx(float(case.out["loss"]), rel=2e-6)
    assert log["loss"] == loss


@functools.partial(jax.jit, static_argnames="settings")
def authors_gradient(mixture, *rest, settings):
    """With the authors' φ, because it has no gradient where it is clamped."""
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


# Any student, any teacher


def random_mixture(dtype=jnp.float32) -> Mixture:
    rng = np.random.default_rng(0)
    return Mixture(
        jnp.asarray(rng.standard_normal((B, N, K, D // 4, 4)), dtype),
        jnp.asarray(rng.standard_normal((B, N, K, 4)), dtype),
        jnp.asarray(2 * rng.standard_normal((B, N, K - 1, 4)), dtype),
    )


NOISE = np.random.default_rng(1).standard_normal((B, N, D)).astype(np.float32)


def student(weight, x, sigma):
    """A little network: its mixture depends on weight, state, noise level."""
    h = jnp.tanh(x[:, :, None] * weight + sigma[:, None, None, None])  # [B, N, K, D]
    means = h.reshape(B, N, K, D // 4, 4)
    return Mixture(means, means.sum(3), means[:, :, 1:].mean(3))


def teacher(x, sigma):
    """Reads per-example conditioning, in the row order that is asked of teachers."""
    conditioning = jnp.repeat(jnp.array([0.3, -0.9]), len(x) // B)
    return jnp.sin(x + conditioning[:, None, None]) * (1 + sigma[:, None, None])


WEIGHT = jnp.linspace(-1.0, 1.0, K * D).reshape(K, D)


PLAIN = dataclasses.replace(SETTINGS, final_step_ratio=0.5, mode_dropout=0.0)


@functools.partial(jax.jit, static_argnames="settings")
def total_loss(weight, key, share, settings=PLAIN):
    def weighted(x, sigma, key):
        return student(weight, x, sigma)

    return distillation_loss(weighted, teacher, NOISE, key, settings=settings, share=share)


def watched_loss(key, share):
    """((loss, log), calls): the calls of the student, (x, σ, key) each. Uncompiled, so that they can be seen."""
    calls = []

    def watched(x, sigma, key):
        calls.append((np.array(x), float(sigma[0]), np.array(jax.random.key_data(key))))
        return student(WEIGHT, x, sigma)

    with jax.disable_jit():
        return distillation_loss(watched, teacher, NOISE, key, settings=PLAIN, share=share), calls


KEY = jax.random.key(5)
HALF = jnp.float32(0.5)


def test_steady_phase_is_the_general_one_at_share_zero():
    def loss(weight, share):
        return total_loss(weight, KEY, share, settings=SETTINGS)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (general, log), gradient = run(WEIGHT, jnp.zeros(()))
    (steady, steady_log), steady_gradient = run(WEIGHT, None)
    assert steady == pytest.approx(float(general), rel=1e-6)
    assert_close(steady_gradient, gradient)
    assert_close(steady_log["loss"], log["loss"])
    assert_close(steady_log["velocity_error"], log["velocity_error"])


def test_teacher_is_called_once_when_steady():
    """Once in the program, in which the segments are a loop: on all states of a segment together."""

    batches = []

    def counted(x, sigma):
        batches.append((x.shape, sigma.shape))
        return teacher(x, sigma)

    jax.eval_shape(
        lambda: distillation_loss(
            lambda x, sigma, key: student(WEIGHT, x, sigma), counted, NOISE, KEY, settings=SETTINGS, share=None
        )
    )
    assert set(batches) == {((4 * B, N, D), (4 * B,))}


def test_share_is_traced():
    before = total_loss._cache_size()
    losses = {float(total_loss(WEIGHT, KEY, jnp.float32(share))[0]) for share in (1.0, 0.5, 0.0)}
    assert len(losses) == 3
    assert total_loss._cache_size() <= before + 1


@pytest.mark.parametrize("share", [HALF, None])
def test_gradient_flows_through_the_mean_velocity_alone(share):
    """Frozen: the trajectory (from x and the mixture) and the teacher, even if its weights are differentiated."""
    draws = Draws(*(np.random.default_rng(2).random((B, size), np.float32) for size in (K, 4, 3)))
    mixture, x, start, length = random_mixture(), NOISE, jnp.ones(B), jnp.full(B, 0.5)

    def loss(mixture, x, scale):
        return segment_loss(
            mixture, lambda x, s: scale * teacher(x, s), x, start, length, draws, settings=SETTINGS, share=share
        )

    def matched(mixture, visits):
        predicted = distill.predict(mixture, visits, start, length, settings=SETTINGS)
        return SETTINGS.loss_scale / 2 * jnp.square(predicted - visits.targets).mean()

    @jax.jit
    def gradients(mixture, x):
        visits = distill.visit(mixture, teacher, x, start, length, draws, settings=SETTINGS, share=share)
        return (
            jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1, 2))(mixture, x, 1.0),
            jax.grad(lambda *a: loss(*a)[1].sum(), argnums=(0, 1, 2))(mixture, x, 1.0),
            jax.grad(matched)(mixture, visits),
        )

    (of_loss, *others), of_end, expected = gradients(mixture, x)
    jax.tree.map(assert_close, of_loss, expected)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((others, of_end)))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(of_loss))


def test_total_is_weighted_by_length_and_segments_follow_one_another():
    (total, log), calls = watched_loss(KEY, None)
    lengths = np.array([2 / 3, 1 / 3])
    assert total == pytest.approx(float((lengths * log["loss"]).sum()), rel=1e-6)
    states, sigmas, _ = zip(*calls, strict=True)

    @jax.jit
    def follow(x, sigma, sigma_next):
        return x - momentum.displacement(student(WEIGHT, x, jnp.full(B, sigma)), sigma, sigma, sigma_next)

    np.testing.assert_allclose(sigmas, warp(np.array([1.0, 1 / 3]), 3.2), rtol=1e-6)
    np.testing.assert_array_equal(states[0], NOISE)
    # Without the teacher and mode dropout, the trajectory is the student's own
    np.testing.assert_allclose(states[1], follow(states[0], *sigmas), atol=1e-5)


def test_a_key_for_every_segment_and_the_same_ones_again():
    (loss, _), calls = watched_loss(KEY, HALF)
    (again, _), _ = watched_loss(KEY, HALF)
    (other, _), other_calls = watched_loss(jax.random.key(6), HALF)
    assert loss == again != other
    assert len({tuple(key.tolist()) for *_, key in [*calls, *other_calls]}) == 4


@pytest.mark.parametrize("share", [HALF, None])
def test_student_that_knows_the_teacher_has_no_loss(share):
    """The teacher moves each example with its own constant velocity; so do the modes, some `off` too fast."""
    c = jnp.array([[[0.7]], [[-1.3]]]) * jnp.ones((B, N, D))

    @jax.jit
    def loss(off):
        mixture = Mixture(
            means=jnp.repeat((c + off).reshape(B, N, 1, D // 4, 4), K, 2),
            logits=random_mixture().logits,
            log_momenta=jnp.zeros((B, N, K - 1, 4)),
        )
        return distillation_loss(
            lambda *_: mixture,
            lambda x, sigma: jnp.repeat(c, len(x) // B, 0),
            NOISE,
            KEY,
            settings=SETTINGS,
            share=share,
        )

    total, log = loss(0.0)
    assert total < 1e-10
    assert log["velocity_error"].max() < 1e-10
    total, log = loss(0.1)
    np.testing.assert_allclose([total, *log["loss"]], 30 / 2 * 0.1**2, rtol=1e-4)
    np.testing.assert_allclose(log["velocity_error"], 0.1**2 / ((0.7**2 + 1.3**2) / 2), rtol=1e-4)


@pytest.mark.parametrize("share", [HALF, None])
def test_linear_student(share):
    """K = 1, no momenta."""
    mixture = jax.tree.map(lambda leaf: leaf[:, :, :1], random_mixture())
    mixture = dataclasses.replace(mixture, log_momenta=mixture.log_momenta[:, :, :0])

    draws = Draws(*(np.random.default_rng(2).random((B, size), np.float32) for size in (1, 4, 3)))

    @jax.jit
    @jax.grad
    def gradient(mixture):
        return segment_loss(mixture, teacher, NOISE, 1.0, 0.5, draws, settings=SETTINGS, share=share)[0]

    means = gradient(mixture).means
    assert np.isfinite(means).all()
    assert (means != 0).all()


def test_border_is_float32():
    """Networks may compute in bfloat16: what they are given, and what becomes of what they give, is float32."""
    given = []

    def half_student(x, sigma, key):
        given.extend([x.dtype, sigma.dtype])
        return random_mixture(dtype=jnp.bfloat16)

    def half_teacher(x, sigma):
        given.extend([x.dtype, sigma.dtype])
        return x.astype(jnp.bfloat16)

    for share in (HALF, None):
        loss, log = jax.eval_shape(
            functools.partial(distillation_loss, half_student, half_teacher, settings=SETTINGS, share=share),
            jnp.asarray(NOISE, jnp.bfloat16),
            KEY,
        )
        assert {loss.dtype, *(leaf.dtype for leaf in log.values()), *given} == {jnp.dtype(jnp.float32)}


# Times and draws


timed = jax.jit(visit_times, static_argnames="settings")


@hypothesis_settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    share=st.floats(0, 1, width=32),
    start=st.floats(0.125, 1, width=32),
    part=st.floats(0.05, 1),
    window=st.sampled_from([0, 3, 8]),
)
def test_times_run_through_the_segment_and_leave_room_for_the_window(seed, share, start, part, window):
    settings = dataclasses.replace(SETTINGS, window=window)
    draws = Draws(*(np.random.default_rng(seed).random((B, size), np.float32) for size in (K, 4, 3)))
    start = np.full(B, start, np.float32)
    length = np.float32(part) * start
    room = np.asarray(settings.window_length(length))
    arrive, leave = map(np.asarray, timed(draws, start, length, settings=settings, share=share))
    assert arrive.shape == leave.shape == (4, B)
    assert (room <= length).all()
    whole = np.concatenate([start[None], np.stack([arrive, leave], 1).reshape(-1, B)])
    assert (np.diff(whole, axis=0) <= 1e-7).all()
    assert (leave[-1] - room >= start - length - 1e-6).all()
    # The teacher is given the whole of its share, the student the rest but for what it leaves to the end.
    np.testing.assert_allclose((arrive - leave).sum(0), share * (length - room), atol=1e-5)
    np.testing.assert_allclose(
        start - leave[-1], (length - room) * (share + (1 - share) * draws.student.max(-1)), atol=1e-5
    )


def test_window_divides_the_segment_in_whole_substeps():
    window = Distillation(window=3, substeps=128).window_length
    assert window(jnp.float32(0.5)) == pytest.approx(3 / 128)
    assert window(jnp.float32(0.3)) == pytest.approx(3 * 0.3 / 38)  # 38.4 substeps, of which 38 fit
    assert window(jnp.float32(1 / 128)) == pytest.approx(1 / 128)  # no longer than the segment


def test_draws_are_uniform_and_independent():
    draws = Draws.draw(jax.random.key(0), 4000, 3, 4)
    assert [leaf.shape for leaf in jax.tree.leaves(draws)] == [(4000, 3), (4000, 4), (4000, 3)]
    columns = np.concatenate(jax.tree.leaves(draws), 1)
    assert columns.min() >= 0
    assert columns.max() < 1
    np.testing.assert_allclose(columns.mean(0), 0.5, atol=5 * 12**-0.5 / 4000**0.5)
    correlation = np.corrcoef(columns.T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / 4000**0.5


def test_teacher_share_falls_to_zero():
    np.testing.assert_allclose([teacher_share(step, 4) for step in (0, 1, 4, 9)], [1, 0.75, 0, 0])
    assert teacher_share(jnp.int32(0), 0) == 0
    assert jax.jit(lambda step: teacher_share(step, 2000))(jnp.int32(500)) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("name", "value"),
    [("nfe", 0), ("states", 0), ("substeps", 0), ("shift", 0.0), ("final_step_ratio", -1.0), ("mode_dropout", 1.0)],
)
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        dataclasses.replace(SETTINGS, **{name: value})
