"""The few-step generator: the sampler of `lfm_jax.flow`, differentiable, with what may be trained.

    G(z, c) = x_N,    x_{i+1} = one solver step of dx/dt = v(x, t, c) from tau_i to tau_{i+1}

on a grid ``1 >= tau_0 > ... > tau_N = 0``. A flow that is asked at t = 1 knows nothing but the mean
of the data. Told that it is at ``tau_0 < 1`` it takes the noise for a rough picture and completes
it: one step from 0.8 is closer to the data than one from 1 before anything is trained (as few-step
diffusion distillation found, too: Yin et al. 2024, DMD2).

diffrax keeps the N latents of the solve and recomputes a step on the way back, so the activations
in memory are those of one step whatever N is: four forward passes' worth of work a step, three for
the last one of Euler's.

Beside the network's parameters a tree may hold an entry ``few_step`` of three optional parts:

    solver   "start" and "logits" [N]: the grid, ``tau_i = start (1 - cumsum(softmax(logits)))``,
             and "scales" [N], one factor on the velocity a step: a few-step sampler of under 100
             numbers
    offset   what (N, guidance) adds to the time embedding: one network for several of them
    lora     low-rank updates of the network's matrices (Hu et al. 2022)

`deploy` turns such a tree into plain network parameters and the trained solver.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lfm_jax.errors import UserError
from lfm_jax.flow import make_grid, sample, sample_sde
from lfm_jax.flow.ode import Stats, solve_fixed
from lfm_jax.flow.sampler import counts
from lfm_jax.flow.solvers import get_solver

FEW_STEP = "few_step"
TRAINABLE = ("all", "adaln", "lora", "solver")
_OFFSET_WIDTH = 32
_EARLIEST = 0.05  # of t_max: a trained grid starts no nearer to the data


# ---- the solve


@flax.struct.dataclass
class Scaled:
    """A velocity times one factor a step: ``scales[i]`` for times in ``(tau_{i+1}, tau_i]``."""

    inner: Any
    times: Float[Array, " k"]
    scales: Float[Array, " n"]

    @property
    def t_max(self) -> float:
        """That of the velocity."""
        return self.inner.t_max

    @property
    def network_calls(self) -> int:
        """That of the velocity."""
        return self.inner.network_calls

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The scaled velocity."""
        step = (self.times[1:][None] >= t[:, None]).sum(1)
        factor = self.scales[jnp.minimum(step, len(self.scales) - 1)]
        return factor.reshape(-1, *(1,) * (x.ndim - 1)) * self.inner(x, t)


