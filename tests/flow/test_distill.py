"""The distillation loss: what has to hold for any student and teacher."""

# B batch, N tokens, D features of a token, K modes, M visited states

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.flow import distill
from arcflow_jax.flow.curve import Span
from arcflow_jax.flow.distill import Distillation, Draws, distil, segment_loss
from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.flow.schedule import sigma_of

B, N, D, K = 2, 3, 8, 3
SETTINGS = Distillation()


def assert_close(actual, desired):
    """To float32's rounding, relative to the largest value."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=2e-6 * np.abs(desired).max())


def random_mixture(dtype=jnp.float32) -> Mixture:
    rng = np.random.default_rng(0)
    return Mixture(
        jnp.asarray(rng.standard_normal((B, N, K, D // 4, 4)), dtype),
        jnp.asarray(rng.standard_normal((B, N, K, 4)), dtype),
        jnp.asarray(2 * rng.standard_normal((B, N, K - 1, 4)), dtype),
    )


NOISE = np.random.default_rng(1).standard_normal((B, N, D)).astype(np.float32)


def student(weight, x, sigma):
    """A small network: its mixture depends on the weight, the state and the noise level."""
    h = jnp.tanh(x[:, :, None] * weight + sigma[:, None, None, None])  # [B, N, K, D]
    means = h.reshape(B, N, K, D // 4, 4)
    return Mixture(means, means.sum(3), means[:, :, 1:].mean(3))


def teacher(x, sigma):
    """Uses per-example conditioning, in the row order that `distill.Teacher` asks for."""
    conditioning = jnp.repeat(jnp.array([0.3, -0.9]), len(x) // B)
    return jnp.sin(x + conditioning[:, None, None]) * (1 + sigma[:, None, None])


WEIGHT = jnp.linspace(-1.0, 1.0, K * D).reshape(K, D)


PLAIN = dataclasses.replace(SETTINGS, final_step_ratio=0.5, mode_dropout=0.0)


@functools.partial(jax.jit, static_argnames="settings")
def training_step(weight, key, share, settings=PLAIN, latents=None):
    """(loss, gradient, log)"""
    return distil(keyed, weight, teacher, NOISE, key, settings=settings, teacher_share=share, latents=latents)


def keyed(weight, x, sigma, key):
    return student(weight, x, sigma)


def watched_loss(key, share):
    """((loss, log), calls): the student's calls, (x, σ, key) each. Not compiled, so that they can be recorded."""
    calls = []

    def watched(weight, x, sigma, key):
        calls.append((np.array(x), float(sigma[0]), np.array(jax.random.key_data(key))))
        return student(weight, x, sigma)

    with jax.disable_jit():
        loss, _, log = distil(watched, WEIGHT, teacher, NOISE, key, settings=PLAIN, teacher_share=share)
    return (loss, log), calls


KEY = jax.random.key(5)
HALF = jnp.float32(0.5)


def test_steady_step_equals_the_general_step_at_share_zero():
    general, gradient, log = training_step(WEIGHT, KEY, jnp.zeros(()), settings=SETTINGS)
    steady, steady_gradient, steady_log = training_step(WEIGHT, KEY, None, settings=SETTINGS)
    assert steady == pytest.approx(float(general), rel=1e-6)
    assert_close(steady_gradient, gradient)
    assert_close(steady_log["loss"], log["loss"])
    assert_close(steady_log["velocity_error"], log["velocity_error"])


def test_teacher_is_called_once_when_steady():
    """Once in the program, where the segments are a loop, on all states of a segment together."""
    batches = []

    def counted(x, sigma):
        batches.append((x.shape, sigma.shape))
        return teacher(x, sigma)

    jax.eval_shape(lambda: distil(keyed, WEIGHT, counted, NOISE, KEY, settings=SETTINGS, teacher_share=None))
    assert set(batches) == {((4 * B, N, D), (4 * B,))}


def test_share_is_traced():
    before = training_step._cache_size()
    losses = {float(training_step(WEIGHT, KEY, jnp.float32(share))[0]) for share in (1.0, 0.5, 0.0)}
    assert len(losses) == 3
    assert training_step._cache_size() <= before + 1


def test_gradient_is_that_of_the_whole_loss():
    """It is taken segment by segment, and equals the gradient of the sum."""
    _, gradient, _ = training_step(WEIGHT, KEY, HALF)
    whole = jax.jit(jax.grad(lambda weight: training_step(weight, KEY, HALF)[0]))(WEIGHT)
    assert_close(gradient, whole)


