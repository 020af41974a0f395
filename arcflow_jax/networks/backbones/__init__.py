"""The diffusion transformers, one file a family, each up to its output layer.

`networks.transformer` has what they share. May import what networks may, and each other.
"""
