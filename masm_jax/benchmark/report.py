"""What is reported of a compiled step: a dict for JSON, and the same in words."""

import collections
import dataclasses
import re

from masm_jax.benchmark import chips, roofline
from masm_jax.benchmark.traffic import KINDS

GB = 1e9


def counted(traffic, *, movers):
    """The traffic of ``traffic.count`` as plain numbers.

    Args:
      traffic: Traffic.
      movers: how many of the largest instructions are listed.

    Returns:
      dict; bytes are per chip and step.
    """
    moves = traffic.moves
    return {
        **_sum(moves),
        "by_kind": _grouped(moves, lambda move: move.kind),
        "by_part": _grouped(moves, lambda move: move.place.whose),
        "by_place": _grouped(moves, lambda move: str(move.place)),
        "movers": [
            {
                "name": move.name,
                "kind": move.kind,
                "bytes": move.bytes,
                "padding": move.padding,
                "padding_factor": _factor(move.bytes, move.padding),
                "cycles": move.cycles,
                "trips": move.trips,
                "place": str(move.place),
                "line": move.place.line,
                "op_name": move.op_name,
                "largest_array": move.arrays,
            }
            for move in sorted(moves, key=lambda move: -move.bytes)[:movers]
        ],
        "loops": [
            {"name": loop.name, "trips": loop.trips or None, "place": str(loop.place)}
            for loop in traffic.loops
        ],
        "conditionals": traffic.conditionals,
    }


def exchanged(traffic):
    """{kind: {"count": executed, "bytes": payload per chip, "groups": chips in a group}}."""
    kinds = {}
    for collective in traffic.collectives:
        row = kinds.setdefault(collective.kind, {"count": 0, "bytes": 0, "groups": []})
        row["count"] += collective.trips
        row["bytes"] += collective.bytes
        row["groups"] = sorted({*row["groups"], collective.group})
    return kinds


