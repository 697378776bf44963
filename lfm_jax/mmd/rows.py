"""From parameters and the positions of a batch to generated feature rows."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow import NetworkVelocity, classifier_free
from lfm_jax.mmd.features import FeatureMap, Rows, all_features
from lfm_jax.mmd.generator import generate
from lfm_jax.mmd.loss import choose
from lfm_jax.mmd.trained import deploy, freeze
from lfm_jax.models.conditioning import Cond


def row_generator(
    model: nn.Module,
    maps: Sequence[FeatureMap],
    latent_shape: tuple[int, int, int],
    *,
    num_classes: int = 0,
    steps: Sequence[int] = (4,),
    solver: str = "euler",
    grid: str | Sequence[float] = "uniform",
    eta: float = 0.0,
    loop_guidance: float | int = 1.0,
    scales: Sequence[float | int] = (1.0,),
    backprop: int = 0,
    kept: int = 1,
    mask: Any = None,
) -> Callable[[Any, dict[str, Array], Key[Array, ""]], tuple[Rows, Array | None]]:
    """``(params, batch, key) -> (rows, labels)`` of as many samples as the batch has positions.

    Args:
        model: the velocity network.
        maps: see `lfm_jax.mmd.features`.
        latent_shape: (h, w, c).
        num_classes: 0 generates without labels; else those of the batch (-1: the null class).
        steps: numbers of solver steps, one drawn for each update.
        solver, grid, eta, backprop, kept: see `lfm_jax.mmd.generate`.
        loop_guidance: classifier-free guidance inside the solve, differentiated through.
        scales: guidance scales that the network is told of, drawn as the loss draws them.
        mask: what trains (`trained_mask`); None: everything.

    Raises:
        UserError: no number of steps, or one below 1.
    """
    if not steps or min(steps) < 1:
        raise UserError(f"num_steps: {tuple(steps)}; expected numbers of at least 1")

    def generator(params, batch, key):
        if mask is not None:
            params = freeze(params, mask)
        keys = rng.stream_keys(key, rng.Stream.MMD, batch["position"])
        streams = [jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(3)]
        noise = rng.normal(streams[0], latent_shape)
        labels = cond = None
        if num_classes:
            labels = jnp.where(batch["label"] < 0, num_classes, batch["label"])
            cond = Cond(label=labels)
        told = 1.0
        if len(scales) > 1:
            told = choose(jnp.asarray(scales, jnp.float32), batch["draws"][0, 1])

        def solve(params, noise, count):
            plain, trained = deploy(params, num_steps=count, guidance=told)
            velocity = NetworkVelocity(params=plain, cond=cond, model=model, t_max=model.t_max)
            if num_classes:
                velocity = classifier_free(velocity, num_classes=num_classes, scale=loop_guidance)
            return generate(
                velocity,
                noise,
                solver=solver,
                num_steps=count,
                grid=grid,
                eta=eta,
                keys=streams[1],
                trained_solver=trained,
                backprop=backprop,
                kept=kept,
            )[0]

        if len(steps) == 1:
            latents = solve(params, noise, steps[0])
        else:
            branches = [lambda p, z, n=n: solve(p, z, n) for n in steps]
            place = (batch["draws"][0, 0] * len(steps)).astype(int)
            latents = jax.lax.switch(place, branches, params, noise)
        return all_features(maps, latents, labels, streams[2]), labels

    return generator
