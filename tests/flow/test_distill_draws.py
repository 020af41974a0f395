"""The random numbers of a training step, the timesteps that they cut a segment at, and the settings' limits."""

# B batch, K modes

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import Distillation, Draws, cut_points, teacher_share, visit_times

B, K = 2, 3
SETTINGS = Distillation()

timed = jax.jit(visit_times, static_argnames="settings")


@hypothesis_settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    share=st.floats(0, 1, width=32),
    start=st.floats(0.125, 1, width=32),
    part=st.floats(0.05, 1),
    window=st.sampled_from([0, 3, 8]),
    cuts=st.sampled_from(["sorted", "stratified"]),
)
def test_timesteps_stay_in_the_segment_and_leave_room_for_the_window(seed, share, start, part, window, cuts):
    settings = dataclasses.replace(SETTINGS, window=window, cuts=cuts)
    draws = Draws(*(np.random.default_rng(seed).random((B, size), np.float32) for size in (K, 4, 3)))
    start = np.full(B, start, np.float32)
    length = np.float32(part) * start
    room = np.asarray(settings.window_length(length))
    arrive, leave = map(np.asarray, timed(draws, start, length, settings=settings, teacher_share=share))
    assert arrive.shape == leave.shape == (4, B)
    assert (room <= length).all()
    whole = np.concatenate([start[None], np.stack([arrive, leave], 1).reshape(-1, B)])
    assert (np.diff(whole, axis=0) <= 1e-7).all()
    assert (leave[-1] - room >= start - length - 1e-6).all()
    # The teacher gets its whole share. The student gets the rest, less what it leaves for the end.
    np.testing.assert_allclose((arrive - leave).sum(0), share * (length - room), atol=1e-5)
    last = np.asarray(cut_points(draws, cuts)[0]).max(-1)
    np.testing.assert_allclose(start - leave[-1], (length - room) * (share + (1 - share) * last), atol=1e-5)


def test_window_is_whole_substeps_that_divide_the_segment():
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


def test_stratified_cuts():
    """One in each cell, and together uniform, as the sorted ones; the moves are of more equal length."""
    draws = Draws.draw(jax.random.key(0), 4000, 1, 4)
    student, teacher = map(np.asarray, cut_points(draws, "stratified"))
    assert (np.floor(4 * student) == np.arange(4)).all()
    assert np.histogram(student, 20, (0, 1))[0] == pytest.approx(800, rel=0.2)
    assert (np.floor(4 * teacher + 0.5) == np.arange(1, 4)).all()
    # Var of a cut is 1/12 of the cell's square: of M moves 2 have it once, the others twice
    squares = [
        np.square(np.diff(np.pad(cuts, ((0, 0), (1, 1)), constant_values=(0, 1)))).sum(1).mean()
        for cuts in (np.asarray(cut_points(draws, "sorted")[1]), teacher)
    ]
    np.testing.assert_allclose(squares, [2 / 5, (4 + 6 / 12) / 16], rtol=0.02)


@pytest.mark.parametrize(("least", "shares"), [(0.0, [1, 0.75, 0, 0]), (0.3, [1, 0.75, 0.3, 0.3])])
def test_teacher_share_falls(least, shares):
    settings = Distillation(decay=4, least_share=least)
    np.testing.assert_allclose([teacher_share(step, settings) for step in (0, 1, 4, 9)], shares)
    assert teacher_share(jnp.int32(0), Distillation(decay=0, least_share=least)) == pytest.approx(least)
    assert jax.jit(lambda step: teacher_share(step, SETTINGS))(jnp.int32(500)) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nfe", 0),
        ("states", 0),
        ("substeps", 0),
        ("shift", 0.0),
        ("final_step_ratio", -1.0),
        ("mode_dropout", 1.0),
        ("state_weight", -1.0),
        ("data_weight", -1.0),
        ("teacher_guidance", "none"),
    ],
)
def test_invalid_settings_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        dataclasses.replace(SETTINGS, **{name: value})
