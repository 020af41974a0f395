"""Tables of the transformers, one a checkpoint layout.

A family's own name is diffusers' layout; `…_original` is a single file of the model's authors, `…_xlabs` a trainer's
LoRA. May import convert.rules, each other, and constants of the network that they fill.
"""
