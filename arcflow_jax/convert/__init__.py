"""From PyTorch's tensor names to ours and back: the rules, the strict engine, and one table for each checkpoint layout.

`rules` has what tables are made of, `engine` checks and reads, `adapter` derives a student's table from its base's.
Every other file is a table. May import networks' states, flow and errors. Loading a converted model needs no engine.
"""
