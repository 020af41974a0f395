"""The method's mathematics, as pure functions on arrays and pytrees: no modules, no files, no devices.

`schedule` (timesteps, σ, segments), `curve` (the interface of a velocity on a segment), `momentum` and `legendre` (the
two kinds of curve), `sampler` (few-step and Euler sampling), `distill` (the loss). May import errors and schema.
"""
