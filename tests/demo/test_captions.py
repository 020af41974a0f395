"""The captions of both worlds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.demo import emoji, shapes

both = pytest.mark.parametrize("captions", [shapes.CAPTIONS, emoji.CAPTIONS], ids=["shapes", "emoji"])


@both
def test_captions_map_to_words_and_back(captions):
    every = captions.all()
    assert len({str(caption) for caption in every}) == len(every)
    assert captions.of(str(every[-7])) == every[-7]
    with pytest.raises(KeyError):
        captions.of("a caption of no world")


@both
def test_index_matches_all_captions(captions):
    attributes = jnp.array([caption.as_array() for caption in captions.all()])
    np.testing.assert_array_equal(captions.index(attributes), np.arange(len(attributes)))


@both
def test_random_attributes_are_omitted_as_often_as_they_should(captions):
    drawn = np.asarray(captions.random(jax.random.key(0), 5000))
    for column, values in zip(drawn.T, captions.values.values(), strict=True):
        assert set(column) - {-1} == set(range(len(values)))
    omitted = dict(zip(captions.values, (drawn < 0).mean(0), strict=True))
    for name in captions.values:
        np.testing.assert_allclose(omitted[name], captions.omitted.get(name, 0), atol=0.05)


@both
def test_words(captions):
    assert {word for caption in captions.all()[::37] for word in str(caption).split()} <= set(captions.words())