def build(facts, traffic, *, where, samples, spatial, movers):
    """All numbers of a step that fits.

    Args:
      facts: of ``program.compile_``.
      traffic: of ``traffic.count``.
      where: chips.Slice.
      samples: crops per chip and step.
      spatial: chips over which a volume is cut.
      movers: how many instructions are listed.
    """
    numbers = counted(traffic, movers=movers)
    # The compiler counts a loop's body once, the text's convolutions are counted as often as run.
    flops = max(facts["cost"]["flops"], numbers["flops"])
    bounds = roofline.roofline(
        where,
        flops=flops,
        hbm_bytes=numbers["bytes"],
        collectives=traffic.collectives,
        samples=samples,
    )
    everywhere = {where.chips, where.chips // spatial}
    growing = [c for c in traffic.collectives if c.kind == "all-reduce" and c.group in everywhere]
    others = [c for c in traffic.collectives if c not in growing]
    reduced = sum(c.bytes for c in growing)
    scaling = roofline.weak_scaling(
        where.chip,
        work_seconds=max(bounds["compute"], bounds["memory"]),
        other_seconds=sum(
            roofline.exchange_seconds(where, c.kind, c.bytes, c.group) for c in others
        ),
        reduced_bytes=reduced,
    )
    return {
        "memory": facts["memory"] | {"usable": where.chip.hbm_usable},
        "flops": flops,
        "cost_analysis": facts["cost"],
        "traffic": numbers,
        "collectives": exchanged(traffic),
        "all_reduced_bytes": reduced,
        "roofline": bounds,
        "scaling": scaling,
    }


def _sum(moves):
    read, written = sum(m.read for m in moves), sum(m.written for m in moves)
    return {
        "bytes": read + written,
        "read": read,
        "written": written,
        "padding": sum(m.padding for m in moves),
        "onchip": sum(m.onchip for m in moves),
        "cycles": sum(m.cycles for m in moves),
        "flops": sum(m.flops for m in moves),
    }


def _grouped(moves, key):
    groups = collections.defaultdict(list)
    for move in moves:
        groups[key(move)].append(move)
    keys = ("bytes", "padding", "cycles")
    rows = {
        name: {"count": len(own), **{k: v for k, v in _sum(own).items() if k in keys}}
        for name, own in groups.items()
    }
    return dict(sorted(rows.items(), key=lambda row: -row[1]["bytes"]))


def _factor(size, padding):
    return size / (size - padding) if size > padding else None


# ---------------------------------------------------------------- in words


def misfit(report):
    """Lines about a step that does not fit into memory."""
    said = report["compiled"]["message"]
    sizes = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", said)
    needs = f"it needs {sizes[1]}iB, {sizes[2]}iB are there" if sizes else said
    return "\n".join(
        [
            _title(report),
            f"does not fit: {needs} on each chip (compiler's numbers).",
            "Less memory: smaller --batch_per_chip or --patch, --set accumulate=N, "
            "--set model.remat=full, or --spatial=K",
        ]
    )


def words(report, *, movers):
    """The report as text.

    Args:
      report: as written to JSON.
      movers: how many rows of the long tables.
    """
    return "\n".join(
        [
            _title(report),
            "Compiled, not run: every number below is the compiler's or read off its program.",
            "",
            *_memory(report),
            "",
            *_traffic(report, movers),
            "",
            *_exchange(report),
            "",
            *_bounds(report),
            "",
            *_scaling(report),
        ]
    )


def _title(report):
    run = report["run"]
    patch = "x".join(map(str, run["patch"]))
    cut = f", volumes cut over {run['spatial']} chips" if run["spatial"] > 1 else ""
    how = f"{run['batch_size']} crops of {patch} per step{cut}"
    return (
        f"{run['config']} ({run['size']}, {run['parameters'] / 1e6:.1f} M parameters), "
        f"{run['step']} step on {run['topology']} ({run['accelerator_type']}, {run['chips']} "
        f"chips): {how}"
    )


def _memory(report):
    memory = report["memory"]
    yield "MEMORY of a chip, GB"
    for name in ("arguments", "outputs", "aliased", "temporaries", "program"):
        note = "  (outputs in the place of arguments)" if name == "aliased" else ""
        yield f"  {name:<12} {memory[name] / GB:8.3f}{note}"
    share = memory["peak"] / memory["usable"]
    yield (
        f"  {'peak':<12} {memory['peak'] / GB:8.3f}  of {memory['usable'] / GB:.1f} that a program "
        f"may have: {share:.0%}"
    )
    again = report["compiled"].get("reused")
    took = f"compiled in {report['compiled']['seconds']:.0f} s"
    yield f"  {took} on {report['compiled']['date']}" + (f", reused from {again}" if again else "")


def _traffic(report, movers):
    traffic, cost = report["traffic"], report["cost_analysis"]
    unit, name = (1e9, "GB") if traffic["bytes"] >= 1e9 else (1e6, "MB")
    whole = max(1, traffic["cycles"])

    def row(numbers, second, last):
        share = numbers["cycles"] / whole
        return f"  {numbers['bytes'] / unit:9.3f} {second:>7} {share:6.0%} {last:6d}"

    def grouped(numbers):
        padded = f"{numbers['padding'] / max(1, numbers['bytes']):.0%}"
        return row(numbers, padded, numbers["count"])

    yield f"BYTES of HBM that a chip moves per step, {name}"
    yield (
        f"  {traffic['bytes'] / unit:.3f} = {traffic['read'] / unit:.3f} read + "
        f"{traffic['written'] / unit:.3f} written; {traffic['padding'] / unit:.3f} of it padding"
    )
    yield (
        f"  on-chip memory, not in it: {traffic['onchip'] / unit:.3f}; cost_analysis, which counts "
        f"that and more (masm_jax/benchmark/traffic.py): {cost['bytes_accessed'] / unit:.3f}"
    )
    loops = traffic["loops"]
    unknown = sum(loop["trips"] is None for loop in loops)
    yield (
        f"  {len(loops)} loops: {len(loops) - unknown} counted as often as they run, {unknown} "
        f"once; {traffic['conditionals']} conditionals: by the branch that moves most"
    )
    heads = f"  {name:>9} {'padding':>7} {'cycles':>6} {'instr.':>6}"
    yield f"{heads}  by kind (cycles: share of the compiler's estimate)"
    yield from (f"{grouped(r)}  {KINDS[kind]}" for kind, r in traffic["by_kind"].items())
    for key, title in (("by_part", "by part"), ("by_place", "by part, level, function, direction")):
        yield f"{heads}  {title}"
        rows = list(traffic[key].items())[:movers]
        yield from (f"{grouped(numbers)}  {what}" for what, numbers in rows)
    yield f"  {name:>9} {'factor':>7} {'cycles':>6} {'trips':>6}  largest: kind, name; place; array"
    for mover in traffic["movers"][:movers]:
        factor = f"{mover['padding_factor']:.2f}" if mover["padding_factor"] else "-"
        yield (
            f"{row(mover, factor, mover['trips'])}  {mover['kind']} {mover['name']}; "
            f"{mover['place']} {mover['line']}; {mover['largest_array']}"
        )


def _exchange(report):
    yield "COLLECTIVES per step: payload that a chip gives, MB (no padding)"
    if not report["collectives"]:
        yield "  none"
    for kind, row in report["collectives"].items():
        groups = ", ".join(map(str, row["groups"]))
        yield f"  {row['bytes'] / 1e6:9.3f}  {kind}, {row['count']} of them, among {groups} chips"


def _bounds(report):
    bounds, chip = report["roofline"], report["chip"]
    names = {
        "compute": f"arithmetic: {report['flops'] / 1e12:.3f} TFLOP at "
        f"{chip['peak_flops'] / 1e12:.0f} TFLOP/s bf16",
        "memory": f"HBM: {report['traffic']['bytes'] / GB:.2f} GB at "
        f"{chip['hbm_bandwidth'] / GB:.0f} GB/s",
        "interconnect": f"interconnect, {chip['ici'] / GB:.0f} GB/s out of each chip",
    }
    yield "ROOFLINE: no step can be shorter; real ones are longer"
    for name, what in names.items():
        mark = "  <- bounds the step" if name == bounds["bound"] else ""
        yield f"  {bounds[name] * 1e3:9.3f} ms  {what}{mark}"
    yield (
        f"  at most {bounds['samples_per_second_per_chip']:.2f} crops/s per chip; of the peak "
        f"{bounds['mfu']:.1%} (MFU)"
    )
    cycles = report["traffic"]["cycles"]
    yield (
        f"  {cycles / chip['clock'] * 1e3:9.3f} ms  the compiler's own estimate, undocumented: "
        f"{cycles / 1e6:.1f} M cycles, where it gives any, at {chip['clock'] / GB:.2f} GHz"
    )


def _scaling(report):
    if not report["all_reduced_bytes"]:
        yield "LARGER PODS: chips exchange nothing over all of them; nothing to predict"
        return
    yield (
        f"LARGER PODS, the work per chip the same: {report['all_reduced_bytes'] / 1e6:.1f} MB "
        f"all-reduced per step. Bounds; latency, stragglers and input left out"
    )
    yield f"  {'chips':>6} {'slices':>12} {'exchange ms':>12} {'after the work':>15} {'hidden':>7}"
    for row in report["scaling"]:
        slices = f"{row['slices']} x {row['slice']}"
        if row["efficiency"] is None:
            yield f"  {row['chips']:>6} {slices:>12}   left out: no bandwidth between slices known"
            continue
        exchange = (row["ici_seconds"] + row["dcn_seconds"]) * 1e3
        yield (
            f"  {row['chips']:>6} {slices:>12} {exchange:12.3f} {row['efficiency']:15.1%} "
            f"{row['efficiency_overlapped']:7.1%}"
        )


def chip_facts(where):
    """{name: number} of the chip and where each was read, for JSON."""
    facts = dataclasses.asdict(where.chip)
    return facts | {"ici": where.ici, "sources_read": chips.READ}
