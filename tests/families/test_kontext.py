"""FLUX.1-Kontext: the bundled FLUX.1 teacher as a Kontext model, against diffusers' pipeline."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from arcflow_jax import families
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.families import kontext
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.pipeline import ArcFlowPipeline
from tests.helpers.twins import relative_error


def photo(height: int, width: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.slow
def test_latents_are_those_of_diffusers(tmp_path, monkeypatch):
    """At smaller resolutions than the real ones, so that it is fast."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    module = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux_kontext")
    source = shutil.copytree(ASSETS / "tiny-flux", tmp_path / "source")
    index = source / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxKontextPipeline"}))
    ours = ArcFlowPipeline.from_pretrained(convert_model(source, tmp_path / "model"))
    small = [(48, 32), (32, 32), (32, 80)]
    monkeypatch.setattr(module, "PREFERRED_KONTEXT_RESOLUTIONS", small)
    monkeypatch.setattr(kontext, "RESOLUTIONS", small)

    theirs = diffusers.FluxKontextPipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    length = ours.prompt_encoder.encoders["text_encoder_2"].length
    noise = np.asarray(ours.noise(0, 1, 2, 4))
    shared = {"prompt": "make the ring green", "image": photo(70, 100), "height": 32, "width": 64}
    shared |= {"num_inference_steps": 2, "guidance_scale": 2.5, "output_type": "latent"}
    options = {"latents": torch.from_numpy(noise.copy()), "max_sequence_length": length, "max_area": 32 * 64}
    expected = theirs(**shared, **options).images
    made = ours(latents=noise, **shared).images
    assert relative_error(made, expected) < 1e-5
    without = ours(latents=noise, **shared | {"image": None}).images
    assert relative_error(without, expected) > 0.01
    own = ours("make the ring green", image=photo(70, 100), num_inference_steps=1).images[0]
    assert own.size == (48, 32)  # of the reference image
    with pytest.raises(UserError, match="image has 2 reference images, but has to have 1"):
        ours.stream("x", image=[photo(70, 100)] * 2)


@pytest.mark.parametrize(("height", "width"), [(500, 500), (97, 650), (1031, 1024), (2000, 1333)])
def test_fitted_as_in_diffusers(height, width):
    module = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux_kontext")
    assert list(kontext.RESOLUTIONS) == module.PREFERRED_KONTEXT_RESOLUTIONS
    processor = module.VaeImageProcessor(vae_scale_factor=16)
    image = photo(height, width)
    h, w = processor.get_default_height_width(image)
    _, *size = min((abs(w / h - a / b), a, b) for a, b in module.PREFERRED_KONTEXT_RESOLUTIONS)
    expected = processor.resize(image, size[1], size[0])
    np.testing.assert_array_equal(np.asarray(kontext.fitted(image, 16)), np.asarray(expected))


def test_an_image_smaller_than_a_token_is_refused():
    with pytest.raises(UserError, match="a reference image is 15x40, but has to have at least 16 pixels a side"):
        kontext.fitted(photo(15, 40), 16)


def test_a_transformer_of_two_families_is_that_of_the_first():
    assert families.of_transformer("FluxTransformer2DModel", "x").pipeline == "FluxPipeline"
    assert families.of_pipeline("FluxKontextPipeline", "x").references.most == 1
