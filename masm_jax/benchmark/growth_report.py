"""What ``growth`` has measured: tables, exponents, a plot."""

import statistics

import numpy as np
from matplotlib.figure import Figure

from masm_jax.benchmark import tables
from masm_jax.benchmark.plots import COLOURS, save
from masm_jax.benchmark.store import Item
from masm_jax.files import replacing

AIM = 1.1  # exponent of time against multiply-adds
WORDS = {
    "patch": "edge of the patch, voxels", "batch": "patches", "modalities": "modalities",
    "depth": "depth of the mixers",
}  # fmt: skip
TITLES = {"infer": "inference", "train": "training step"}
NOTES = f"""\
Time: median over the rounds. Memory: the most that the process held, less what it held after its
imports, in the round with the least, as the first also compiles (on a GPU: allocated). Exponents
are least-squares slopes of logarithms over all points of an axis; that of the last two points
stands beside it. Memory is set against the voxels of a patch, the patches, the modalities, the
depth. One modality has no pair: its Modality-Aware mixers are left out. "No worse than its work":
exponent of time at most {AIM}."""


def write(store, axes, modes):
    """Print the tables, write them to growth.md, and draw growth.png and growth.svg.

    Args:
      store: Store.
      axes: {axis: [growth.Point]}.
      modes: of compare.MODES.
    """
    found = {(axis, mode): rows(store, axis, chosen, mode)
             for axis, chosen in axes.items() for mode in modes}  # fmt: skip
    text = "\n".join(words(store, axes, found)) + "\n"
    with replacing(store.folder / "growth.md") as temporary:
        temporary.write_text(text)
    save(figure(found), store.folder / "growth")
    print(text, end="")


def rows(store, axis, chosen, mode):
    """Dicts of the points of an axis in a mode.

    Returns:
      per point "value" on the axis, "amount" that memory is set against, "macs"; and "seconds" and
      "peak" (bytes), or "problem", why it was not measured.
    """
    found = []
    for point in chosen:
        item = Item(f"masm_{store.settings['network']}", point.name, mode)
        value, results = getattr(point, axis), store.of(item)
        row = {"value": value, "amount": value**3 if axis == "patch" else value}
        row["macs"] = store.counts[point.name][mode]
        if results:
            row["seconds"] = statistics.median(each["median"] for each in results)
            row["peak"] = min(each["peak"] for each in results)
        else:
            row["problem"] = store.failures.get(" ".join(item), "")
        found.append(row)
    return found


def slopes(measured, x, y):
    """Exponents of y against x: of all rows by least squares, and of the last two; or None."""
    pairs = [(row[x], row[y]) for row in measured if row.get(y)]
    if len({left for left, _ in pairs}) < 2:
        return None
    left, up = np.log(np.array(sorted(pairs), float)).T
    return float(np.polyfit(left, up, 1)[0]), float((up[-1] - up[-2]) / (left[-1] - left[-2]))


def words(store, axes, found):
    """Lines of Markdown: what was run, exponents, and a table per axis and mode."""
    settings = store.settings
    versions = [f"{name} {said}" for each in store.versions.values() for name, said in each.items()]
    edges = {f" of {chosen[0].patch}^3" for axis, chosen in axes.items() if axis != "patch"}
    lines = [
        f"MASM, size {settings['network']}, {settings['dtype']}, {settings['device']}, "
        f"{settings['threads']} threads; {', '.join(versions)}. Beside what grows: 1 patch"
        f"{''.join(edges)}, 4 modalities, depth 1, which is that of the config.",
        "", NOTES, "",
    ]  # fmt: skip
    cells = []
    for (axis, mode), measured in found.items():
        time, memory = slopes(measured, "macs", "seconds"), slopes(measured, "amount", "peak")
        good = "" if time is None else "yes" if time[0] <= AIM else "no"
        done = [row["macs"] for row in measured if "seconds" in row]
        grown = f"{max(done) / min(done):.3g}" if done else ""
        cells.append([WORDS[axis], TITLES[mode], grown, _two(time), _two(memory), good])
    heads = (
        "what grows", "of", "times the GMAC", "exponent of time by GMAC", "exponent of memory",
        "no worse than its work",
    )  # fmt: skip
    lines += tables.markdown(heads, cells)
    for (axis, mode), measured in found.items():
        lines += ["", f"{TITLES[mode].capitalize()}, {WORDS[axis]}:", "", *_table(measured)]
    return lines


def _two(exponents):
    return "" if exponents is None else "{:.2f}, last {:.2f}".format(*exponents)


def _table(measured):
    cells = []
    for row in measured:
        first = [row["value"], f"{row['macs'] / 1e9:.4g}"]
        if "seconds" in row:
            seconds, peak = row["seconds"], row["peak"]
            rate = row["macs"] / 1e9 / seconds
            cells.append([*first, f"{seconds:.4g}", f"{rate:.4g}", f"{peak / 1e9:.2f}"])
        else:
            cells.append([*first, f"not measured: {row['problem']}", "", ""])
    return tables.markdown(("value", "GMAC", "s", "GMAC/s", "peak memory, GB"), cells)


def figure(found):
    """A column per axis, time over memory; dashed: proportional to the work, from the last point.

    Args:
      found: {(axis, mode): rows}.
    """
    axes = list(dict.fromkeys(axis for axis, _ in found))
    drawing = Figure(figsize=(1 + 3.6 * len(axes), 6.4), layout="constrained")
    panels = drawing.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        lines = {mode: [row for row in found.get((axis, mode), ()) if "seconds" in row]
                 for mode in TITLES}  # fmt: skip
        where = sorted({row["value"] for measured in lines.values() for row in measured})
        for panel, key, unit, label in zip(
            panels[:, column], ("seconds", "peak"), (1, 1e9), ("s", "peak memory, GB")
        ):
            panel.set(xscale="log", yscale="log", xlabel=WORDS[axis], ylabel=label)
            panel.set_xticks(where, map(str, where))
            panel.xaxis.minorticks_off()
            panel.grid(linewidth=0.3)
            for (mode, measured), colour in zip(lines.items(), COLOURS):
                _line(panel, measured, key, unit, color=colour, label=TITLES[mode])
    panels[0, 0].legend(fontsize=8)
    drawing.suptitle("Dashed: in proportion to the multiply-adds", fontsize=9)
    return drawing


def _line(panel, measured, key, unit, *, color, label):
    if not measured:
        return
    left, up = [row["value"] for row in measured], [row[key] / unit for row in measured]
    panel.plot(left, up, "o-", color=color, markersize=4, label=label)
    per_mac = up[-1] / measured[-1]["macs"]
    panel.plot(left, [per_mac * row["macs"] for row in measured], "--", color=color, linewidth=0.8)