@pytest.mark.parametrize("share", [HALF, None])
def test_gradient_flows_through_the_mean_velocity_alone(share):
    """The trajectory (from x and the mixture) and the teacher are constants, even if its weights are differentiated."""
    draws = Draws(*(np.random.default_rng(2).random((B, size), np.float32) for size in (K, 4, 3)))
    mixture, x, start, length = random_mixture(), NOISE, jnp.ones(B), jnp.full(B, 0.5)

    def loss(mixture, x, scale):
        return segment_loss(
            mixture, lambda x, s: scale * teacher(x, s), x, start, length, draws, settings=SETTINGS, teacher_share=share
        )

    def matched(mixture, visits):
        predicted = distill.predicted_velocity(mixture, visits, start, length, settings=SETTINGS)
        return SETTINGS.loss_scale / 2 * jnp.square(predicted - visits.targets).mean()

    @jax.jit
    def gradients(mixture, x):
        visits = distill.visit(mixture, teacher, x, start, length, draws, settings=SETTINGS, teacher_share=share)
        return (
            jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1, 2))(mixture, x, 1.0),
            jax.grad(lambda *a: loss(*a)[1].sum(), argnums=(0, 1, 2))(mixture, x, 1.0),
            jax.grad(matched)(mixture, visits),
        )

    (of_loss, *others), of_end, expected = gradients(mixture, x)
    jax.tree.map(assert_close, of_loss, expected)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((others, of_end)))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(of_loss))


@pytest.mark.slow
def test_total_is_weighted_by_length_and_segments_follow_one_another():
    (total, log), calls = watched_loss(KEY, None)
    lengths = np.array([2 / 3, 1 / 3])
    assert total == pytest.approx(float((lengths * log["loss"]).sum()), rel=1e-6)
    states, sigmas, _ = zip(*calls, strict=True)

    @jax.jit
    def follow(x, sigma, sigma_next):
        return x - student(WEIGHT, x, jnp.full(B, sigma)).displacement(Span(sigma, sigma_next), sigma, sigma_next)

    np.testing.assert_allclose(sigmas, sigma_of(np.array([1.0, 1 / 3]), 3.2), rtol=1e-6)
    np.testing.assert_array_equal(states[0], NOISE)
    # Without the teacher and mode dropout, the trajectory is the student's own
    np.testing.assert_allclose(states[1], follow(states[0], *sigmas), atol=1e-5)


def test_each_segment_has_its_own_key_and_draws_are_reproducible():
    (loss, _), calls = watched_loss(KEY, HALF)
    (again, _), _ = watched_loss(KEY, HALF)
    (other, _), other_calls = watched_loss(jax.random.key(6), HALF)
    assert loss == again != other
    assert len({tuple(key.tolist()) for *_, key in [*calls, *other_calls]}) == 4


