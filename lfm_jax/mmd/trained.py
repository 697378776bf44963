"""What a finetuning trains: the tree to optimise, and the plain network that it stands for.

Beside the network's parameters the tree may hold an entry ``few_step`` of three optional parts:

    solver   "start" and "logits" [N]: the grid, ``tau_i = start (1 - cumsum(softmax(logits)))``,
             and "scales" [N], one factor on the velocity a step: a few-step sampler of under 100
             numbers
    offset   what N, or (N, guidance), adds to the time embedding: one network for several of them
    lora     low-rank updates of the network's matrices (Hu et al. 2022)

`deploy` turns such a tree into plain network parameters and the trained solver.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lfm_jax.errors import UserError

FEW_STEP = "few_step"
TRAINABLE = ("all", "adaln", "lora", "solver")
_OFFSET_WIDTH = 32
_EARLIEST = 0.05  # of t_max: a trained grid starts no nearer to the data


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


def trainable(
    kind: str,
    params: dict,
    key: Key[Array, ""],
    *,
    rank: int = 8,
    times: np.ndarray | None = None,
    several_steps: bool = False,
    several_scales: bool = False,
) -> dict:
    """The tree to optimise, made of a network's plain `params`; it starts as that network.

    Args:
        kind: of `TRAINABLE`.
        rank: of the low-rank updates.
        times: the grid from which a trained solver starts.
        several_steps: add the offset by which one network serves several N.
        several_scales: the same for several guidance scales; it is told N beside.

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
    if several_steps or several_scales:
        # A row for what is told and no more: a scale that never varied says nothing when it does.
        extra["offset"] = _new_offset(params, key, told=2 if several_scales else 1)
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
        num_steps, guidance: which of the samplers of a steered network; one that is told N alone
            does not read `guidance`.
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
    """`deploy` for sampling, and the scale left to apply: 1 where the network is told it."""
    plain, trained = deploy(params, num_steps=num_steps, guidance=guidance)
    return plain, trained, 1 if _is_told_scale(params) else guidance


def is_few_step(params: dict) -> bool:
    """Whether `params` hold more than a network."""
    return FEW_STEP in params


def _is_told_scale(params: dict) -> bool:
    offset = params[FEW_STEP].get("offset")
    return offset is not None and len(offset["in"]) > 1


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


def _new_offset(params: dict, key: Array, *, told: int) -> dict:
    if "time_out" not in params:
        raise UserError("several N or scales in one network need its time embedding (time_out)")
    width = params["time_out"]["bias"].shape[-1]
    return {
        "in": jax.random.normal(key, (told, _OFFSET_WIDTH)),
        "bias": jnp.zeros(_OFFSET_WIDTH),
        "out": jnp.zeros((_OFFSET_WIDTH, width)),
    }


def _steer(params: dict, offset: dict, num_steps: int, guidance: Any) -> dict:
    """What is told enters as a shift of the time embedding, the same for the whole batch."""
    known = jnp.stack([jnp.log2(jnp.float32(num_steps)), jnp.float32(guidance) - 1])
    told = known[: len(offset["in"])]
    shift = jnp.tanh(told @ offset["in"] + offset["bias"]) @ offset["out"]
    time_out = params["time_out"]
    return {**params, "time_out": {**time_out, "bias": time_out["bias"] + shift}}
