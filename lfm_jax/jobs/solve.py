"""The compiled programs behind `lfm_jax.jobs.generate`: noise, guidance, solve, decode.

Each takes first the `Plan` that it is compiled for, then arrays: other parameters, or as many other
indices and labels, do not compile again.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax import mmd, rng
from lfm_jax.conditions import Condition, encoded, guided
from lfm_jax.errors import UserError
from lfm_jax.flow import (
    NetworkVelocity,
    classifier_free,
    data_estimate,
    sample,
    sample_sde,
    slerp,
    trajectory,
)
from lfm_jax.flow.ode import solve_fixed
from lfm_jax.flow.solvers import get_solver
from lfm_jax.jobs import guide
from lfm_jax.mmd.generator import Scaled
from lfm_jax.models import Cond
from lfm_jax.vae import Codec, to_uint8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a program is compiled for; hashable.

    Attributes:
        model, latent_shape, num_classes: the network and what it is sampled on.
        seed: of all noise.
        guidance, solver, beyond: options as items: of classifier-free guidance, of the solve, of
            guidance by further networks.
        condition: beside the class, with the scale of its guidance.
    """

    model: nn.Module
    latent_shape: tuple[int, int, int]
    num_classes: int
    seed: int
    guidance: tuple[tuple[str, Any], ...]
    solver: tuple[tuple[str, Any], ...]
    beyond: tuple[tuple[str, Any], ...] = ()
    condition: tuple[Condition, float | int] | None = None

    def keys(self, stream: rng.Stream, indices: Any) -> jax.Array:
        """One key a sample: a function of the seed and its index alone."""
        return rng.stream_keys(jax.random.key(self.seed), stream, indices)


def _start(
    plan: Plan, params: Any, indices: Any, labels: Any, inputs: dict, beside: guide.OtherNetworks
) -> tuple[Any, Any, dict]:
    """The guided velocity, the noise of these samples, and the solver's options."""
    solver, guidance, beyond = dict(plan.solver), dict(plan.guidance), dict(plan.beyond)
    if mmd.is_few_step(params):
        params, trained, guidance["scale"] = mmd.deploy_sampler(
            params, num_steps=solver["num_steps"], guidance=guidance["scale"]
        )
        if trained is not None:
            _check_fixed(solver)
        solver["trained_solver"] = trained
    noise = rng.normal(plan.keys(rng.Stream.SAMPLE, indices), plan.latent_shape)

    def seen_by(params: Any) -> Cond:
        """What a network sees of class and condition: the encoder is trained with it, its own."""
        if plan.condition is None:
            return Cond(label=labels)
        keep = jnp.ones(indices.shape, bool)
        return dataclasses.replace(encoded(plan.condition[0], params, inputs, keep), label=labels)

    velocity = NetworkVelocity(
        params=params, cond=seen_by(params), model=plan.model, t_max=plan.model.t_max
    )
    if beside.weak is not None:
        weak = dataclasses.replace(beside.weak, cond=seen_by(beside.weak.params))
        beside = dataclasses.replace(beside, weak=weak)
    how = {k: v for k, v in guidance.items() if k != "scale"}
    if plan.condition is not None:
        velocity = _guide(velocity, *plan.condition, inputs, plan.num_classes, guidance)
    elif plan.num_classes:
        velocity = classifier_free(velocity, num_classes=plan.num_classes, **guidance)
    if beyond:
        velocity = guide.further(velocity, beside, labels, **how, **beyond)
    return velocity, noise, solver


def _check_fixed(solver: dict[str, Any]) -> None:
    """Refuse solves that would pass by the trained steps of a checkpoint."""
    for key in ("sde", "rtol"):
        if solver[key]:
            raise UserError(
                f"--config.sample.{key}={solver[key]}: this checkpoint has a trained grid of fixed "
                f"steps; expected {key} to be left out"
            )


def _guide(
    velocity: NetworkVelocity,
    condition: Condition,
    condition_scale: float,
    inputs: dict,
    num_classes: int,
    guidance: dict[str, Any],
) -> Any:
    """Guidance by the condition and by the class."""
    keep = jnp.zeros(next(iter(inputs.values())).shape[0], bool)
    return guided(
        velocity,
        encoded(condition, velocity.params, inputs, keep),
        condition_scale=condition_scale,
        label_scale=guidance.pop("scale"),
        num_classes=num_classes,
        **guidance,
    )