@pytest.mark.parametrize("share", [HALF, None])
def test_a_student_that_equals_the_teacher_has_no_loss(share):
    """The teacher's velocity is one constant per example. The modes have the same velocity, plus `off`."""
    c = jnp.array([[[0.7]], [[-1.3]]]) * jnp.ones((B, N, D))

    @jax.jit
    def loss(off):
        mixture = Mixture(
            means=jnp.repeat((c + off).reshape(B, N, 1, D // 4, 4), K, 2),
            logits=random_mixture().logits,
            log_momenta=jnp.zeros((B, N, K - 1, 4)),
        )
        return distil(
            lambda *_: mixture,
            (),
            lambda x, sigma: jnp.repeat(c, len(x) // B, 0),
            NOISE,
            KEY,
            settings=SETTINGS,
            teacher_share=share,
        )

    total, _, log = loss(0.0)
    assert total < 1e-10
    assert log["velocity_error"].max() < 1e-10
    total, _, log = loss(0.1)
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
        return segment_loss(mixture, teacher, NOISE, 1.0, 0.5, draws, settings=SETTINGS, teacher_share=share)[0]

    means = gradient(mixture).means
    assert np.isfinite(means).all()
    assert (means != 0).all()


def test_states_are_float32_for_bfloat16_networks():
    """Networks may compute in bfloat16: their inputs, and what is computed from their outputs, are float32."""
    given = []

    def half_student(_, x, sigma, key):
        given.extend([x.dtype, sigma.dtype])
        return random_mixture(dtype=jnp.bfloat16)

    def half_teacher(x, sigma):
        given.extend([x.dtype, sigma.dtype])
        return x.astype(jnp.bfloat16)

    for share in (HALF, None):
        loss, _, log = jax.eval_shape(
            functools.partial(distil, half_student, (), half_teacher, settings=SETTINGS, teacher_share=share),
            jnp.asarray(NOISE, jnp.bfloat16),
            KEY,
        )
        assert {loss.dtype, *(leaf.dtype for leaf in log.values()), *given} == {jnp.dtype(jnp.float32)}


# Optional terms and real latents


@pytest.mark.parametrize("share", [HALF, None])
def test_state_term(share):
    """Modes that are `off` too fast: after a span of σ, the student's state is off · σ away from the straight path."""
    c = jnp.array([[[0.7]], [[-1.3]]]) * jnp.ones((B, N, D))
    settings = dataclasses.replace(SETTINGS, nfe=1, loss_scale=0.0, mode_dropout=0.0, state_weight=3.0)

    def straight(x, sigma):
        return jnp.repeat(c, len(x) // B, 0)

    def loss(off):
        mixture = Mixture((c + off).reshape(B, N, 1, D // 4, 4), jnp.zeros((B, N, 1, 4)), jnp.zeros((B, N, 0, 4)))
        draws = Draws.draw(KEY, B, 1, 4)
        x, start, length = NOISE, jnp.ones(B), jnp.ones(B)
        visits = distill.visit(mixture, straight, x, start, length, draws, settings=settings, teacher_share=share)
        total, *_ = segment_loss(mixture, straight, x, start, length, draws, settings=settings, teacher_share=share)
        return total, visits, distill.matched_span(visits, length, settings=settings)

    loss = jax.jit(loss)
    assert loss(0.0)[0] < 1e-10
    total, visits, (_, until) = loss(0.1)
    # From the segment's start, because a visited state that the student reached has the student's error in it
    travelled = np.asarray((NOISE - visits.states)[..., 0, 0]) / np.asarray(c[:, 0, 0])  # [M, B] by the teacher's c
    sigma_a = np.asarray(sigma_of(visits.arrive, settings.shift))
    target = NOISE - travelled[..., None, None] * np.asarray(c) - (sigma_a - until)[..., None, None] * np.asarray(c)
    students = NOISE - (1 - np.asarray(until))[..., None, None] * (np.asarray(c) + 0.1)
    assert total == pytest.approx(3 / 2 * np.square(students - target).mean(), rel=1e-4)
    assert total > 1e-6


def test_state_term_has_a_gradient_and_is_off_by_default():
    settings = dataclasses.replace(PLAIN, state_weight=2.0)
    (loss, gradient, _), (more, other, _) = (training_step(WEIGHT, KEY, HALF, settings=s) for s in (PLAIN, settings))
    assert more > loss
    assert np.abs(other - gradient).max() > 1e-4


LATENTS = np.random.default_rng(7).standard_normal((B, N, D)).astype(np.float32)


def test_with_data_each_example_is_one_segment_from_its_latent():
    noise, latents = np.random.default_rng(8).standard_normal((2, 64, N, D)).astype(np.float32)
    seen = []

    def still(_, x, sigma, key):
        seen.append((np.array(x), np.array(sigma)))
        return Mixture(jnp.zeros((64, N, 1, D // 4, 4)), jnp.zeros((64, N, 1, 4)), jnp.zeros((64, N, 0, 4)))

    with jax.disable_jit():
        options = {"settings": PLAIN, "teacher_share": None, "latents": latents}
        *_, log = distil(still, (), lambda x, sigma: x, jnp.asarray(noise), KEY, **options)
    assert log["loss"].shape == (1,)
    ((x, sigma),) = seen
    first, second = (np.isclose(sigma, sigma_of(start, 3.2)) for start in (1.0, 1 / 3))
    assert (first ^ second).all()
    assert 0.4 < first.mean() < 0.9  # the first segment is two thirds of t ∈ [0, 1]
    np.testing.assert_allclose(x, latents + sigma[:, None, None] * (noise - latents), atol=1e-5)


def test_flow_matching_term():
    """By hand for a student of constant velocity; and the gradient is that of both terms."""
    settings = dataclasses.replace(PLAIN, data_weight=2.0)
    run = functools.partial(training_step, WEIGHT, KEY, None, latents=LATENTS)
    (loss, gradient, _), (more, other, log) = run(), run(settings=settings)
    assert more == pytest.approx(float(loss + 2.0 * log["reconstruction"][0]), rel=1e-6)
    assert np.abs(other - gradient).max() > 1e-4

    constant = Mixture(jnp.full((B, N, 1, D // 4, 4), 0.3), jnp.zeros((B, N, 1, 4)), jnp.zeros((B, N, 0, 4)))
    options = {"settings": settings, "teacher_share": None, "latents": LATENTS}
    *_, log = jax.jit(lambda: distil(lambda *_: constant, (), teacher, NOISE, KEY, **options))()
    assert log["reconstruction"][0] == pytest.approx(0.5 * np.square(0.3 - (NOISE - LATENTS)).mean(), rel=1e-5)


@pytest.mark.parametrize("share", [HALF, None])
def test_a_velocity_of_another_shape_is_refused(share):
    """[.., N, 1] would broadcast against the states without an error."""
    with pytest.raises(AssertionError, match="shape"):
        jax.eval_shape(
            lambda: distil(
                keyed, WEIGHT, lambda x, sigma: x[..., :1], NOISE, KEY, settings=SETTINGS, teacher_share=share
            )
        )


def test_latents_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="shape"):
        distil(keyed, WEIGHT, teacher, NOISE, KEY, settings=SETTINGS, teacher_share=None, latents=LATENTS[:1])
