"""Random style LoRAs, by default for the bundled FLUX.1 teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH, TEXT, CHANNELS = 128, 64, 16  # of the bundled teacher
LAYERS = {
    "transformer.transformer_blocks.1.attn.to_q": (WIDTH, WIDTH),
    "transformer.transformer_blocks.0.ff.net.2": (WIDTH, 4 * WIDTH),
    "transformer.single_transformer_blocks.3.proj_out": (WIDTH, 5 * WIDTH),
}
OUTPUT = {"transformer.proj_out": (CHANNELS, WIDTH), "transformer.norm_out.linear": (2 * WIDTH, WIDTH)}


def write_lora(
    file: Path, seed: int = 0, rank: int = 4, layers: dict[str, tuple[int, int]] = LAYERS, strength: float = 1.0
) -> Path:
    """Writes a LoRA in diffusers' layout, and returns its file."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer, (d_out, d_in) in layers.items():
        tensors[f"{layer}.lora_A.weight"] = rng.standard_normal((rank, d_in)) / d_in**0.5
        tensors[f"{layer}.lora_B.weight"] = rng.standard_normal((d_out, rank)) * (strength / rank**0.5)
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, file)
    return file
