"""From measurements to a table: medians with their spread over rounds, and ratios to peers."""

import collections
import statistics

from masm_jax.benchmark import chips, peers, published, tables

NOTES = """\
Medians of rounds in alternating order, with the quartiles over the rounds. A training step is
forward, Dice and cross-entropy, backward, clipping, AdamW; ours has deep supervision, averaged
weights and metrics besides, peers have one head. Memory: the most that the process held, less what
it held after its imports, in the round with the least (on a GPU: allocated). Compilation: the
first call of all, less a later one. GFLOP: 2 x GMAC, of a patch. MFU, of bfloat16: TFLOP/s over
those of the GPU's data sheet."""
LARGE = 120.0  # GMAC forward at 128^3 of a peer that is worth being faster than


def rows(results, counts, settings, device=""):
    """Summaries, in the order of the first measurement of each.

    Args:
      results: dicts of compare.Store.
      counts: {network: {"parameters", "forward", "train"}}.
      settings: {"patch", "batch", "dtype", ...} of compare.FIXED.
      device: what the driver of a GPU calls it.

    Returns:
      dicts with "network", "variant", "mode", "framework"; "latency" (s, median over rounds),
      "spread" (first and third quartile, or None of one round), "patches" (per second), "peak"
      (bytes, of the round with the least: the first also compiles), "compile" (s, of the first
      call more than a later one), "rounds"; None where it is not known: "parameters", "macs" (of a
      call in this mode, per patch), "flops_per_second", "mfu" (these over the peak of the GPU),
      "per_mac" (time per multiply-add over that of peers.REFERENCE), "faster" (patches/s over those
      of the fastest large peer).
    """
    peak = chips.gpu_peak(device) if settings["dtype"] == "bfloat16" else None
    groups = collections.defaultdict(list)
    for found in results:
        groups[found["network"], found["variant"], found["mode"]].append(found)
    summaries = []
    for (network, variant, mode), found in groups.items():
        medians = [each["median"] for each in found]
        latency = statistics.median(medians)
        firsts = [each["first"] for each in found if each["first"] is not None]
        count = counts.get(network, {})
        summaries.append(
            {
                "network": network,
                "variant": variant,
                "mode": mode,
                "framework": peers.NETWORKS[network].framework,
                "latency": latency,
                "spread": _quartiles(medians),
                "patches": settings["batch"] / latency,
                "peak": min(each["peak"] for each in found),
                "compile": max(0.0, firsts[0] - latency) if firsts else None,
                "rounds": len(found),
                "parameters": count.get("parameters"),
                "forward": count.get("forward"),
                "macs": count.get({"infer": "forward", "train": "train"}[mode]),
            }
        )
    for row in summaries:
        same = [other for other in summaries if other["mode"] == row["mode"]]
        row["per_mac"], row["faster"] = _per_mac(row, same), _faster(row, same, settings["patch"])
        rate = 2 * row["macs"] * row["patches"] if row["macs"] else None
        row["flops_per_second"], row["mfu"] = rate, rate / peak if rate and peak else None
    return summaries


def _quartiles(values):
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _per_mac(row, same):
    """Time per multiply-add over that of the reference, in its fastest variant."""
    reference = [other for other in same if other["network"] == peers.REFERENCE and other["macs"]]
    if not reference or not row["macs"]:
        return None
    return (
        row["latency"] / row["macs"] / min(other["latency"] / other["macs"] for other in reference)
    )


def _faster(row, same, patch):
    """Patches/s over those of the fastest large peer, in its fastest variant."""
    least = LARGE * 1e9 * (patch / 128) ** 3
    large = [
        other["patches"] for other in same
        if other["framework"] == "torch" and (other["forward"] or 0) >= least
    ]  # fmt: skip
    return row["patches"] / max(large) if large else None


def words(summaries, store, failures):
    """Lines of Markdown: what was run, a table per mode, what failed, what others have published.

    Args:
      summaries: of ``rows``.
      store: compare.Store.
      failures: {compare.Item: reason}.
    """
    settings = store.settings
    versions = {name: said for each in store.versions.values() for name, said in each.items()}
    lines = [
        f"{settings['batch']} x 4 x {settings['patch']}^3, {settings['dtype']}, "
        f"{settings['device']}, {settings['threads']} threads; "
        + ", ".join(f"{name} {said}" for name, said in versions.items()),
        "",
        NOTES,
    ]
    for mode, title in (("infer", "Inference"), ("train", "Training step")):
        chosen = [row for row in summaries if row["mode"] == mode]
        if chosen:
            lines += ["", f"{title}:", "", *_table(chosen, settings["patch"])]
    if failures:
        lines += ["", "Without numbers:", ""]
        lines += [f"- {' '.join(item)}: {reason}" for item, reason in failures.items()]
    return [*lines, "", *published.words()]


def _table(chosen, patch):
    heads = (
        "network", "in", "M parameters", "GMAC", "GFLOP", "ms a call", "quartiles", "patches/s",
        "TFLOP/s", *(["MFU"] if any(row["mfu"] for row in chosen) else []), "peak memory, GB",
        "compilation, s", f"time per GMAC, {peers.REFERENCE} = 1",
        f"patches/s, fastest peer of {LARGE * (patch / 128) ** 3:.3g} GMAC or more = 1",
    )  # fmt: skip
    cells = []
    for row in chosen:
        spread = row["spread"]
        between = f"{1e3 * spread[0]:.4g} to {1e3 * spread[1]:.4g}" if spread else ""
        cells.append(
            [
                row["network"],
                f"{row['framework']}, {row['variant']}",
                _number(row["parameters"], 1e6, ".1f"),
                _number(row["macs"], 1e9, ".4g"),
                _number(row["macs"], 0.5e9, ".4g"),
                f"{1e3 * row['latency']:.4g}",
                between,
                f"{row['patches']:.3g}",
                _number(row["flops_per_second"], 1e12, ".3g"),
                *([_number(row["mfu"], 1, ".1%")] if "MFU" in heads else []),
                f"{row['peak'] / 1e9:.2f}",
                _number(row["compile"], 1, ".1f"),
                _number(row["per_mac"], 1, ".2f"),
                _number(row["faster"], 1, ".2f"),
            ]
        )
    return tables.markdown(heads, cells)


def _number(value, unit, form):
    return "" if value is None else format(value / unit, form)
