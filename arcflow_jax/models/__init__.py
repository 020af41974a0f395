"""Converted models.

`conversion` writes a model directory, `quantize` writes one again with quantized kernels, `model_directory` reads it,
and `model_cache` keeps those that nobody converted by hand. `style_loras` reads files of style LoRAs, which a
conversion can fuse. May import families and what lies below them.
"""
