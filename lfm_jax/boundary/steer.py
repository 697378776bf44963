"""Across a boundary in one step, and on along the flow.

With unit normals ``N = [n_1 .. n_k]`` and wanted projections ``tau_i`` of a state x on them, the
shortest step that gets there is

    x' = x + N (N^T N)^{-1} (tau - N^T x),

for one boundary ``x' = x + (tau - n . x) n``. What several attributes add to it is that each
moves along its own normal made orthogonal to all others' (`orthogonal_normals`): an attribute of
strength 0 keeps its signed distance exactly. With d the signed distance, sigma the boundary's
spread and b its offset, the modes want

    shift    tau = n . x + s sigma     s spreads further on
    project  tau = s sigma - b         all at signed distance s spreads (the paper's code, with b)
    reflect  tau = n . x - 2 s d       s = 1 is the mirror image, s = 1/2 lies on the boundary
    rotate   tau as shift, and the rest of x is scaled so that the norm of x stays

The last one stays in the shell in which Gaussian states lie: a rotation in the plane of x and n,
at the end of which the angle theta from the plane ``n . x = 0`` has ``sin theta = tau / ||x||``. In
the unit ``absolute`` (the released code's) a spread is 1 and the offset is left out, so that
``project`` sets ``n . x = s`` itself. (Zhu et al. 2023 write ``x' = x + zeta d n``, which is
``reflect`` with ``zeta = -2 s``; their code does ``project``.)
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.boundary.hyperplane import Boundary
from lfm_jax.errors import UserError

MODES = ("shift", "project", "reflect", "rotate")
UNITS = ("margin", "absolute")
_MAX_CONDITION = 1e4  # of N^T N: beyond, two attributes are one


def steer(
    states: Float[Array | np.ndarray, "b ..."],
    boundary: Boundary | Sequence[Boundary],
    strength: float | int | Sequence[float | int] | Float[Array | np.ndarray, "..."],
    *,
    mode: str = "shift",
    unit: str = "margin",
) -> Float[Array, "b ..."]:
    """Move every state with respect to one boundary, or to several at once.

    Args:
        states: latents at the boundary's time, or hidden states of its layer.
        boundary: one, or several of the same space.
        strength: a number, one a boundary ``[k]``, or one a state and boundary ``[b, k]``;
            positive is towards the attribute. 0 keeps a state in ``shift``, ``rotate`` and
            ``reflect``.
        mode: one of `MODES`.
        unit: ``margin`` or ``absolute``.

    Raises:
        UserError: an unknown mode or unit, a strength that is not finite, states of another shape
            than a boundary's, boundaries whose normals are nearly parallel.
    """
    if mode not in MODES:
        raise UserError(f"steer mode: {mode!r} is none of {', '.join(MODES)}")
    if unit not in UNITS:
        raise UserError(f"steer unit: {unit!r} is none of {', '.join(UNITS)}")
    boundaries = [boundary] if isinstance(boundary, Boundary) else list(boundary)
    strengths = _strengths(strength, len(states), len(boundaries))
    normals, gram = _normals(boundaries, tuple(states.shape[1:]))
    margin = unit == "margin"
    spread = np.array([one.spread if margin else 1.0 for one in boundaries])
    offset = np.array([one.offset if margin else 0.0 for one in boundaries])

    x = jnp.asarray(states, jnp.float32)
    flat = x.reshape(len(x), -1)
    now = flat @ normals
    if mode == "project":
        wanted = strengths * spread - offset
    elif mode == "reflect":
        wanted = now - 2 * strengths * (now + offset)
    else:
        wanted = now + strengths * spread
    moved = flat + (wanted - now) @ np.linalg.solve(gram, normals.T)
    if mode == "rotate":
        moved = _same_norm(flat, moved, wanted @ np.linalg.solve(gram, normals.T))
        # A rotation by nothing is nothing, whatever the rounding.
        moved = jnp.where(jnp.all(strengths == 0, axis=1, keepdims=True), flat, moved)
    return moved.reshape(x.shape).astype(jnp.float32)


def orthogonal_normals(boundaries: Sequence[Boundary]) -> Float[np.ndarray, "k d"]:
    """Each boundary's normal without its part in the span of all others', of length 1.

    Raises:
        UserError: boundaries of different shapes, or nearly parallel normals.
    """
    normals, gram = _normals(list(boundaries), boundaries[0].shape)
    dual = np.linalg.solve(gram, normals.T)
    return dual / np.linalg.norm(dual, axis=1, keepdims=True)


def _strengths(strength, rows: int, count: int) -> np.ndarray:
    try:
        values = np.asarray(strength, np.float64)
        values = np.broadcast_to(values if values.ndim else np.full(count, values), (rows, count))
    except (ValueError, TypeError):
        raise UserError(
            f"strength: {strength!r} is neither a number, nor {count} (one a boundary), nor "
            f"{rows} x {count} (one a state and boundary)"
        ) from None
    if not np.isfinite(values).all():
        raise UserError(f"strength: {strength!r} is not finite")
    return values


def _normals(boundaries: list[Boundary], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """``N [d, k]`` and ``N^T N``."""
    for one in boundaries:
        if one.shape != shape:
            raise UserError(
                f"steer: states of shape {shape}; the boundary of "
                f"{one.provenance.get('attribute', 'attribute')} was fitted on {one.shape}"
            )
    normals = np.stack([one.normal for one in boundaries], axis=1)
    gram = normals.T @ normals
    if np.linalg.cond(gram) > _MAX_CONDITION:
        names = ", ".join(str(one.provenance.get("attribute", "?")) for one in boundaries)
        raise UserError(f"steer: the boundaries of {names} are nearly parallel; leave one out")
    return normals, gram


def _same_norm(flat, moved, within):
    """`moved` with its part outside the span of the normals scaled to give it `flat`'s norm.

    `within` is its part in the span; where that alone is longer, it is cut to the norm.
    """
    norm = jnp.linalg.norm(flat, axis=1, keepdims=True)
    inside = jnp.linalg.norm(within, axis=1, keepdims=True)
    rest = moved - within
    length = jnp.sqrt(jnp.maximum(norm**2 - inside**2, 0.0))
    scaled = rest * length / jnp.maximum(jnp.linalg.norm(rest, axis=1, keepdims=True), 1e-12)
    return within * jnp.minimum(1.0, norm / jnp.maximum(inside, 1e-12)) + scaled
