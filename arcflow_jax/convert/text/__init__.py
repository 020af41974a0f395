"""Tables of the text encoders, in transformers' layout.

One file a network in networks/text, of the same name. May import convert.rules, and constants of that network.
"""
