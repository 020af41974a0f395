"""Images to judge, and small random networks that judge them, in the formats of the real ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.data.output import save_image
from arcflow_jax.demo import ASSETS

PROMPTS = ["a red circle", "a large green ring", "a blue square on the left", "a small red ring", "a green circle"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip(folder: Path) -> Path:
    """Writes a CLIP model with the bundled tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for file in (ASSETS / "tiny-flux" / "tokenizer").iterdir():
        shutil.copy(file, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = SIZES | {"intermediate_size": 32}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def dino(folder: Path) -> Path:
    """Writes a DINOv2 model with the preprocessor's options as the published ones have them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(folder)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


def write_images(
    folder: Path, count: int, seed: int, width: int = 330, height: int = 310, images_per_prompt: int | None = None
) -> np.ndarray:
    """Writes smooth random images as PNGs with their prompts; returns their pixels [B, H, W, 3].

    The prompts take turns, or follow one another with so many images each.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir()
    pixels = []
    for i in range(count):
        coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.info["prompt"] = PROMPTS[(i if images_per_prompt is None else i // images_per_prompt) % len(PROMPTS)]
        save_image(image, folder / f"{i:03d}.png")
        pixels.append(np.asarray(image))
    return np.stack(pixels)
