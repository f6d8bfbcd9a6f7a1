"""FLOPs of the convolutions in a program: on a TPU all matrix products are convolutions.

``cost_analysis()["flops"]`` counts a loop's body once. Where a batch is worked on in parts
(config.accumulate) this count is multiplied by the trips (masm_jax.benchmark.traffic).
"""

import re


def flops(module, instruction, body):
    """2 x multiply-adds of an instruction and of what is fused into it.

    As XLA counts: taps that fall on padding, or between the elements of a dilated input, are left
    out. ``dot`` does not occur in a TPU's optimised program and is not counted.

    Args:
      module: hlo.Module.
      instruction: of it.
      body: the computation that the instruction is in.

    Returns:
      int.
    """
    if instruction.opcode == "convolution":
        return _convolution(instruction, body)
    if instruction.opcode != "fusion":
        return 0
    total = 0
    for called in instruction.calls:
        inner = module.computations[called]
        total += sum(flops(module, nested, inner) for nested in inner.values())
    return total


def _convolution(instruction, body):
    (left,), (kernel,) = (body[name].arrays for name in instruction.operands[:2])
    (result,) = instruction.arrays
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    sizes = [dict(zip(names, array.dims)) for names, array in zip(labels, (left, kernel, result))]
    inputs, taps, outputs = sizes
    total = 2 * outputs["b"] * outputs["f"] * taps["i"]
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute(r"window=\{([^}]*)\}")))
    for axis in sorted(name for name in outputs if name.isdigit()):
        place = int(axis)
        pad = window["pad"].split("x")[place].partition("_")[0] if "pad" in window else "0"
        stride, dilated, spread = (
            int(window[key].split("x")[place]) if key in window else 1
            for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        total *= _pairs(inputs[axis], taps[axis], outputs[axis], int(pad), stride, dilated, spread)
    return total


def _pairs(size, taps, results, pad, stride, dilated, spread):
    """(result, tap) pairs along one axis that meet an element of the input."""
    last = (size - 1) * dilated
    return sum(
        0 <= place <= last and place % dilated == 0
        for result in range(results)
        for tap in range(taps)
        for place in [result * stride + tap * spread - pad]
    )
