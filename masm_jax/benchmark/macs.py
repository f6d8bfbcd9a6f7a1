"""Multiplications of a JAX function, counted in what it traces to; nothing is computed."""

import math

import jax
from jax.extend import core

_ONE_OF = "branches"  # of ``lax.cond``: one of them runs


def count(function, *arguments):
    """Multiply-accumulates of the convolutions and products of matrices.

    Zeros of the padding count, as in PyTorch's counter (torch.utils.flop_counter).

    Args:
        function: traceable.
        *arguments: arrays, or their shapes (``jax.ShapeDtypeStruct``).

    Returns:
        int.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        kind, parameters = equation.primitive.name, equation.params
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            kernel = equation.invars[1].aval
            per_output = kernel.size // kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * per_output
        times = parameters.get("length", 1) if kind == "scan" else 1
        for name, value in parameters.items():
            inner = [_of(one) for one in core.jaxprs_in_params({name: value})]
            total += times * (max(inner, default=0) if name == _ONE_OF else sum(inner))
    return total
