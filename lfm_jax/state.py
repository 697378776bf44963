"""The train state and the one train step of every objective.

A step is a pure function ``step(state, batch) -> (state, metrics)``. Flow matching, MMD and the
autoencoder differ only in the ``loss(params, batch, key) -> (loss, metrics)`` that they hand to
`make_step`. The key is the run's base key, the same at every step: a loss draws its randomness per
example from the batch's ``position``, so that a resumed run repeats nothing and skips nothing.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lfm_jax import sharding

Params = Any
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Loss = Callable[[Params, Batch, Array], tuple[Float[Array, ""], Metrics]]


@flax.struct.dataclass
class TrainState:
    """What a checkpoint's ``state`` item holds.

    Attributes:
        step: updates done, int32 scalar.
        params: the network's parameters, float32.
        opt_state: the optimizer's state.
        ema: exponential moving average of the parameters; None when averaging is off.
    """

    step: Any  # like the rest not typed: it is also mapped to shapes and shardings
    params: Params
    opt_state: optax.OptState
    ema: Params | None

    @property
    def best_params(self) -> Params:
        """The averaged parameters where they exist, else the raw ones."""
        return self.params if self.ema is None else self.ema


def create_state(
    init: Callable[[], Params],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool,
    rules: sharding.Rules = (),
) -> TrainState:
    """Initialise parameters, optimizer and average directly in their shardings.

    Nothing is built on one device first: ``init`` is traced into the program that places it.
    """
    build = _builder(init, tx, ema)
    shardings = sharding.state_sharding(jax.eval_shape(build), mesh, rules)
    return jax.jit(build, out_shardings=shardings)()


def abstract_state(
    init: Callable[[], Params],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool,
    rules: sharding.Rules = (),
) -> TrainState:
    """What `create_state` would build, as `jax.ShapeDtypeStruct`s with their shardings."""
    shapes = jax.eval_shape(_builder(init, tx, ema))
    shardings = sharding.state_sharding(shapes, mesh, rules)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _builder(
    init: Callable[[], Params], tx: optax.GradientTransformation, ema: bool
) -> Callable[[], TrainState]:
    def build() -> TrainState:
        params = init()
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            # A copy: donated buffers must not be shared between two fields of the state.
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )

    return build


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    key: Array,
    *,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    like: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One jitted update with donated state.

    Args:
        loss: the objective, a mean over the examples of its batch.
        tx: the optimizer.
        key: the run's base key.
        ema_decay: the average's decay; it ramps up as ``min(decay, (1 + step) / (10 + step))`` so
            that a short run is not dominated by its initialisation.
        accumulate: micro-batches whose gradients are averaged before the update.
        skip_nonfinite: leave parameters, optimizer and average as they were where loss or gradient
            is not finite; the step counts all the same.
        like: a state, real or abstract, whose shardings every update keeps. Left to the compiler
            they may change, and the buffers of the old state could not be reused.

    Returns:
        ``step(state, batch) -> (state, metrics)``; metrics stay on the device: the loss's own,
        "loss", "grad_norm" (before clipping) and "finite" (1 unless loss or gradient is not).
    """
    grad = jax.value_and_grad(loss, has_aux=True)

    def gradients(params: Params, batch: Batch):
        if like is not None:
            params = sharding.gathered(params, jax.tree.map(lambda x: x.sharding, like.params))
        if accumulate == 1:
            return grad(params, batch, key)

        # Strided, not blocked: a micro-batch then keeps an equal part of every device's examples.
        def split(x: Array) -> Array:
            return jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)

        micro = jax.tree.map(split, batch)
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total, part):
            return jax.tree.map(jnp.add, total, grad(params, part, key)), None

        total, _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (value, metrics), grads = gradients(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        if skip_nonfinite:
            new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
            kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
            params, opt_state, ema = kept
        metrics = {
            **metrics,
            "loss": value,
            "grad_norm": norm,
            "finite": finite.astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    kept = None if like is None else (jax.tree.map(lambda x: x.sharding, like), None)
    return jax.jit(step, donate_argnums=0, out_shardings=kept)
