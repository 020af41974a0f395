"""The method's mathematics, as pure functions on arrays and pytrees: no modules, no files, no devices.

`schedule` (timesteps, σ, segments), `curve` (a velocity on one segment: the interface), `momentum` and `legendre` (the two
bases), `sampler` (few-step and Euler sampling), `distill` (the loss). May import errors.
"""
