"""Draw the numbers that ``python -m masm_jax.benchmark tpu --json=FILE`` has written.

    python -m masm_jax.benchmark plots FILE.json [FILE.json ...] --output=FOLDER

FOLDER gets, as PNG and SVG: bytes (by kind, every file a bar), scaling (predicted efficiency over
chips, every file a line), and for each file movers_NAME (its largest instructions). A table of all
files, as Markdown, is printed.
"""

import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from masm_jax.benchmark import tables
from masm_jax.benchmark.roofline import PODS
from masm_jax.benchmark.traffic import KINDS
from masm_jax.files import read_json, replacing

# A colour per kind of instruction, those of Okabe and Ito (2008): apart for all eyes.
COLOURS = (
    "#0072b2", "#d55e00", "#f0e442", "#cc79a7", "#009e73",
    "#56b4e9", "#999999", "#e69f00", "#000000",
)  # fmt: skip
MOVERS = 20


def add_arguments(parser):
    """Flags of the command."""
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("--output", required=True, metavar="FOLDER")


def run(args):
    """Exit code of the command."""
    reports = {pathlib.Path(file).stem: _read(file) for file in args.files}
    if len(reports) < len(args.files):
        raise ValueError(
            f"{' '.join(args.files)}: expected files of different names, by which bars and "
            f"pictures are named"
        )
    folder = pathlib.Path(args.output)
    save(kinds(reports), folder / "bytes")
    save(scaling(reports), folder / "scaling")
    for name, report in reports.items():
        save(movers(report, name), folder / f"movers_{name}")
    print("\n".join(table(reports)))
    print(f"{folder}: bytes, scaling and {len(reports)} of movers, each as .png and .svg")
    return 0


def table(reports):
    """Lines of a Markdown table, a row per report."""
    heads = (
        "step", "crops per chip", "peak memory, GB", "GB moved per crop", "padding",
        "exchanged, MB", "bound, ms", "crops/s per chip, at most", "MFU, at most",
    )  # fmt: skip
    rows = []
    for report in reports.values():
        run, memory, traffic = report["run"], report["memory"], report["traffic"]
        crops, bound = run["batch_size"] / run["chips"], report["roofline"]
        edges = "x".join(map(str, run["patch"]))
        cut = f", cut over {run['spatial']}" if run["spatial"] > 1 else ""
        exchanged = sum(kind["bytes"] for kind in report["collectives"].values())
        rows.append((
            f"{run['size']}, {run['step']}, {run['topology']} ({run['chips']} chips), {edges}{cut}",
            f"{crops:g}",
            f"{memory['peak'] / 1e9:.1f} of {memory['usable'] / 1e9:.1f}",
            f"{traffic['bytes'] / crops / 1e9:.1f}",
            f"{traffic['padding'] / traffic['bytes']:.0%}",
            f"{exchanged / 1e6:.0f}",
            f"{1e3 * bound['seconds']:.0f}, {bound['bound']}",
            f"{bound['samples_per_second_per_chip']:.1f}",
            f"{bound['mfu']:.0%}",
        ))  # fmt: skip
    return tables.markdown(heads, rows)


def _read(file):
    report = read_json(file, "write it again with `benchmark tpu --json`")
    if "traffic" not in report:
        fits = report.get("compiled", {}).get("fits", True)
        said = "not written by benchmark tpu" if fits else "its step did not fit into memory"
        raise ValueError(f"{file}: nothing to draw: {said}")
    return report


def save(figure, path):
    """Write a figure as PATH.png and PATH.svg."""
    for ending in ("png", "svg"):
        with replacing(path.with_name(f"{path.name}.{ending}")) as temporary:
            figure.savefig(temporary, format=ending, dpi=120)


def kinds(reports):
    """Bars of bytes per chip and crop by kind of instruction; what of it is padding is hatched."""
    figure = Figure(figsize=(9, 1.6 + 0.7 * len(reports)), layout="constrained")
    axes = figure.add_subplot()
    for row, report in enumerate(reports.values()):
        crops, left = report["run"]["batch_per_chip"] * 1e9, 0.0
        for (kind, words), colour in zip(KINDS.items(), COLOURS):
            own = report["traffic"]["by_kind"].get(kind, {"bytes": 0, "padding": 0})
            useful, padding = (own["bytes"] - own["padding"]) / crops, own["padding"] / crops
            label = words if row == 0 else None
            axes.barh(row, useful, left=left, color=colour, label=label)
            axes.barh(row, padding, left=left + useful, color=colour, alpha=0.45, hatch="////")
            left += useful + padding
    axes.set_yticks(range(len(reports)), list(reports))
    axes.invert_yaxis()
    axes.set_xlabel("GB of HBM moved per crop (pale, hatched: padding)")
    axes.set_title("Compiled, not run", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def movers(report, name):
    """Bars of the instructions that move most."""
    rows = report["traffic"]["movers"][:MOVERS]
    figure = Figure(figsize=(10, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = dict(zip(KINDS, COLOURS))
    for place, row in enumerate(rows):
        useful, padding = (row["bytes"] - row["padding"]) / 1e9, row["padding"] / 1e9
        axes.barh(place, useful, color=colours[row["kind"]])
        axes.barh(place, padding, left=useful, color=colours[row["kind"]], alpha=0.45, hatch="////")
    axes.set_yticks(range(len(rows)), [f"{r['place']}: {r['name']}" for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GB of HBM moved per chip and step (pale, hatched: padding)")
    axes.set_title(f"{name}: {report['run']['topology']}, compiled, not run", fontsize=10)
    shown = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    handles = [Patch(color=colours[kind], label=KINDS[kind]) for kind in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def scaling(reports):
    """Predicted efficiency over chips: solid, exchange after the work; dashed, hidden behind it."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, report), colour in zip(reports.items(), COLOURS * len(reports)):
        rows = [row for row in report["scaling"] if row["efficiency"] is not None]
        chips = [row["chips"] for row in rows]
        apart = [100 * row["efficiency"] for row in rows]
        axes.plot(chips, apart, "o-", color=colour, label=name)
        hidden = [100 * row["efficiency_overlapped"] for row in rows]
        axes.plot(chips, hidden, "--", color=colour, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(PODS, map(str, PODS), fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, 105)
    axes.set_xlabel("chips")
    axes.set_ylabel("efficiency, %")
    axes.set_title(
        "Predicted weak scaling: work at the roofline, then the all-reduce\n"
        "(dashed: hidden behind the work). A bound; not run",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    return figure
