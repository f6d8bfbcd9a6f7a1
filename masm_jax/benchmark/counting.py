"""Multiply-accumulates of a JAX function, counted in its jaxpr.

One rule, that of PyTorch's ``FlopCounterMode``, so that networks of both frameworks can be
compared: convolutions and matrix products count, padding included; norms, activations, softmax,
pooling and resampling do not. XLA's ``cost_analysis`` counts otherwise: everything, but no taps
that fall on padding, and the body of a loop once.

What is counted is the network, not the form in which a backend computes its convolutions: each is
traced as the one 3-D convolution it stands for. ``RESAMPLE`` names the scope in which a matrix
product is only our way to move or interpolate voxels, which the other framework does by indexing;
it is counted apart.
"""

import collections
import math
import re

import jax
from jax.extend import core as jex

from masm_jax.models import conv
from masm_jax.models.layers import RESAMPLE

PARTS = ("encoder", "mixers", "decoder")  # name scopes of the network


def macs(function, *arguments):
    """Count a function.

    Args:
      function: traceable by JAX.
      arguments: arrays or ShapeDtypeStructs, or trees of them.

    Returns:
      Counter of MACs: "conv", "matmul", and "resample" of products that only move voxels.

    Raises:
      ValueError: a loop whose length depends on values.
    """
    counts = collections.Counter()
    _count(_jaxpr(function, arguments), 1, "", counts, None)
    return counts


def total(counts):
    """MACs by the rule that both frameworks share."""
    return counts["conv"] + counts["matmul"]


def by_scope(function, *arguments):
    """The same by name scopes: {scope: MACs}, without what only moves voxels."""
    scopes = collections.Counter()
    _count(_jaxpr(function, arguments), 1, "", collections.Counter(), scopes)
    return scopes


def by_place(function, *arguments):
    """The same by part and level of the network, forward and backward together.

    Returns:
      {"encoder level1": MACs, ...} in the order of the network; "elsewhere" is in no part of it.
    """
    places = collections.Counter()
    for scope, number in by_scope(function, *arguments).items():
        words = re.findall(r"\w+", scope)  # of "transpose(jvp(encoder))/level1"
        part = next((word for word in words if word in PARTS), "elsewhere")
        level = next((word for word in words if re.fullmatch(r"level\d+", word)), "")
        places[f"{part} {level}".strip()] += number
    order = (*PARTS, "elsewhere")
    return dict(sorted(places.items(), key=lambda item: (order.index(item[0].split()[0]), item)))


def _jaxpr(function, arguments):
    with conv.traced_for("cuda"):
        return jax.make_jaxpr(function)(*arguments).jaxpr


def _count(jaxpr, times, outer, counts, scopes):
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        scope = "/".join(part for part in (outer, str(eqn.source_info.name_stack)) if part)
        if name in _PRODUCTS:
            kind, product = _PRODUCTS[name]
            number = times * product(eqn)
            moved = RESAMPLE in scope
            counts["resample" if moved else kind] += number
            if scopes is not None and not moved:
                scopes[scope] += number
        elif name == "cond":
            _count_branches(eqn, times, scope, counts, scopes)
        elif name == "while":
            inner = collections.Counter()
            for part in ("cond_jaxpr", "body_jaxpr"):
                _count(eqn.params[part].jaxpr, 1, scope, inner, None)
            if inner:
                raise ValueError(
                    f"a while loop around {dict(inner)} MACs in {scope or 'the function'}: how "
                    f"often it runs is not known before; use lax.scan"
                )
        else:
            inside = times
            if name == "scan":
                inside *= eqn.params["length"]
            elif name == "shard_map":
                inside *= eqn.params["mesh"].size
            for inner in _jaxprs(eqn.params):
                _count(inner, inside, scope, counts, scopes)


def _count_branches(eqn, times, scope, counts, scopes):
    """Of the branches of a condition, the one that costs most."""
    found = []
    for branch in eqn.params["branches"]:
        one, places = collections.Counter(), collections.Counter()
        _count(branch.jaxpr, times, scope, one, places)
        found.append((one.total(), one, places))
    _, one, places = max(found, key=lambda branch: branch[0])
    counts.update(one)
    if scopes is not None:
        scopes.update(places)


def _jaxprs(params):
    """The jaxprs that an equation runs: of jit, scan, remat, custom rules, shard_map, ..."""
    for value in params.values():
        if isinstance(value, jex.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jex.Jaxpr):
            yield value


def _conv(eqn):
    """Pairs of channels, times what each axis costs; groups are taken off the shapes already."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    left, right = (var.aval.shape for var in eqn.invars)
    result = eqn.outvars[0].aval.shape
    batch, features, *_ = numbers.out_spec
    count = result[batch] * result[features] * right[numbers.rhs_spec[1]]
    steps = ("window_strides", "lhs_dilation", "rhs_dilation")
    specs = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    for axis in range(len(numbers.out_spec) - 2):
        sizes = [shape[spec[axis + 2]] for shape, spec in zip((left, right, result), specs)]
        count *= _along(*sizes, *(params[step][axis] for step in steps))
    return count


def _along(left, right, result, stride, dilated, spread):
    """Multiplications along one axis: every tap meets every element of the smaller volume.

    In a convolution and in both of its gradients the same three sizes change places: two volumes
    and a kernel. JAX writes all three as convolutions. That of the input has the kernel at the
    right, and between the elements of the left zeros (``dilated``), which are no elements. That of
    the kernel has a volume at the right, and the kernel is the result.
    """
    extent = left * dilated
    if abs(result * stride - extent) <= abs(right * spread - extent):
        return right * min(left, result)
    return result * min(left, right)


def _dot(eqn):
    """Elements of the result x length of the sums."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


_PRODUCTS = {"conv_general_dilated": ("conv", _conv), "dot_general": ("matmul", _dot)}
