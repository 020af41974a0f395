"""Installs arcflow_jax, with the recipes of `configs/` as `arcflow_jax.configs`."""

from pathlib import Path

from setuptools import find_packages, setup

# Reads prompts from Parquet files and from data sets on the hub
DATA = ["datasets>=4", "pyarrow>=18"]
# Paths in buckets
BUCKETS = {"gcs": ["gcsfs>=2026.1"], "s3": ["s3fs>=2026.1"]}
# Plots the results of `arcflow evaluate`
PLOTS = ["matplotlib>=3.9"]
# The server and its page
SERVE = ["fastapi>=0.115", "gradio>=6.15,<7", "prometheus-client>=0.20", "python-multipart>=0.0.18", "uvicorn>=0.30"]

setup(
    name="arcflow_jax",
    version="0.2.0",
    description="ArcFlow in JAX: distils large flow-matching text-to-image models into 2-step generators",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url="https://arxiv.org/abs/2602.09014",
    project_urls={"Method (paper)": "https://arxiv.org/abs/2602.09014"},
    keywords=["JAX", "Flax", "diffusion", "flow matching", "distillation", "text-to-image", "TPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Environment :: GPU :: NVIDIA CUDA :: 13",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["arcflow_jax", "arcflow_jax.*"]), "arcflow_jax.configs"],
    package_dir={"arcflow_jax.configs": "configs"},
    package_data={"arcflow_jax": ["assets/**/*", "py.typed"], "arcflow_jax.configs": ["**/*.json"]},
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "etils>=1.9",
        "filelock>=4.0.4",
        "flax>=0.12.8,<0.13",
        "fsspec>=2026.1",
        "grain>=0.2.10",
        "huggingface_hub>=1.3",
        "jax>=0.10.0,<0.13",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "msgspec>=0.19",
        "numpy>=2.0",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "qwix>=0.1.8,<0.2",
        "rich>=13",
        "safetensors>=0.6",
        "tensorboard>=2.17",
        "tensorstore>=0.1.84",
        "tokenizers>=0.22",
        "transformers>=5.0,<6",
        "typer>=0.15",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        # The compiler for GPUs, which `arcflow compile-report` uses where there is no GPU
        "cuda12-compile": ["jax[cuda12-local]", "nvidia-cudnn-cu12>=9.10,<10"],
        "data": DATA,
        **BUCKETS,
        # The trajectory plot; the networks that judge images, which run in PyTorch
        "eval": [*PLOTS, "torch>=2.8", "transformers>=5.5,<6"],
        "serve": SERVE,
        "test": [
            *DATA,
            *PLOTS,
            *BUCKETS["gcs"],
            *BUCKETS["s3"],
            *SERVE,
            "emoji>=2.14",  # the names of the emoji world
            "fonttools>=4.50",  # reads the emoji font, if it is installed
            "gcp-storage-emulator>=2026.7",
            "hypothesis>=6.100",
            "flask>=3",  # for moto's server
            "flask-cors>=5",
            "moto[s3]>=5.1",
            "openai>=2",  # the client that the server is tested with
            "playwright>=1.50",  # drives a Chromium that is there, for the page
            "pytest>=8.4",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
            "scipy>=1.14",
            "ty==0.0.105",
        ],
        # The site, and its notebook, which the tests run
        "docs": [
            "ipykernel>=6.30",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.7,<10",
            "mkdocstrings[python]>=1.0",
            "nbclient>=0.10",
        ],
        # The PyTorch twins that the parity tests compare with
        "parity": ["diffusers>=0.35", "peft>=0.17", "torch>=2.8"],
    },
    entry_points={"console_scripts": ["arcflow = arcflow_jax.cli.app:main"]},
)
