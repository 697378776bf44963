"""How fast are the solves? diffrax's fixed steps beside a hand-written loop, its adaptive steps
beside torchdiffeq.

    python -m benchmarks.sampler [--model DiT-S/2] [--batch 4] [--steps 4] [--repeats 7]

Both sides run the same network with the same weights on the same noise, alternating; the figure is
the median of the ratios of neighbouring runs, compile time excluded. Writes the figures to
``docs/results/sampling.json``.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import record
from benchmarks.turns import take_turns
from lfm_jax.flow import NetworkVelocity, make_grid, sample
from lfm_jax.models import Cond, create_model, init_params
from lfm_jax.models.layers import position_table

LATENT = (32, 32, 4)


def network(name: str, batch: int) -> tuple[NetworkVelocity, jax.Array]:
    """A velocity with random weights (a fresh network's last layer is zero) and its noise."""
    model = create_model(name, num_classes=10)
    params = init_params(model, jax.random.key(0), LATENT)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten(
        [p + 0.02 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    )
    label = jnp.arange(batch) % 10
    noise = jax.random.normal(jax.random.key(2), (batch, *LATENT))
    return NetworkVelocity(params=params, model=model, cond=Cond(label=label)), noise


@partial(jax.jit, static_argnames="steps")
def by_hand(velocity: NetworkVelocity, noise: jax.Array, steps: int) -> jax.Array:
    """Euler as anyone would write it."""
    times = jnp.asarray(make_grid("uniform", steps))

    def step(x, ends):
        t, s = ends
        return x + (s - t) * velocity(x, jnp.full(x.shape[:1], t)), None

    return jax.lax.scan(step, noise, (times[:-1], times[1:]))[0]


@partial(jax.jit, static_argnames="steps")
def by_diffrax(velocity: NetworkVelocity, noise: jax.Array, steps: int) -> jax.Array:
    """The same steps through `sample`."""
    return sample(velocity, noise, solver="euler", num_steps=steps)[0]


def compared(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios of neighbouring runs."""
    ours, theirs = take_turns({"first": first, "second": second}, repeats).values()
    return tuple(float(np.median(kept)) for kept in (ours, theirs, ours / theirs))


def fixed(args: argparse.Namespace) -> tuple[float, str]:
    """diffrax's Euler steps over a hand-written scan of them."""
    velocity, noise = network(args.model, args.batch)
    ours = by_diffrax(velocity, noise, args.steps)
    theirs = by_hand(velocity, noise, args.steps)
    difference = float(jnp.abs(ours - theirs).max())
    seconds, other, ratio = compared(
        lambda: jax.block_until_ready(by_diffrax(velocity, noise, args.steps)),
        lambda: jax.block_until_ready(by_hand(velocity, noise, args.steps)),
        args.repeats,
    )
    note = (
        f"{args.model}, batch {args.batch}, {args.steps} Euler steps, {args.repeats} alternating "
        f"repeats: {seconds:.2f} s and {other:.2f} s; largest difference {difference:.1e}"
    )
    return ratio, note


def in_torch(velocity: NetworkVelocity) -> Any:
    """The same network with the same weights in torch."""
    import torch

    from benchmarks.torch_dit import DiT

    model, params = velocity.model, velocity.params
    theirs = DiT(model.hidden, model.depth, model.heads, patch=model.patch, num_classes=10)
    state = {"labels.weight": params["labels"]["embedding"]}
    for name, leaf in params.items():
        if name not in ("labels", "blocks"):
            target = "patches" if name == "patch" else name
            state |= {f"{target}.weight": leaf["kernel"].T, f"{target}.bias": leaf["bias"]}
    for name, leaf in params["blocks"].items():
        for i in range(model.depth):
            state[f"blocks.{i}.{name}.weight"] = leaf["kernel"][i].T
            state[f"blocks.{i}.{name}.bias"] = leaf["bias"][i]
    side = LATENT[0] // model.patch
    state["positions"] = position_table(side, side, model.hidden)[None]
    theirs.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()})
    return theirs.eval()


def adaptive(args: argparse.Namespace) -> tuple[float, str, float]:
    """Dopri5 of ours over torchdiffeq's, one network in Flax and in torch; and the NFE ratio."""
    import torch
    import torchdiffeq

    torch.set_num_threads(args.threads)
    velocity, noise = network(args.model, args.batch)
    theirs = in_torch(velocity)
    label = torch.tensor(np.asarray(velocity.cond.label))
    start = torch.tensor(np.asarray(noise))
    evaluations = 0

    def field(t, x):
        nonlocal evaluations
        evaluations += 1
        return theirs(x, t.to(x.dtype).expand(x.shape[0]), label)

    def run_torch():
        with torch.no_grad():
            ends = torch.tensor([1.0, 0.0])
            tolerance = {"rtol": args.tolerance, "atol": args.tolerance}
            return torchdiffeq.odeint(field, start, ends, method="dopri5", **tolerance)[-1]

    program = jax.jit(
        partial(
            sample,
            solver="dopri5",
            rtol=args.tolerance,
            atol=args.tolerance,
            error_norm="batch",
        )
    )
    x, stats = program(velocity, noise)
    y = run_torch().numpy()
    counted, evaluations = evaluations, 0
    nfe = int(stats["nfe"][0])
    seconds, other, ratio = compared(
        lambda: jax.block_until_ready(program(velocity, noise)), run_torch, args.repeats
    )
    note = (
        f"{args.model}, batch {args.batch}, dopri5 at {args.tolerance:g}, {args.repeats} "
        f"alternating repeats: {seconds:.2f} s at {nfe} NFE and {other:.2f} s at {counted} NFE; "
        f"largest difference of the endpoints {np.abs(np.asarray(x) - y).max():.1e}"
    )
    return ratio, note, nfe / counted


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--only", choices=("fixed", "adaptive"))
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    command = "python -m benchmarks.sampler"
    figures = []
    if args.only != "adaptive":
        ratio, note = fixed(args)
        figures.append(("fixed-step diffrax / hand-written lax.scan", ratio, "<=", 1.05, note))
    if args.only != "fixed":
        ratio, note, evaluations = adaptive(args)
        figures.append(("adaptive diffrax / torchdiffeq", ratio, "<=", 0.9, note))
        figures.append(
            ("adaptive NFE diffrax / torchdiffeq", evaluations, "between", [0.9, 1.1], note)
        )
    for name, value, op, bound, note in figures:
        print(f"{name:45s} {value:6.3f}  {op} {bound}   {note}")
        if not args.no_record:
            record("sampling", name, value, op, bound, command, note)


if __name__ == "__main__":
    main()
