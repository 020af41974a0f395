"""From PyTorch tensor names to ours and back: rules, the strict engine, and one table per checkpoint layout.

`rules` defines the entries of a table, `engine` checks and reads checkpoints, `adapter` derives the table of a student
from that of its base model, `style_lora` reads style LoRAs. The tables lie as the networks do: `backbones`, `text`,
`vaes`. May import networks, schema and errors. Loading a converted model does not need the engine.
"""
