"""What is kept on disk: converted models, training checkpoints, students in other layouts.

`conversion` writes a model directory, `quantize` writes one again with quantized kernels, and `model_directory` reads
it. `training` has the checkpoints of a run, `student_formats` the authors' layout of students, `writer` streams arrays
that are larger than memory. May import families and what lies below them.
"""
