"""What a student's pictures are worth.

frechet.py      mean and covariance of features as they come, and the Fréchet distance
features.py     the networks that look at pictures: Inception and CLIP
picture_sets.py pictures of a folder, or straight from a sampler
statistics.py   what is kept of a set of pictures: streamed, resumed, reused
metrics.py      FID, pFID and CLIP score of one set, against references
benchmarks.py   pictures laid out as GenEval's and DPG-Bench's scorers want them
"""
