"""How close a student comes to its teacher, and what its pictures are worth.

trajectory.py          the two trajectories compared, as pure functions
comparison.py          a student and a teacher, ready to be compared
trajectory_report.py   the same over many prompts: streamed, resumed, written down
trajectory_plot.py     its picture
frechet.py             mean and covariance of features as they come, and the Fréchet distance
features.py            the networks that look at pictures: Inception and CLIP
picture_sets.py        pictures of a folder, or straight from a sampler
statistics.py          what is kept of a set of pictures: streamed, resumed, reused
metrics.py             FID, pFID and CLIP score of one set, against references
benchmarks.py          pictures laid out as GenEval's and DPG-Bench's scorers want them
"""
