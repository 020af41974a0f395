"""How close a student comes to its teacher, and how good its images are. May import `pipeline` and the rooms below it.

trajectory/       the distance to the teacher, a room of its own
frechet.py        running mean and covariance of features, and the Fréchet distance
features.py       the networks that judge images: Inception, CLIP and DINOv2
diversity.py      how different the images of one prompt are: pure functions
retrieval.py      whether an image's own prompt is the nearest of all: pure functions
image_sets.py     images from a folder, or straight from a sampler
measures.py       what each metric measures on a batch of images, with its network
statistics.py     what is kept of a set of images: streamed, resumable, reusable as a reference
metrics.py        FID, CLIP score, retrieval, HPS and diversity of one set of images, against references
benchmarks.py     images laid out for the scorers of GenEval and DPG-Bench
"""
