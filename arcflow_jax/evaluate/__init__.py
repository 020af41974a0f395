"""How close a student comes to its teacher, and how good its images are. May import `pipeline` and the rooms below it.

trajectory.py          compares two trajectories: pure functions
comparison.py          a student and its teacher, loaded and ready to be compared
trajectory_report.py   the comparison over many prompts: streamed, resumable, written to disk
trajectory_plot.py     the report's plot
frechet.py             running mean and covariance of features, and the Fréchet distance
features.py            the networks that judge images: Inception and CLIP
image_sets.py          images from a folder, or straight from a sampler
statistics.py          what is kept of a set of images: streamed, resumable, reusable as a reference
metrics.py             FID, pFID and CLIP score of one set of images, against references
benchmarks.py          images laid out for the scorers of GenEval and DPG-Bench
"""
