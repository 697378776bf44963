"""Is every solve what it says? Orders, agreement with torchdiffeq, marginals, likelihood, bound.

    python -m benchmarks.solvers                        # all questions
    python -m benchmarks.solvers order torchdiffeq      # some of them

Closed forms and other people's solvers are the measure; figures go to
``docs/results/sampling.json``. `benchmarks.trained_flow` has the questions to a trained run.
"""

import importlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import figures
from lfm_jax import rng
from lfm_jax.flow import (
    SDE_METHODS,
    SOLVERS,
    NetworkVelocity,
    bits_per_dim,
    classifier_free,
    invert,
    log_likelihood,
    sample,
    sample_sde,
    velocity_profile,
    wasserstein_bound,
)
from lfm_jax.models import Cond, create_model, init_params

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.solvers"
# Closed-form velocities are made where the tests make theirs.
sys.path.append(str(ROOT / "tests"))
cases = importlib.import_module("flow_cases")


def keep(name: str, value: Any, op: str, bound: Any, part: str, note: str = "") -> None:
    """A figure of one of the questions below."""
    figures.keep("sampling", name, value, op, bound, f"{COMMAND} {part}", note)


def order() -> None:
    """Convergence on dx/dt = w cos(w t) (1 + x^2), in float64."""
    steps = {1: (64, 128), 2: (128, 256), 3: (32, 64), 4: (32, 64), 5: (20, 40), 8: (10, 20)}
    with jax.enable_x64(True):
        x1 = jnp.linspace(-0.6, 0.8, 64).reshape(8, 8)
        velocity = cases.Tangent(w=jnp.asarray(2.5))
        exact = velocity.solution(x1)
        for name, solver in SOLVERS.items():
            # h^2 log(1/h): the logarithm fades slowly.
            pair = (1024, 2048) if name == "exp2" else steps[solver.order]
            errors = [
                float(
                    jnp.sqrt(
                        jnp.mean((sample(velocity, x1, solver=name, num_steps=n)[0] - exact) ** 2)
                    )
                )
                for n in pair
            ]
            measured = float(np.log2(errors[0] / errors[1]))
            keep(
                f"order of {name} (of order {solver.order})",
                measured,
                "between",
                [solver.order - 0.35, solver.order + 0.8],
                "order",
                f"RMS errors {errors[0]:.2e} and {errors[1]:.2e} at {pair[0]} and {pair[1]} steps",
            )


def torchdiffeq() -> None:
    """A network of two hidden layers with the same weights in torch and in Flax."""
    import flax.linen as nn
    import torch
    import torchdiffeq as theirs

    class Net(nn.Module):
        num_classes: int = 0

        @nn.compact
        def __call__(self, x, t, cond, train=False):
            flat = jnp.concatenate([x.reshape(x.shape[0], -1), t[:, None]], axis=-1)
            hidden = nn.tanh(nn.Dense(32)(flat))
            hidden = nn.tanh(nn.Dense(32)(hidden))
            return nn.Dense(x[0].size)(hidden).reshape(x.shape)

    model, noise = Net(), np.asarray(jax.random.normal(jax.random.key(0), (8, 4, 4, 2)))
    params = model.init(jax.random.key(1), noise, jnp.ones(8), None)["params"]
    params = jax.tree.map(lambda p: 2.0 * p, params)  # so that the solver has something to do
    layers = [
        [torch.tensor(np.asarray(params[f"Dense_{i}"][k])) for k in ("kernel", "bias")]
        for i in range(3)
    ]
    evaluations = 0

    def field(t, x):
        nonlocal evaluations
        evaluations += 1
        y = torch.cat([x.reshape(len(x), -1), t.to(x.dtype).expand(len(x), 1)], dim=-1)
        for i, (kernel, bias) in enumerate(layers):
            y = y @ kernel + bias
            y = torch.tanh(y) if i < 2 else y
        return y.reshape(x.shape)

    velocity = NetworkVelocity(params=params, model=model)
    for solver in ("bosh3", "dopri5", "dopri8"):
        for tolerance in (1e-3, 1e-5):
            evaluations = 0
            options = {"rtol": tolerance, "atol": tolerance}
            with torch.no_grad():
                ends = torch.tensor([1.0, 0.0])
                start = torch.tensor(noise)
                end = theirs.odeint(field, start, ends, method=solver, **options)[-1].numpy()
            x, stats = sample(
                velocity, jnp.asarray(noise), solver=solver, error_norm="batch", **options
            )
            nfe = int(stats["nfe"][0])
            where = f"{solver} at {tolerance:g}"
            keep(
                f"endpoint of {where}, largest difference to torchdiffeq over the tolerance",
                float(np.abs(np.asarray(x) - end).max() / tolerance),
                "<=",
                100.0,
                "torchdiffeq",
                f"each errs by some tolerances a step, which this expanding flow (|x| up to "
                f"{np.abs(end).max():.1f}) multiplies",
            )
            keep(
                f"NFE of {where} over torchdiffeq's",
                nfe / evaluations,
                "between",
                [0.9, 1.1],
                "torchdiffeq",
                f"{nfe} and {evaluations}",
            )


