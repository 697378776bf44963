"""The flow-matching objective on cached latents.

    L = E_{t, x0, e} | v(x_t, t, c) - u |^2   (a mean over batch, height, width and channels)

(Dao et al. 2023, eq. 7, on the path of `lfm_jax.flow.path`). Every random number of an example is
keyed by its position in the data stream, so a resumed run and another topology draw the same ones.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow import path
from lfm_jax.models.conditioning import Cond

TIME_SAMPLING = ("uniform", "logit_normal")
LOGVAR_RANGE = (-30.0, 20.0)  # of the autoencoder's posterior, as in the Stable Diffusion VAE

Loss = Callable[[Any, dict[str, Array], Key[Array, ""]], tuple[Array, dict[str, Array]]]


def draw_latents(
    batch: dict[str, Array],
    key: Key[Array, ""],
    *,
    scale: float,
    shift: float = 0.0,
    mirror: bool = False,
) -> Float[Array, "b h w c"]:
    """Scaled latents of a batch: a posterior sample of each example, or of its mirror image.

    Args:
        batch: ``moments`` ``[b, h, w, 2c]`` (mean and log-variance, unscaled), ``position`` ``[b]``
            and, for `mirror`, ``moments_flip``, the encoded mirror image.
        key: the run's base key.
        mirror: take the mirror image with probability one half.

    Raises:
        UserError: `mirror` without ``moments_flip`` in the batch.
    """
    position = batch["position"]
    moments = batch["moments"]
    if mirror:
        if "moments_flip" not in batch:
            raise UserError(
                "mirror: True, but the latent cache holds no encoded mirror images; encode with "
                "mirror images or set mirror to False"
            )
        coin = rng.uniform(rng.stream_keys(key, rng.Stream.MIRROR, position)) < 0.5
        moments = jnp.where(path.expand(coin, moments), batch["moments_flip"], moments)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    keys = rng.stream_keys(key, rng.Stream.POSTERIOR, position)
    std = jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))
    return (mean + std * rng.normal(keys, mean.shape[1:]) - shift) * scale


def draw_times(
    keys: Key[Array, " b"],
    *,
    time_sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Float[Array, " b"]:
    """Training times in [0, 1], one a key.

    ``uniform`` is the paper's; ``logit_normal`` is ``sigmoid(logit_mean + logit_std z)`` (Esser et
    al. 2024, "Scaling Rectified Flow Transformers", section 3.1), which dwells on the middle times.

    Raises:
        UserError: an unknown `time_sampling`.
    """
    if time_sampling == "uniform":
        return rng.uniform(keys)
    if time_sampling == "logit_normal":
        return jax.nn.sigmoid(logit_mean + logit_std * rng.normal(keys, ()))
    raise UserError(f"time_sampling: {time_sampling!r} is none of {', '.join(TIME_SAMPLING)}")


def drop_labels(
    label: Integer[Array, " b"], keys: Key[Array, " b"], *, num_classes: int, label_drop: float
) -> Integer[Array, " b"]:
    """Labels with a fraction `label_drop`, and every unlabelled one (-1), set to the null class."""
    dropped = (rng.uniform(keys) < label_drop) | (label < 0)
    return jnp.where(dropped, num_classes, label)


def flow_matching_loss(
    model: nn.Module,
    *,
    scale: float,
    shift: float = 0.0,
    num_classes: int = 0,
    label_drop: float = 0.1,
    mirror: bool = False,
    time_sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    sigma_min: float = path.SIGMA_MIN,
    condition: Callable[[Any, dict[str, Array], Key[Array, ""]], Cond] | None = None,
) -> Loss:
    """The loss ``(params, batch, key) -> (loss, metrics)`` of a velocity network.

    Args:
        model: the network; its parameters are ``params``.
        scale, shift: of the latents (see `draw_latents`).
        num_classes: 0 trains without labels; else the null class has this number.
        label_drop: probability of the null class, for classifier-free guidance.
        condition: ``(params, batch, key) -> Cond`` in place of the labels alone.

    Raises:
        UserError: an unknown `time_sampling`, a `label_drop` outside [0, 1), a `logit_std` <= 0.
    """
    if time_sampling not in TIME_SAMPLING:
        raise UserError(f"time_sampling: {time_sampling!r} is none of {', '.join(TIME_SAMPLING)}")
    if not 0 <= label_drop < 1:
        raise UserError(f"label_drop: {label_drop:g} is not in [0, 1)")
    if logit_std <= 0:
        raise UserError(f"logit_std: {logit_std:g} is not above 0")
    t_max = getattr(model, "t_max", 1.0)

    def loss(params, batch, key):
        position = batch["position"]
        x0 = draw_latents(batch, key, scale=scale, shift=shift, mirror=mirror)
        noise = rng.normal(rng.stream_keys(key, rng.Stream.NOISE, position), x0.shape[1:])
        t = draw_times(
            rng.stream_keys(key, rng.Stream.TIME, position),
            time_sampling=time_sampling,
            logit_mean=logit_mean,
            logit_std=logit_std,
        )
        if t_max < 1:  # a converted diffusion network: its noise ends there
            t = t * t_max
        cond = None
        if condition is not None:
            cond = condition(params, batch, key)
        elif num_classes:
            keys = rng.stream_keys(key, rng.Stream.LABEL_DROP, position)
            cond = Cond(
                label=drop_labels(
                    batch["label"], keys, num_classes=num_classes, label_drop=label_drop
                )
            )
        x = path.interpolate(x0, noise, t, sigma_min=sigma_min)
        # One key a batch, yet a function of the stream's position alone.
        dropout = rng.stream_keys(key, rng.Stream.DROPOUT, position[:1])[0]
        out = model.apply({"params": params}, x, t, cond, train=True, rngs={"dropout": dropout})
        v = cast(Array, out)
        u = path.target(x0, noise, sigma_min=sigma_min)
        mean = jnp.mean(jnp.square(v.astype(jnp.float32) - u))
        # Beside the loss: a network that has learned nothing scores the target's own power.
        return mean, {"explained": 1 - mean / jnp.mean(jnp.square(u))}

    return loss
