"""The page of ``masm_jax.diagnose``: findings first, the numbers behind them after."""

import base64
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from masm_jax.evaluation.findings import FINE, LOOK, WRONG
from masm_jax.evaluation.pictures import COLOURS
from masm_jax.evaluation.sections import escaped
from masm_jax.files import replacing

PAGE = pathlib.Path(__file__).parent / "page"
MARKS = {WRONG: "✗", LOOK: "!", FINE: "✓"}
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<link rel="icon" href="data:,"><style>{css}
figure img {{ max-width: 100%; }}</style></head><body><header><h1>{title}</h1>
<p class="lead">{lead}</p><p class="disclaimer"><strong>Research software, not a medical device.
</strong> Not for diagnosis or treatment.</p></header><main>
"""


def write(path: pathlib.Path, found: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file.
        found: what ``diagnose`` puts into findings.json.
        log: lines of metrics.jsonl.
    """
    cases = found["cases"]
    lead = (
        f"{found['run']}, step {found['step']}; {len(cases)} cases: {', '.join(cases)}. Dice in "
        f"the grid of the records: "
        + ", ".join(f"{name} {value:.3f}" for name, value in found["dice"].items())
    )
    css = (PAGE / "page.css").read_text(encoding="utf-8")
    order = {WRONG: 0, LOOK: 1, FINE: 2}
    listed = sorted(found["findings"], key=lambda finding: order[finding["level"]])
    parts = [
        _HEAD.format(title="Diagnosis", css=css, lead=escaped(lead)),
        "<h2>Findings</h2>",
        _table(
            ("", "sign of", "seen", "what to do"),
            (
                (f"{MARKS[f['level']]} {f['level']}", f["signature"], f["seen"], f["advice"])
                for f in listed
            ),
        ),
        '<p class="quiet">The limits are rules of thumb. A handful of cases shows what may be '
        "wrong, not how often.</p>",
    ]
    if found["kept"]:
        rows = (
            (name, *(f"{share[key]:.1%}" for key in ("all", "brain", "tumour")))
            for name, share in found["kept"].items()
        )
        parts += [
            "<h2>What the masks keep, without noise</h2>",
            _table(("level/modality", "of all", "of the brain", "of the tumour"), rows),
        ]
        keeps = [row for row in log if any(key.startswith("train/keep/") for key in row)]
        if keeps:
            parts.append(_figure(_keeps(keeps), "Share kept, with noise, as training went on"))
    switched = [
        (f"{what} of {level}", f"{score:.3f}", f"{score - found['mean']:+.3f}")
        for what, key in (("masks", "masks_off"), ("skip", "skips_off"))
        for level, score in found[key].items()
    ]
    if switched:
        parts += [
            f"<h2>Switched off</h2><p>Mean Dice as trained: {found['mean']:.3f}.</p>",
            _table(("what", "mean Dice without", "change"), switched),
        ]
    if found["shells"]:
        parts += [
            "<h2>Where the errors are</h2>",
            _figure(_shells(found["shells"]), "Errors by distance from the surface, in voxels"),
        ]
    parts.append("</main></body></html>\n")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>"
    )


def _figure(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure class="plot"><h3>{title}</h3><img alt="{title}" '
        f'src="data:image/png;base64,{image}"></figure>'
    )


def _keeps(log: Sequence[Mapping[str, float]]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(key for row in log for key in row if key.startswith("train/keep/"))
    for name in names:
        points = [(row["step"], row[name]) for row in log if row.get(name) is not None]
        axes.plot(*zip(*points), label=name.removeprefix("train/keep/"))
    axes.set(xlabel="step", ylabel="share kept", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _shells(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """A panel for what is missed, one for what is false: a bar per region and shell."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = (("missed", "inside", "missed, of the reference"), ("false", "outside", "false"))
    for axes, (part, whole, title) in zip(figure.subplots(1, 2), panels):
        for i, (region, table) in enumerate(tables.items()):
            shares = [row[part] / row[whole] if row[whole] else 0 for row in table.values()]
            places = [place + 0.25 * i for place in range(len(shares))]
            axes.bar(places, shares, 0.25, label=region, color=COLOURS[i % len(COLOURS)][1])
        axes.set_xticks([i + 0.25 for i in range(len(table))], list(table), fontsize=8)
        axes.set(title=title, xlabel="voxels from the surface", ylabel="share of the voxels")
        axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return figure
