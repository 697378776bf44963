"""Multiply-adds of a network, counted from its traced program (for those without a closed form)."""

import math
from collections.abc import Callable
from typing import Any

import jax


def traced_macs(function: Callable, *arguments: Any) -> int:
    """Multiply-adds in all matrix products and convolutions of ``function(*arguments)``.

    `arguments` may be `jax.ShapeDtypeStruct`s; nothing is computed.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracting)
        elif eqn.primitive.name == "conv_general_dilated":
            spec = eqn.params["dimension_numbers"].rhs_spec
            kernel = eqn.invars[1].aval.shape  # (out, in / groups, *window) after the spec
            window = math.prod(kernel[i] for i in spec[1:])
            total += math.prod(eqn.outvars[0].aval.shape) * window
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _count(inner) * eqn.params.get("length", 1)
    return total
