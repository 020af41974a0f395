"""What was trained, on disk.

`training` has the checkpoints of a run, `student_formats` the authors' layout of students, `diffusers_folder` a folder
that PyTorch samples. `verify` reads all of a model, run or export again. May import models and what lies below them.
"""