def marginals() -> None:
    """Mean and covariance of stochastic sampling on a Gaussian flow."""
    mean, std, count, steps = jnp.asarray([1.0, -0.5]), jnp.asarray([0.6, 1.3]), 16384, 100
    velocity = cases.Gaussian(mean=mean, std=std)
    positions = jnp.arange(count, dtype=jnp.uint32)
    key = jax.random.key(0)
    noise = rng.normal(rng.stream_keys(key, rng.Stream.SAMPLE, positions), (2,))
    keys = rng.stream_keys(key, rng.Stream.SDE, positions)
    for method in SDE_METHODS:
        x = np.asarray(
            sample_sde(velocity, noise, keys, method=method, eta=1.0, num_steps=steps)[0]
        )
        note = f"{count} samples, {steps} steps, eta 1; standard error {1.3 / count**0.5:.3f}"
        keep(
            f"SDE {method}: error of the mean",
            float(np.abs(x.mean(0) - mean).max()),
            "<=",
            0.05,
            "marginals",
            note,
        )
        # An ancestral step draws the posterior of a single datum: too little variance by O(step).
        keep(
            f"SDE {method}: error of the covariance",
            float(np.abs(np.cov(x.T) - np.diag(std**2)).max()),
            "<=",
            0.1,
            "marginals",
            f"{note}; variances 0.36 and 1.69",
        )


def guidance() -> None:
    """Scale 1 is no guidance, bit for bit, at the cost of none."""
    velocity, noise = small_network()
    guided = classifier_free(velocity, num_classes=3, scale=1.0)
    options = {"solver": "heun", "num_steps": 4}
    x, stats = sample(guided, noise, **options)
    y, _ = sample(velocity, noise, **options)
    keep(
        "guidance of scale 1: largest difference to none",
        float(jnp.abs(x - y).max()),
        "==",
        0.0,
        "guidance",
        f"{int(stats['network_calls'])} network calls for {int(stats['nfe'][0])} evaluations",
    )


def program() -> None:
    """What is in the compiled solve: no weights, no way to the host."""
    velocity, noise = small_network(hidden=256, depth=4)
    guided = classifier_free(velocity, num_classes=3, scale=1.5)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(velocity.params))
    for name, options in (
        ("heun", {"num_steps": 4}),
        ("dopri5", {"rtol": 1e-3, "atol": 1e-3}),
    ):
        solve = jax.jit(partial(sample, solver=name, **options))
        text = solve.lower(guided, noise).compile().as_text()
        calls = re.findall(r"callback|outfeed|infeed|\bsend\b|\brecv\b", text)
        keep(
            f"transfers to the host in a compiled {name} solve",
            len(calls),
            "==",
            0,
            "program",
            "callbacks, infeeds, outfeeds, sends and receives in the program's text",
        )
        shapes = re.findall(r"= [a-z]+(\d+)\[([\d,]*)\][^ ]* constant", text)
        constants = sum(
            int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
            for bits, dims in shapes
        )
        keep(
            f"constants in a compiled {name} solve over the parameters' bytes",
            constants / size,
            "<=",
            0.05,
            "program",
            f"{constants:,} bytes of constants, {size:,} of parameters: those are arguments",
        )


