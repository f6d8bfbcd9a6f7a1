"""Pareto plots of a comparison: who does more per second for its cost, who needs less memory."""

from matplotlib.figure import Figure

from masm_jax.benchmark.plots import COLOURS, save

MARKS = {"jit": "o", "eager": "s", "compile": "^", "contiguous": "D"}
_TITLES = {"infer": "inference", "train": "training step"}


def draw(rows, folder):
    """Write FOLDER/speed and FOLDER/memory, each as .png and .svg.

    Args:
      rows: of ``ranking.rows``.
      folder: a path.
    """
    save(figure(rows, x=("macs", 1e9, "GMAC of a patch"), y=("patches", 1, "patches/s"), best=max),
         folder / "speed")  # fmt: skip
    save(figure(rows, x=("parameters", 1e6, "M parameters"), y=("peak", 1e9, "peak memory, GB"),
                best=min), folder / "memory")  # fmt: skip


def figure(rows, *, x, y, best):
    """A panel per mode, logarithmic, a labelled mark per network and variant.

    Args:
      rows: of ``ranking.rows``; those without a number of ``x`` or ``y`` are left out.
      x, y: (field of a row, unit, words).
      best: max or min, of ``y``: the line joins those that nothing cheaper beats.
    """
    modes = [mode for mode in _TITLES if any(row["mode"] == mode for row in rows)]
    drawing = Figure(figsize=(1 + 6 * len(modes), 5.2), layout="constrained")
    for axes, mode in zip(drawing.subplots(1, len(modes), squeeze=False)[0], modes):
        points = [
            (row[x[0]] / x[1], row[y[0]] / y[1], row)
            for row in rows
            if row["mode"] == mode and row[x[0]] and row[y[0]]
        ]
        _panel(axes, sorted(points, key=lambda point: point[:2]), best)
        axes.set(xlabel=x[2], ylabel=y[2], title=_TITLES[mode])
    marks = [
        drawing.axes[0].plot([], [], mark, color="0.3", linestyle="")[0] for mark in MARKS.values()
    ]
    drawing.legend(marks, MARKS, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return drawing


def front(points, best):
    """Those of (x, y, ...) sorted by x that no point with smaller x equals or beats in y."""
    kept = []
    for point in points:
        if not kept or (point[1] != kept[-1][1] and best(point[1], kept[-1][1]) == point[1]):
            kept.append(point)
    return kept


def _panel(axes, points, best):
    axes.set(xscale="log", yscale="log")
    axes.grid(which="both", linewidth=0.3)
    line = front(points, best)
    axes.plot([p[0] for p in line], [p[1] for p in line], color="0.75", linewidth=1, zorder=1)
    for place, (left, up, row) in enumerate(points):
        colour = COLOURS[0] if row["framework"] == "jax" else COLOURS[1]
        axes.plot(left, up, MARKS[row["variant"]], color=colour)
        side = 1 if place % 2 else -1  # neighbours along x have their names on different sides
        axes.annotate(
            row["network"], (left, up), xytext=(0, 9 * side), textcoords="offset points",
            ha="center", va="center", fontsize=7, color=colour,
        )  # fmt: skip
    axes.margins(0.15)