def generate(
    velocity: Any,
    noise: Float[Array, "b ..."],
    *,
    solver: str = "euler",
    num_steps: int,
    grid: str | Sequence[float] = "uniform",
    eta: float = 0.0,
    keys: Key[Array, " b"] | None = None,
    trained_solver: dict[str, Array] | None = None,
    backprop: int = 0,
    differentiable: bool = True,
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """Samples of `num_steps` solver steps and the counts of `lfm_jax.flow.sample`.

    Args:
        velocity: see `lfm_jax.flow.velocity`.
        noise: the state at the grid's first time.
        solver: a fixed-step name of `lfm_jax.flow.SOLVERS`, or ``ddim``.
        num_steps: N.
        grid: a name of `lfm_jax.flow.GRIDS` or the falling times.
        eta: noise of ``ddim``; 0 is the Euler step.
        keys: of that noise, one a sample.
        trained_solver: see the module; its grid is taken in place of `grid`.
        backprop: gradients flow through the last so many steps only; 0: through all.
        differentiable: False for sampling: no state is kept.

    Raises:
        UserError: N below 1, an unknown solver or grid, a `trained_solver` of another N, `backprop`
            where steps are stochastic.
    """
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps} is below 1: a generator takes at least one step")
    if solver == "ddim":
        if backprop or trained_solver:
            raise UserError("solver: ddim takes neither truncated gradients nor a trained grid")
        keys = jax.vmap(jax.random.key)(jnp.arange(len(noise))) if keys is None else keys
        return sample_sde(
            velocity,
            noise,
            keys,
            method="ddim",
            eta=eta,
            num_steps=num_steps,
            grid=grid,
            differentiable=differentiable,
        )
    if trained_solver is None and not differentiable:
        return sample(velocity, noise, solver=solver, num_steps=num_steps, grid=grid)
    chosen = get_solver(solver)
    if trained_solver is None:
        times = make_grid(grid, num_steps, t_max=velocity.t_max)
    else:
        times = solver_times(trained_solver, num_steps, t_max=velocity.t_max)
        velocity = Scaled(inner=velocity, times=times, scales=trained_solver["scales"])
    steps = len(times) - 1
    x, first = noise, steps - backprop if 0 < backprop < steps else 0
    if first:
        x, _ = solve_fixed(velocity, x, times[: first + 1], chosen)
        x = jax.lax.stop_gradient(x)
    # The last Euler step's activations are wanted at once on the way back: kept, not recomputed.
    last = steps - 1 if differentiable and solver == "euler" else steps
    if first < last:
        x, _ = solve_fixed(
            velocity, x, times[first : last + 1], chosen, differentiable=differentiable
        )
    if last < steps:
        t = jnp.broadcast_to(jnp.asarray(times[-2], x.dtype), x.shape[:1])
        x = x + (times[-1] - times[-2]) * velocity(x, t)
    finite = jnp.isfinite(x).all(tuple(range(1, x.ndim)))
    stats = Stats(
        steps=jnp.full(finite.shape, steps, jnp.int32),
        finite=finite,
        failed_t=jnp.where(finite, jnp.nan, 0.0),
    )
    return x, counts(stats, chosen, velocity, adaptive=False)


def new_solver(times: np.ndarray) -> dict[str, Array]:
    """The trained solver that starts as plain steps along `times`."""
    widths = -np.diff(np.asarray(times))
    return {
        "start": jnp.float32(times[0]),
        "logits": jnp.asarray(np.log(widths / widths.sum()), jnp.float32),
        "scales": jnp.ones(len(widths), jnp.float32),
    }


def solver_times(
    trained: dict[str, Array], num_steps: int, *, t_max: float = 1.0
) -> Float[Array, " k"]:
    """The falling times ``[N + 1]`` of a trained solver, from at most `t_max` to exactly 0."""
    count = len(trained["logits"])
    if count != num_steps:
        raise UserError(f"num_steps: {num_steps}, but this checkpoint's grid has {count} steps")
    inner = 1 - jnp.cumsum(jax.nn.softmax(trained["logits"]))[:-1]
    start = trained["start"]
    start = jnp.where(start > t_max, 2 * t_max - start, start)  # reflected: a clip has no slope
    start = jnp.maximum(start, _EARLIEST * t_max)
    return start * jnp.concatenate([jnp.array([1.0]), inner, jnp.array([0.0])])


# ---- what trains


def trainable(
    kind: str,
    params: dict,
    key: Key[Array, ""],
    *,
    rank: int = 8,
    times: np.ndarray | None = None,
    steered: bool = False,
) -> dict:
    """The tree to optimise, made of a network's plain `params`; it starts as that network.

    Args:
        kind: of `TRAINABLE`.
        rank: of the low-rank updates.
        times: the grid from which a trained solver starts.
        steered: add the offset by which one network serves several N or guidance scales.

    Raises:
        UserError: an unknown kind, a rank below 1, or a network without a time embedding to steer.
    """
    if kind not in TRAINABLE:
        raise UserError(f"trainable: {kind!r} is none of {', '.join(TRAINABLE)}")
    extra: dict[str, Any] = {}
    if kind == "lora":
        if rank < 1:
            raise UserError(f"lora rank: {rank} is below 1")
        extra["lora"] = _new_lora(params, key, rank)
    if kind == "solver":
        assert times is not None  # the config's own steps are given
        extra["solver"] = new_solver(times)
    if steered:
        extra["offset"] = _new_offset(params, key)
    return {**params, FEW_STEP: extra} if extra else dict(params)


