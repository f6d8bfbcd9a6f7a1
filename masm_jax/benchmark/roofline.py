"""The shortest time that a step can take, and what a larger pod would leave of it.

A roofline is a bound: arithmetic at the peak, memory and interconnect at their full bandwidth, each
hidden behind the longest of the three. A step on a chip is slower. How much slower is not known
without one. The compiler estimates cycles for most instructions, for itself and undocumented; the
report shows their sum beside the bounds.
"""

from masm_jax.benchmark import chips as chips_lib

PODS = tuple(2**n for n in range(3, 13))  # 8 to 4096 chips


def exchange_seconds(where, kind, payload, group):
    """Least time of a collective.

    Args:
      where: chips.Slice.
      kind: "all-reduce", "all-gather", "reduce-scatter", "collective-permute" or "all-to-all".
      payload: bytes per chip; of an all-gather the gathered ones.
      group: n, chips that take part.

    Returns:
      seconds. Of the payload a chip sends (n - 1) / n, an all-reduce that twice (reduce-scatter,
      then all-gather, in rings over all axes at once); a permutation goes over one port.
    """
    if kind == "collective-permute":
        return payload / where.chip.ici_port
    if group == 1:
        return 0.0
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * (group - 1) / group * payload / where.ici


def roofline(where, *, flops, hbm_bytes, collectives, samples):
    """Bounds of a step on one chip.

    Args:
      where: chips.Slice.
      flops: of the step, per chip.
      hbm_bytes: read and written, per chip.
      collectives: of ``traffic.count``.
      samples: crops that a chip works on; a part of one where volumes are cut.

    Returns:
      {"compute", "memory", "interconnect": seconds, "seconds": the largest, "bound": its name,
      "samples_per_second_per_chip", "mfu": FLOPs over the peak in that time}.
    """
    times = {
        "compute": flops / where.chip.peak_flops,
        "memory": hbm_bytes / where.chip.hbm_bandwidth,
        "interconnect": sum(exchange_seconds(where, c.kind, c.bytes, c.group) for c in collectives),
    }
    bound = max(times, key=times.get)
    seconds = times[bound]
    return times | {
        "seconds": seconds,
        "bound": bound,
        "samples_per_second_per_chip": samples / seconds,
        "mfu": times["compute"] / seconds,
    }


def weak_scaling(chip, *, work_seconds, other_seconds, reduced_bytes, pods=PODS):
    """What is left of the speed of a chip in larger and larger pods, the work per chip the same.

    Within a slice the all-reduce takes ``exchange_seconds``. Over several slices each chip sums its
    part over the data centre's network: 2 (s - 1) / s * bytes / chips of a slice. Not in it: the
    latency of a hop, chips that wait for each other, reading the data.

    Args:
      chip: chips.Chip.
      work_seconds: the step without collectives.
      other_seconds: collectives that do not grow with the pod (planes of neighbours).
      reduced_bytes: all-reduced over all chips per step: the gradient, sums of the loss.
      pods: numbers of chips, powers of two.

    Returns:
      a dict per pod: "chips", "slices", "slice" ("4x4"), "ici_seconds", "dcn_seconds" (None: more
      than one slice, and no bandwidth published), "efficiency" (exchange after the work),
      "efficiency_overlapped" (exchange hidden behind the work as far as it goes); None for a pod
      that cannot be said.
    """
    rows = []
    for pod in pods:
        where = chips_lib.shape(chip, min(pod, 2 ** (chip.largest_slice.bit_length() - 1)))
        slices = pod // where.chips
        ici = exchange_seconds(where, "all-reduce", reduced_bytes, where.chips)
        dcn = 0.0
        if slices > 1:
            part = reduced_bytes / where.chips
            dcn = 2 * (slices - 1) / slices * part / chip.dcn if chip.dcn else None
        apart = together = None
        if dcn is not None:
            exchange = other_seconds + ici + dcn
            apart = work_seconds / (work_seconds + exchange)
            together = work_seconds / max(work_seconds, exchange)
        rows.append(
            {
                "chips": pod,
                "slices": slices,
                "slice": "x".join(map(str, where.edges)),
                "ici_seconds": ici,
                "dcn_seconds": dcn,
                "efficiency": apart,
                "efficiency_overlapped": together,
            }
        )
    return rows
