"""What is computed: layers and attention, one file a network, and the student that stands on a frozen base.

`layers`, `lora`, `attention` and `head` are shared. `student` has the model with its two modes, teacher and student.
`conditioning` is the contract of what a velocity depends on. Networks know no files and no prompts. May import flow,
parallel and errors.
"""
