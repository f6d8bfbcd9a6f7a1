"""Pareto plots of a comparison: who does more per second for its cost, who needs less memory."""

import math

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", linewidth=0.3)
    line = front(points, best)
    axes.plot([p[0] for p in line], [p[1] for p in line], color="0.6", linewidth=1, zorder=1)
    for name in {row["network"] for *_, row in points}:  # its variants belong together
        own = [point for point in points if point[2]["network"] == name]
        axes.plot([p[0] for p in own], [p[1] for p in own], ":", color=_colour(own[0][2]), lw=0.8)
    for left, up, row in points:
        axes.plot(left, up, MARKS[row["variant"]], color=_colour(row), markersize=5)
    axes.margins(0.12)
    _label(axes, points)


def _colour(row):
    return COLOURS[0] if row["framework"] == "jax" else COLOURS[1]


def _label(axes, points):
    """A name beside the first mark of each network, where no mark and no other name is."""
    width, height = (72 * 0.8 * size for size in axes.figure.get_size_inches())  # points, about
    width /= len(axes.figure.axes)
    (x0, x1), (y0, y1) = (
        [math.log10(end) for end in ends] for ends in (axes.get_xlim(), axes.get_ylim())
    )
    places = [
        (width * (math.log10(left) - x0) / (x1 - x0), height * (math.log10(up) - y0) / (y1 - y0))
        for left, up, _ in points
    ]
    taken, named = [(x - 4, y - 4, x + 4, y + 4) for x, y in places], set()
    for (x, y), (left, up, row) in zip(places, points):
        name = row["network"]
        if name in named:
            continue
        named.add(name)
        half = 2.1 * len(name)  # of the name's width, at 7 points
        moves = [(side * (half + 6), rise) for rise in (0, 9, -9, 18, -18) for side in (1, -1)]
        moves += [(0, rise) for rise in (11, -11, 20, -20, 29, -29)]
        boxes = {move: (x + move[0] - half, y + move[1] - 4, x + move[0] + half, y + move[1] + 4)
                 for move in moves}  # fmt: skip
        crowded = {
            move: (_leaves(box, width, height), sum(_meet(box, other) for other in taken))
            for move, box in boxes.items()
        }
        best = min(moves, key=crowded.get)
        taken.append(boxes[best])
        axes.annotate(
            name, (left, up), xytext=best, textcoords="offset points", ha="center", va="center",
            fontsize=7, color=_colour(row),
        )  # fmt: skip


def _meet(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _leaves(box, width, height):
    """Whether it leaves the panel: such places come last."""
    return box[0] < 0 or box[2] > width or box[1] < 0 or box[3] > height
