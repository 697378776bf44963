"""Shared by all tests: where real images are, and a small command line to run the jobs with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def fashion_mnist() -> Path:
    """The folder of Debian's dataset-fashion-mnist."""
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"{FASHION_MNIST} is missing: apt-get install dataset-fashion-mnist")
    return FASHION_MNIST


@pytest.fixture(scope="session")
def command_line():
    """Run ``python -m lfm_jax.main`` in its own process, from a folder that is not the checkout."""

    def run(*flags: str, devices: int = 1, cwd: Path | None = None, **options):
        env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        return subprocess.run(
            [sys.executable, "-m", "lfm_jax.main", *flags],
            env=env,
            cwd=cwd or "/tmp",
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            **options,
        )

    return run
