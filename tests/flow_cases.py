"""Closed-form velocities for the tests of the flow package."""

import flax.struct
import jax
import jax.numpy as jnp

from lfm_jax.flow.path import expand


@flax.struct.dataclass
class Gaussian:
    """The exact velocity of data N(mean, std^2 I) on the straight path with s = 0.

    Its flow is known: ``x_t = (1 - t) mean + std_t e`` with ``std_t^2 = (1-t)^2 std^2 + t^2``.
    """

    mean: jax.Array
    std: jax.Array
    t_max: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def network_calls(self):
        return 1

    def factor(self, t):
        return (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)

    def __call__(self, x, t):
        t = expand(t, x)
        return -self.mean + self.factor(t) * (x - (1 - t) * self.mean)

    def solution(self, noise, t=0.0):
        return (1 - t) * self.mean + jnp.sqrt((1 - t) ** 2 * self.std**2 + t**2) * noise


@flax.struct.dataclass
class Tangent:
    """``dx/dt = w cos(w t) (1 + x^2)``: non-linear in state and time, solved by ``tan``."""

    w: jax.Array
    t_max: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def network_calls(self):
        return 1

    def __call__(self, x, t):
        return self.w * jnp.cos(self.w * expand(t, x)) * (1 + x**2)

    def solution(self, x1):
        """The state at t = 0 of the flow through `x1` at t = 1."""
        return jnp.tan(jnp.arctan(x1) - jnp.sin(self.w))


class Calls:
    """A count that a running program adds to."""

    def __init__(self):
        self.count = 0

    def add(self, _):
        self.count += 1

    def take(self):
        """The count so far; starts again at 0."""
        jax.effects_barrier()
        count, self.count = self.count, 0
        return count


@flax.struct.dataclass
class Counting:
    """Counts the calls that are executed, by a callback from the running program."""

    inner: object
    calls: Calls = flax.struct.field(pytree_node=False)

    @property
    def t_max(self):
        return self.inner.t_max

    @property
    def network_calls(self):
        return self.inner.network_calls

    def __call__(self, x, t):
        jax.debug.callback(self.calls.add, t[0])
        return self.inner(x, t)
