"""The solvers by name, with what a caller must know of each: order, evaluations, adaptivity."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import diffrax
import numpy as np

from lfm_jax.errors import UserError
from lfm_jax.flow.multistep import AdamsBashforth2, Exponential2


class RK4(diffrax.AbstractERK):
    """The classical Runge-Kutta method of order four; fixed steps only."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        # Beside the midpoint rule; not offered for step control, which the method was not made for.
        b_error=np.array([1 / 6, 1 / 3 - 1, 1 / 3, 1 / 6]),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls: ClassVar[Callable] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        """Four."""
        return 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """A diffrax solver and its costs.

    Attributes:
        make: builds the diffrax solver.
        order: of convergence of a fixed-step solve.
        evaluations: new velocity evaluations a step.
        first: evaluations that only the first fixed step makes (1 where the last stage of a step
            is reused as the first of the next).
        adaptive: whether it estimates its error.
        downward_only: whether it needs falling times.
    """

    make: Callable[[], diffrax.AbstractSolver]
    order: int
    evaluations: int
    first: int = 0
    adaptive: bool = True
    downward_only: bool = False

    def nfe(self, steps, *, adaptive: bool = False):
        """Velocity evaluations of `steps` attempted steps; an adaptive solve makes two before them
        to find the length of the first, one of which is the slope that ``first`` counts.
        """
        return self.evaluations * steps + (2 if adaptive else self.first)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(make=diffrax.Euler, order=1, evaluations=1, adaptive=False),
    "ab2": Solver(make=AdamsBashforth2, order=2, evaluations=1, adaptive=False),
    "exp2": Solver(make=Exponential2, order=2, evaluations=1, adaptive=False, downward_only=True),
    "heun": Solver(make=diffrax.Heun, order=2, evaluations=2),
    "midpoint": Solver(make=diffrax.Midpoint, order=2, evaluations=2),
    "ralston": Solver(make=diffrax.Ralston, order=2, evaluations=2),
    "rk4": Solver(make=RK4, order=4, evaluations=4, adaptive=False),
    "bosh3": Solver(make=diffrax.Bosh3, order=3, evaluations=3, first=1),
    "tsit5": Solver(make=diffrax.Tsit5, order=5, evaluations=6, first=1),
    "dopri5": Solver(make=diffrax.Dopri5, order=5, evaluations=6, first=1),
    "dopri8": Solver(make=diffrax.Dopri8, order=8, evaluations=13, first=1),
}


def get_solver(name: str, *, adaptive: bool = False, upward: bool = False) -> Solver:
    """The solver called `name`.

    Raises:
        UserError: an unknown name, one without an error estimate where `adaptive`, or one that
            cannot go from data to noise where `upward`.
    """

    def choices(keep: Callable[[Solver], bool]) -> str:
        return ", ".join(key for key, solver in SOLVERS.items() if keep(solver))

    if name not in SOLVERS:
        raise UserError(f"solver: {name!r} is none of {choices(lambda s: True)}")
    solver = SOLVERS[name]
    if adaptive and not solver.adaptive:
        raise UserError(
            f"solver: {name} has no error estimate for rtol and atol; "
            f"adaptive ones are {choices(lambda s: s.adaptive)}"
        )
    if upward and solver.downward_only:
        raise UserError(
            f"solver: {name} goes from noise to data only; "
            f"both ways go {choices(lambda s: not s.downward_only)}"
        )
    return solver
