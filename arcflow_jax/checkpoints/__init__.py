"""What was trained, on disk.

`training` has the checkpoints of a run, `aside` moves those away that it no longer resumes from. `student_formats` has
the authors' layout of students, `diffusers_folder` a folder that PyTorch samples; `diffusers_pipeline` and
`comfyui_nodes` are files of that folder. `verify` reads all of a model, run or export again. May import models and what
lies below them.
"""