def likelihood() -> None:
    """Bits per dimension and inversion on a Gaussian flow, where both are known."""
    mean, std = 0.3, 0.5
    velocity = cases.Gaussian(mean=jnp.asarray(mean), std=jnp.asarray(std))
    z = jax.random.normal(jax.random.key(0), (64, 4, 4, 2))
    x0, dims = mean + std * z, 32
    exact = -0.5 * jnp.sum(z**2, (1, 2, 3)) - dims * (np.log(std) + 0.5 * np.log(2 * np.pi))
    for name, keys in (
        ("exact trace", None),
        ("Hutchinson", jax.random.split(jax.random.key(1), 64)),
    ):
        found, _ = log_likelihood(velocity, x0, keys, num_steps=30)
        keep(
            f"likelihood of a Gaussian flow, {name}: largest error in bits per dimension",
            float(jnp.abs(bits_per_dim(found, dims) - bits_per_dim(exact, dims)).max()),
            "<=",
            1e-3,
            "likelihood",
            "30 rk4 steps, 64 samples of 32 dimensions",
        )
    up, _ = invert(velocity, x0, solver="rk4", num_steps=20)
    keep(
        "inversion of a Gaussian flow: largest error of the noise",
        float(jnp.abs(up - z).max()),
        "<=",
        1e-2,
        "likelihood",
        "20 rk4 steps",
    )


def bound() -> None:
    """The Wasserstein bound where W2 is known: Gaussians and a linear decoder."""
    dims, decoder, lost, true_std = 16, 3.0, 0.05, 0.7
    t = np.linspace(0, 1, 2001)
    for learned_std in (0.4, 0.69, 1.2):
        true, learned = (
            cases.Gaussian(mean=jnp.zeros(()), std=jnp.asarray(s)) for s in (true_std, learned_std)
        )
        data_std = np.sqrt((decoder * true_std) ** 2 + lost / dims)
        distance = np.sqrt(dims) * abs(data_std - decoder * learned_std)
        gap = np.asarray(true.factor(t) - learned.factor(t))
        variance = (1 - t) ** 2 * true_std**2 + t**2
        x0 = true_std * jax.random.normal(jax.random.key(0), (4, 2, 2, 4))
        profile = velocity_profile(
            learned, x0, jax.random.key(1), times=np.linspace(0, 1, 21), iterations=3
        )
        logs = {
            name: wasserstein_bound(
                autoencoder_error=lost,
                decoder_lipschitz=decoder,
                velocity_lipschitz=profile[name],
                velocity_error=dims * float(np.trapezoid(gap**2 * variance, t)),
            ).log_total
            for name in ("sup_lipschitz", "int_one_sided")
        }
        for name, value in logs.items():
            keep(
                f"bound by {name} less W2 in logarithms, a model of deviation {learned_std:g}",
                value - float(np.log(distance)),
                ">=",
                0.0,
                "bound",
                f"data of deviation {true_std:g}; W2 = {distance:.3f}, bound = {np.exp(value):.3f}",
            )


def small_network(**fields: int) -> tuple[NetworkVelocity, jax.Array]:
    """A DiT with random weights (a fresh one answers 0) and noise for eight samples."""
    fields = {"hidden": 32, "depth": 2, **fields}
    model = create_model("DiT", heads=2, patch=2, num_classes=3, **fields)
    params = init_params(model, jax.random.key(0), (8, 8, 2))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten(
        [p + 0.05 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    )
    noise = jax.random.normal(jax.random.key(2), (8, 8, 8, 2))
    velocity = NetworkVelocity(params=params, model=model, cond=Cond(label=jnp.arange(8) % 3))
    return velocity, noise


QUESTIONS = {
    "order": order,
    "torchdiffeq": torchdiffeq,
    "marginals": marginals,
    "guidance": guidance,
    "program": program,
    "likelihood": likelihood,
    "bound": bound,
}


def main(arguments: list[str]) -> None:
    """Answers the questions named."""
    for name in arguments or list(QUESTIONS):
        QUESTIONS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