@partial(jax.jit, static_argnums=0)
def generate(plan: Plan, codec: Codec | None, params: Any, indices, labels, inputs, beside):
    """Images (none without a codec), scaled latents and the solver's counts of samples."""
    velocity, noise, solver = _start(plan, params, indices, labels, inputs, beside)
    latents, stats = _solve(velocity, noise, indices, plan, solver)
    images = latents[..., :0] if codec is None else to_uint8(codec.decode(latents))
    return images, latents, stats


@partial(jax.jit, static_argnums=0)
def between(plan: Plan, codec: Codec, params: Any, places, labels, inputs, beside):
    """Images from noises between those of two samples; `places` are both and the weights."""
    first, second, weights = places
    velocity, noise, solver = _start(plan, params, first, labels, inputs, beside)
    other = rng.normal(plan.keys(rng.Stream.SAMPLE, second), plan.latent_shape)
    latents, _ = _solve(velocity, slerp(noise, other, weights), first, plan, solver)
    return to_uint8(codec.decode(latents))


def _solve(velocity, noise, indices, plan: Plan, solver: dict) -> tuple[Any, dict]:
    """The sampler's own solve, or the stochastic or trained one of a few-step sampler."""
    eta, trained = solver.pop("eta"), solver.pop("trained_solver", None)
    if method := solver.pop("sde", ""):
        keys = plan.keys(rng.Stream.SDE, indices)
        fixed = {key: solver[key] for key in ("num_steps", "grid")}
        return sample_sde(velocity, noise, keys, method=method, eta=eta, **fixed)
    if solver["solver"] != "ddim" and trained is None:
        return sample(velocity, noise, **solver)
    fixed = {key: solver[key] for key in ("solver", "num_steps", "grid")}
    keys = plan.keys(rng.Stream.SDE, indices)
    return mmd.generate(
        velocity, noise, eta=eta, keys=keys, trained_solver=trained, differentiable=False, **fixed
    )


@partial(jax.jit, static_argnums=(0, 1))
def snapshots(plan: Plan, count: int, codec: Codec, params: Any, indices, labels, inputs, beside):
    """Decoded states along the way, and the estimates of the data there.

    The way is that of the fixed steps, along the trained grid with its scales where there is one.
    Of `ddim` it is Euler's along the same grid, which is the same for an eta of 0; noise on the way
    is left out, there and under `sde`, and so is error control.
    """
    velocity, noise, solver = _start(plan, params, indices, labels, inputs, beside)
    fixed = {key: solver[key] for key in ("solver", "num_steps", "grid")}
    if fixed["solver"] == "ddim":
        fixed["solver"] = "euler"
    count = min(count, fixed["num_steps"] + 1)
    trained = solver.get("trained_solver")
    if trained is None:
        path = trajectory(velocity, noise, count=count, **fixed)
    else:
        del fixed["grid"]
        path = _along_trained(velocity, noise, trained, count=count, **fixed)

    def pictures(latents):
        return jax.lax.map(lambda z: to_uint8(codec.decode(z)), latents)

    return pictures(path["x"]), pictures(path["data"])


def _along_trained(
    velocity: Any, noise: Any, trained: dict, *, count: int, solver: str, num_steps: int
) -> dict[str, jax.Array]:
    """`trajectory` along trained steps.

    Its times are parameters, not known when the program is compiled. Each state is solved for from
    the noise on: the steps are few, and a solver with a memory keeps it.
    """
    times = mmd.solver_times(trained, num_steps, t_max=velocity.t_max)
    velocity = Scaled(inner=velocity, times=times, scales=trained["scales"])
    states, data = [], []
    for stop in np.round(np.linspace(0, num_steps, count)).astype(int):
        x = noise
        if stop:
            x, _ = solve_fixed(velocity, noise, times[: stop + 1], get_solver(solver))
        t = jnp.broadcast_to(times[stop], noise.shape[:1])
        states.append(x)
        data.append(data_estimate(x, t, velocity(x, t)))
    return {"x": jnp.stack(states), "data": jnp.stack(data)}
