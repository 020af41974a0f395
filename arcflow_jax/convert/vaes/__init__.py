"""Tables of the VAEs, in diffusers' layout; `kl` also in the authors' (ae.safetensors).

One file a network in networks/vaes, of the same name. May import convert.rules and each other.
"""
