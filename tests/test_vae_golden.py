"""Parity with stored results of diffusers' PyTorch class, and without PyTorch at all."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lfm_jax import vae

GOLDEN = Path(__file__).parent / "golden" / "vae.npz"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def bare_file(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "vae.safetensors"
    names = [name for name in golden if name.startswith("weight/")]
    save_file({name.removeprefix("weight/"): golden[name] for name in names}, path)
    return path


def test_golden_vectors(golden, bare_file):
    model, params = vae.load_vae(bare_file, family="sd", norm_groups=4)
    assert model.attention_levels == (1,)

    def both(params, x, z):
        posterior = model.apply({"params": params}, x, method="encode")
        return posterior, model.apply({"params": params}, z, method="decode")

    posterior, image = jax.jit(both)(params, golden["x"], golden["z"])
    for name, value in {"mean": posterior.mean, "logvar": posterior.logvar, "image": image}.items():
        error = np.abs(value - golden[name]).max() / golden[name].std()
        assert error <= 1e-4, (name, error)


def test_safetensors_and_msgpack_need_no_torch(bare_file, tmp_path):
    """In an interpreter that cannot import torch, load, save, and read a Flax file."""
    script = f"""
import sys
sys.modules["torch"] = None
import flax.serialization
from lfm_jax import vae
model, params = vae.load_vae({str(bare_file)!r}, family="sd", norm_groups=4)
vae.save_vae({str(tmp_path)!r}, model, params)
import os
os.remove({str(tmp_path / "diffusion_pytorch_model.safetensors")!r})
with open({str(tmp_path / "diffusion_flax_model.msgpack")!r}, "wb") as file:
    file.write(flax.serialization.msgpack_serialize(params))
again, _ = vae.load_vae({str(tmp_path)!r})
assert again == model
try:
    open({str(tmp_path / "model.ckpt")!r}, "wb").close()
    vae.load_vae({str(tmp_path / "model.ckpt")!r})
except vae.weights.UserError as error:
    assert "needs PyTorch" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