def trained_mask(kind: str, params: dict) -> dict:
    """A tree of booleans: the leaves of `trainable`'s tree that the optimizer moves."""

    def moves(path: tuple, leaf: Any) -> bool:
        del leaf
        names = [part.key for part in path]
        if names[0] == FEW_STEP:
            return True
        return kind == "all" or (kind == "adaln" and any("modulation" in name for name in names))

    mask = jax.tree.map_with_path(moves, params)
    if not any(jax.tree.leaves(mask)):
        raise UserError(f"trainable: {kind} finds nothing to train in this network")
    return mask


def freeze(params: dict, mask: dict) -> dict:
    """`params` without gradients where `mask` is False; what they would cost is never computed."""
    return jax.tree.map(lambda p, m: p if m else jax.lax.stop_gradient(p), params, mask)


def deploy(
    params: dict, *, num_steps: int = 1, guidance: float | int | Float[Array, ""] = 1.0
) -> tuple[dict, dict[str, Array] | None]:
    """Plain network parameters, and the trained solver where there is one.

    Args:
        params: of a network, or a tree of `trainable`.
        num_steps, guidance: which of the samplers of a steered network.
    """
    if FEW_STEP not in params:
        return params, None
    plain = {name: value for name, value in params.items() if name != FEW_STEP}
    extra = params[FEW_STEP]
    if "lora" in extra:
        plain = _merge_lora(plain, extra["lora"])
    if "offset" in extra:
        plain = _steer(plain, extra["offset"], num_steps, guidance)
    return plain, extra.get("solver")


def deploy_sampler(
    params: dict, *, num_steps: int, guidance: float | int
) -> tuple[dict, dict[str, Array] | None, float | int]:
    """`deploy` for sampling, and the scale that is left to apply: 1 where the network was told."""
    told = "offset" in params[FEW_STEP]
    plain, trained = deploy(params, num_steps=num_steps, guidance=guidance)
    return plain, trained, 1 if told else guidance


def is_few_step(params: dict) -> bool:
    """Whether `params` hold more than a network."""
    return FEW_STEP in params


def _new_lora(params: dict, key: Array, rank: int) -> dict:
    """A pair (a, b) for every matrix, stacked ones (with a depth axis) included; b starts at 0."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    pairs = {}
    for i, (path, leaf) in enumerate(flat):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel") and leaf.ndim in (2, 3) and min(leaf.shape[-2:]) > rank:
            *stack, rows, columns = leaf.shape
            a = jax.random.normal(jax.random.fold_in(key, i), (*stack, rows, rank)) / rows**0.5
            pairs[name] = {"a": a, "b": jnp.zeros((*stack, rank, columns))}
    return pairs


def _merge_lora(params: dict, pairs: dict) -> dict:
    def merged(path: tuple, leaf: Array) -> Array:
        pair = pairs.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if pair is None else leaf + pair["a"] @ pair["b"]

    return jax.tree.map_with_path(merged, params)


def _new_offset(params: dict, key: Array) -> dict:
    if "time_out" not in params:
        raise UserError("several N or scales in one network need its time embedding (time_out)")
    width = params["time_out"]["bias"].shape[-1]
    return {
        "in": jax.random.normal(key, (2, _OFFSET_WIDTH)),
        "bias": jnp.zeros(_OFFSET_WIDTH),
        "out": jnp.zeros((_OFFSET_WIDTH, width)),
    }


def _steer(params: dict, offset: dict, num_steps: int, guidance: Any) -> dict:
    """N and guidance enter as a shift of the time embedding, the same for the whole batch."""
    told = jnp.stack([jnp.log2(jnp.float32(num_steps)), jnp.float32(guidance) - 1])
    shift = jnp.tanh(told @ offset["in"] + offset["bias"]) @ offset["out"]
    time_out = params["time_out"]
    return {**params, "time_out": {**time_out, "bias": time_out["bias"] + shift}}
