"""Where a fixed-step solve stops on its way from noise to data.

A grid has ``num_steps + 1`` times that fall strictly from ``t_max`` to exactly 0. Named grids map
the uniform ``u = i / num_steps`` from [0, 1] to [0, 1]:

    uniform    u
    shifted    a u / (1 + (a - 1) u), a = 3: more steps near the noise (Esser et al. 2024, eq. 23)
    quadratic  u^2: more steps near the data
    cosine     1 - cos(pi u / 2): the same, gentler, with a linear start at the noise
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from lfm_jax.errors import UserError

SHIFT = 3.0

GRIDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": lambda u: u,
    "shifted": lambda u: SHIFT * u / (1 + (SHIFT - 1) * u),
    "quadratic": np.square,
    "cosine": lambda u: 1 - np.cos(np.pi * u / 2),
}


def make_grid(
    grid: str | Sequence[float],
    num_steps: int,
    *,
    t_max: float = 1.0,
    t_min: float = 0.0,
    shift: float | None = None,
) -> np.ndarray:
    """Falling times ``[num_steps + 1]`` from `t_max` to `t_min`, both hit exactly.

    Args:
        grid: a name of `GRIDS`, or the times themselves (then `num_steps` is their count less one).
        num_steps: intervals of a named grid; not read where the times are given.
        t_max, t_min: its ends.
        shift: the `a` of ``shifted``.

    Raises:
        UserError: an unknown name, ``num_steps < 1``, or times that do not fall from `t_max` to
            `t_min`.
    """
    if not isinstance(grid, str):
        times = np.asarray(grid, jnp.result_type(float))
        ends = times.ndim == 1 and len(times) >= 2 and times[0] <= times.dtype.type(t_max)
        if not (ends and times[-1] == times.dtype.type(t_min) and np.all(np.diff(times) < 0)):
            raise UserError(
                f"grid: {np.array2string(times, threshold=8, separator=', ')} must fall strictly "
                f"from at most {t_max:g} to {t_min:g}"
            )
        return times
    if grid not in GRIDS:
        raise UserError(f"grid: {grid!r} is none of {', '.join(GRIDS)}, nor a list of times")
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps} is below 1")
    if shift is not None and shift <= 0:
        raise UserError(f"shift: {shift:g} is not above 0")
    u = np.linspace(1.0, 0.0, num_steps + 1)
    if grid == "shifted" and shift is not None:
        u = shift * u / (1 + (shift - 1) * u)
    else:
        u = GRIDS[grid](u)
    times = (t_min + (t_max - t_min) * u).astype(jnp.result_type(float))
    times[0], times[-1] = t_max, t_min
    return times
