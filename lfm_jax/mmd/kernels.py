"""Kernels between feature rows, as frozen pytrees: ``kernel(x [m, d], y [n, d]) -> [m, n]``.

    polynomial   (gamma <x, y> + c)^p              gamma defaults to 1/d; p = 3, c = 1 is KID's
    gaussian     exp(-|x - y|^2 / (2 s^2))
    laplace      exp(-|x - y| / s)
    energy       -|x - y|                           its MMD^2 is the energy distance
    imq          (1 + |x - y|^2 / s^2)^(-1/2)       inverse multiquadric: heavy tails

and `Joint` of any of them on rows that carry labels.

Aiello et al. 2023 ("Fast Inference in Denoising Diffusion Models via MMD Finetuning") use the
cubic one, the linear one and one Gaussian with ``s^2 = d / 2``. A bandwidth ``s`` is a leaf of the
pytree: `median_bandwidth` of real features is the usual choice, and `mixture` spreads it over
several scales, so that no single one has to be right. Everything is float32 at the highest
precision: squared distances are differences of large numbers.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.errors import UserError

Kernel = Any  # a callable (x [m, d], y [n, d]) -> [m, n]
KERNELS = ("linear", "cubic", "gaussian", "laplace", "energy", "imq")
_SCALED = {"gaussian", "laplace", "imq"}  # those with a bandwidth


def inner_products(x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """``<x_i, y_j>`` in float32 whatever the backend's default precision."""
    x, y = (a.astype(jnp.float32) for a in (x, y))
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def squared_distances(x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """``|x_i - y_j|^2``; exactly 0, with gradient 0, for equal rows."""
    x, y = (a.astype(jnp.float32) for a in (x, y))
    # About a common origin: the cancellation is that of the spread, not of the distance from zero.
    origin = jax.lax.stop_gradient(y.mean(0))
    x, y = x - origin, y - origin
    norms = (x**2).sum(-1)[:, None] + (y**2).sum(-1)[None]
    square = norms - 2 * inner_products(x, y)
    # What is left of equal rows is rounding, and its root would be a thousand times larger.
    return jnp.where(square > 1e-6 * norms, square, 0.0)


def distances(x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """``|x_i - y_j|`` with gradient 0 where two rows coincide."""
    return _root(squared_distances(x, y))


def _root(square: Array) -> Array:
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


@flax.struct.dataclass
class Polynomial:
    """``(gamma <x, y> + offset)^degree``; `gamma` None is one over the number of features."""

    gamma: Any = None
    offset: float = flax.struct.field(pytree_node=False, default=1.0)
    degree: int = flax.struct.field(pytree_node=False, default=3)

    def __call__(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        gamma = 1.0 / x.shape[-1] if self.gamma is None else self.gamma
        return (gamma * inner_products(x, y) + self.offset) ** self.degree


@flax.struct.dataclass
class Gaussian:
    """``exp(-|x - y|^2 / (2 bandwidth^2))``."""

    bandwidth: Any

    def of_squares(self, square: Float[Array, "m n"]) -> Float[Array, "m n"]:
        return jnp.exp(-square / (2 * jnp.square(self.bandwidth)))

    def __call__(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        return self.of_squares(squared_distances(x, y))


@flax.struct.dataclass
class Laplace:
    """``exp(-|x - y| / bandwidth)``."""

    bandwidth: Any

    def of_squares(self, square: Float[Array, "m n"]) -> Float[Array, "m n"]:
        return jnp.exp(-_root(square) / self.bandwidth)

    def __call__(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        return self.of_squares(squared_distances(x, y))


@flax.struct.dataclass
class Energy:
    """``-|x - y|``: conditionally positive definite, which is all that MMD needs."""

    def of_squares(self, square: Float[Array, "m n"]) -> Float[Array, "m n"]:
        return -_root(square)

    def __call__(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        return self.of_squares(squared_distances(x, y))


@flax.struct.dataclass
class InverseMultiquadric:
    """``(1 + |x - y|^2 / bandwidth^2)^(-1/2)``."""

    bandwidth: Any

    def of_squares(self, square: Float[Array, "m n"]) -> Float[Array, "m n"]:
        return jax.lax.rsqrt(1 + square / jnp.square(self.bandwidth))

    def __call__(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        return self.of_squares(squared_distances(x, y))


@flax.struct.dataclass
class Mixture:
    """``sum_i weight_i kernel_i``: a kernel again."""

    kernels: tuple[Any, ...]
    weights: tuple[Any, ...]

    def __call__(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        terms = zip(self.weights, self.kernels, strict=True)
        return functools.reduce(operator.add, (w * kernel(x, y) for w, kernel in terms))


@flax.struct.dataclass
class Joint:
    """A kernel on rows whose last columns are a label: of features and labels jointly.

    A kernel of a distance takes ``|x - y|^2 + |l - l'|^2`` (for a Gaussian the product of two
    kernels), a polynomial is multiplied by ``exp(-|l - l'|^2 / (2 length^2))``: as a summand under
    its power, the label would not enter a linear kernel's gradient at all. The two distances are
    computed apart: in one, large labels would leave the features few digits.

    Attributes:
        kernel: of the features.
        length: unit of the labels' distance, for polynomials.
        columns: of the label.
    """

    kernel: Any
    length: Any
    columns: int = flax.struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        (x, told), (y, other) = ((a[:, : -self.columns], a[:, -self.columns :]) for a in (x, y))
        apart = squared_distances(told, other)
        return _joint(self.kernel, x, y, apart, self.length)


def _joint(kernel: Kernel, x: Array, y: Array, apart: Array, length: Any) -> Array:
    if isinstance(kernel, Mixture):
        terms = zip(kernel.weights, kernel.kernels, strict=True)
        return sum((w * _joint(k, x, y, apart, length) for w, k in terms), jnp.zeros(()))
    if isinstance(kernel, Polynomial):
        return kernel(x, y) * jnp.exp(-apart / (2 * jnp.square(length)))
    return kernel.of_squares(squared_distances(x, y) + apart)


def mixture(kernels: Sequence[Kernel], weights: Sequence[float | int] = ()) -> Mixture:
    """The weighted sum of `kernels`; without weights their mean.

    Raises:
        UserError: no kernel, or not one weight a kernel, or a negative weight.
    """
    weights = tuple(weights) or (1 / max(len(kernels), 1),) * len(kernels)
    if not kernels or len(weights) != len(kernels) or min(weights) < 0:
        raise UserError(
            f"kernel mixture: {len(kernels)} kernels with weights {weights}; expected one weight "
            ">= 0 for each of at least one kernel"
        )
    return Mixture(kernels=tuple(kernels), weights=weights)


def evenly(x: Float[Array, "n d"], most: int) -> Float[Array, "k d"]:
    """At most `most` rows of `x` at equal distances: rows sorted by class keep their shares."""
    return x[np.linspace(0, len(x) - 1, min(most, len(x))).astype(int)]


def median_bandwidth(x: Float[Array, "n d"], *, rows: int = 2000) -> Float[Array, ""]:
    """The median distance between two of `rows` rows, evenly over `x` (the median heuristic).

    Raises:
        UserError: fewer than two rows.
    """
    if len(x) < 2:
        raise UserError(f"median_bandwidth: {len(x)} rows; expected at least 2")
    x = jnp.asarray(evenly(x, rows))
    upper = jnp.triu_indices(len(x), 1)
    return jnp.maximum(jnp.median(distances(x, x)[upper]), 1e-6)


def make_kernel(
    name: str,
    *,
    bandwidth: float | int | Float[Array, ""] | None = None,
    factors: Sequence[float | int] = (1.0,),
    degree: int | None = None,
) -> Kernel:
    """The kernel called `name`, over several bandwidths where it has one.

    Args:
        name: of `KERNELS`; "linear" and "cubic" are polynomials.
        bandwidth: s, for the kernels that have one.
        factors: the kernel is the mean over ``s * factor``.
        degree: of the polynomial, in place of the name's.

    Raises:
        UserError: an unknown name, a bandwidth or factor that is missing or not above 0.
    """
    if name not in KERNELS:
        raise UserError(f"kernel: {name!r} is none of {', '.join(KERNELS)}")
    if name in ("linear", "cubic"):
        degree = {"linear": 1, "cubic": 3}[name] if degree is None else degree
        if degree < 1:
            raise UserError(f"kernel degree: {degree} is below 1")
        return Polynomial(degree=degree)
    if name == "energy":
        return Energy()
    concrete = isinstance(bandwidth, float | int)
    if bandwidth is None or (concrete and not bandwidth > 0):
        raise UserError(f"kernel bandwidth: {bandwidth} for {name}; expected a number above 0")
    if not factors or min(factors) <= 0:
        raise UserError(f"kernel factors: {tuple(factors)}; expected numbers above 0")
    kind = {"gaussian": Gaussian, "laplace": Laplace, "imq": InverseMultiquadric}[name]
    return mixture([kind(bandwidth=bandwidth * factor) for factor in factors])


def has_bandwidth(name: str) -> bool:
    """Whether the kernel called `name` needs a bandwidth."""
    return name in _SCALED
