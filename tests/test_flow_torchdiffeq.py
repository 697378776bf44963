"""Adaptive solves beside torchdiffeq on one network with the same weights in torch and in Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.flow import NetworkVelocity, sample

WIDTH = 32
TOLERANCE = 1e-5


class Net(nn.Module):
    """Two hidden layers on flattened 4x4x2 latents and time."""

    num_classes: int = 0

    @nn.compact
    def __call__(self, x, t, cond, train=False):
        flat = jnp.concatenate([x.reshape(x.shape[0], -1), t[:, None]], axis=-1)
        hidden = nn.tanh(nn.Dense(WIDTH)(flat))
        hidden = nn.tanh(nn.Dense(WIDTH)(hidden))
        return nn.Dense(x[0].size)(hidden).reshape(x.shape)


@pytest.fixture(scope="module")
def pair():
    """The Flax velocity and a torch function with its weights, and noise."""
    torch = pytest.importorskip("torch")
    model, noise = Net(), np.asarray(jax.random.normal(jax.random.key(0), (8, 4, 4, 2)))
    params = model.init(jax.random.key(1), noise, jnp.ones(8), None)["params"]
    # Strong enough weights that the solver has something to do.
    params = jax.tree.map(lambda p: 2.0 * p, params)
    layers = []
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        layers.append((torch.tensor(np.asarray(kernel)), torch.tensor(np.asarray(bias))))

    def field(t, x):
        time = t.to(x.dtype).expand(x.shape[0], 1)
        y = torch.cat([x.reshape(x.shape[0], -1), time], dim=-1)
        for index, (kernel, bias) in enumerate(layers):
            y = y @ kernel + bias
            y = torch.tanh(y) if index < 2 else y
        return y.reshape(x.shape)

    return NetworkVelocity(params=params, model=model), field, noise


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "dopri8"])
def test_endpoint_and_evaluations_agree(pair, solver):
    torch = pytest.importorskip("torch")
    torchdiffeq = pytest.importorskip("torchdiffeq")
    velocity, field, noise = pair
    evaluations = 0

    def counted(t, x):
        nonlocal evaluations
        evaluations += 1
        return field(t, x)

    with torch.no_grad():
        theirs = torchdiffeq.odeint(
            counted,
            torch.tensor(noise),
            torch.tensor([1.0, 0.0]),
            rtol=TOLERANCE,
            atol=TOLERANCE,
            method=solver,
        )[-1].numpy()
    ours, stats = sample(
        velocity,
        jnp.asarray(noise),
        solver=solver,
        rtol=TOLERANCE,
        atol=TOLERANCE,
        error_norm="batch",
    )
    # Each errs by some tolerances a step, which this expanding flow (|x| up to 5) multiplies.
    np.testing.assert_allclose(ours, theirs, atol=100 * TOLERANCE)
    assert int(stats["nfe"][0]) == pytest.approx(evaluations, rel=0.1), (stats, evaluations)
