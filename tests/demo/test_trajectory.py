"""The states on the way from noise to data end where the samplers end."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.demo.trajectory import student_states, teacher_states
from arcflow_jax.flow.schedule import sigma_of
from arcflow_jax.pipeline import ArcFlowPipeline
from tests.helpers.random_student import write_adapter

pytestmark = pytest.mark.slow


def inputs(pipeline: ArcFlowPipeline):
    rows, columns = pipeline.grid(32, 32)
    return pipeline.noise(0, 2, rows, columns), pipeline.encode(["a", "b"], guidance=1.0, rows=rows, columns=columns)


def test_teacher_states_end_in_its_sample(tiny_flux):
    teacher = ArcFlowPipeline.from_pretrained(tiny_flux)
    noise, conditioning = inputs(teacher)
    sigmas, states = teacher_states(teacher, noise, conditioning, 3)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_allclose(states[-1], teacher.denoise(noise, conditioning, 3), atol=1e-5)
    with pytest.raises(ValueError, match="no student"):
        student_states(teacher, noise, conditioning, 2, sigmas)


def test_student_states_pass_through_the_segments(tiny_flux, tmp_path):
    student = ArcFlowPipeline.from_pretrained(tiny_flux, adapter=write_adapter(tiny_flux, tmp_path / "run", 0))
    noise, conditioning = inputs(student)
    middle = float(sigma_of(jnp.float32(0.5), student.student.distillation.shift))
    states = student_states(student, noise, conditioning, 2, jnp.array([1.0, middle, 0.0]))
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_allclose(states[-1], student.denoise(noise, conditioning, 2), atol=1e-5)
    # Up to the middle there is one curve, which does not depend on what comes after it
    alone = student_states(student, noise, conditioning, 2, jnp.array([middle]))
    np.testing.assert_allclose(states[1], alone[0], atol=1e-6)
    assert float(jnp.abs(states[1] - states[0]).max()) > 0.01
