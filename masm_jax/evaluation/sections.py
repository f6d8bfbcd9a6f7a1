"""The sections of the report as HTML: strings in, strings out, everything from data escaped."""

import base64
import html
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from masm_jax.evaluation.distributions import mean_dice
from masm_jax.evaluation.lesions import STYLES
from masm_jax.evaluation.tables import TABLE, finite

Row = Mapping[str, Any]

PICTURES = {  # section of a picture -> its place in the page, in order; "cases" is the table there
    "distributions": "distributions",
    "cases": "case-pictures",
    "pruning": "pruning",
    "mosaic": "mosaic",
    "training": "training",
}
HEADINGS = {
    "summary": "Summary",
    "cases": "Cases",
    "lesions": "Lesions",
    "distributions": "Distributions",
    "case-pictures": "Best, median and worst case",
    "pruning": "What the mixers pruned",
    "mosaic": "What was learnt to borrow",
    "training": "Training",
    "run": "Run",
}
COLUMNS = {  # metric -> group heading, decimals, whether it is shown at first
    "dice": ("Dice", 3, True),
    "hd95": ("HD95 mm", 1, True),
    "nsd": ("NSD", 3, True),
    "volume_ml": ("Predicted ml", 1, True),
    "reference_ml": ("Reference ml", 1, True),
    **{f"{style}_dice": (f"Lesion-wise Dice, {style}", 3, False) for style in STYLES},
}
SIDES = {"both": "rightly empty", "prediction": "missed", "reference": "false alarm"}
BANDS = ((0, 0.1), (0.1, 1), (1, 10), (10, float("inf")))  # ml


def notes(sentences: Sequence[str]) -> str:
    """What a reader must know first."""
    items = "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences)
    return f'<ul class="notes">{items}</ul>' if items else ""


def failed(reasons: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Cases without a result, and those without a picture, and why; nothing when all went well."""
    scored = {row["case"] for row in rows}
    parts = ""
    for heading, words, counted in (
        ("Failed", "These cases are in no number below.", False),
        ("Not drawn", "These cases are in the numbers below, but not all is shown of them.", True),
    ):
        own = {case: reason for case, reason in reasons.items() if (case in scored) == counted}
        body = "".join(_line(escaped(case), escaped(reason)) for case, reason in own.items())
        if own:
            parts += f"<h2>{heading}: {len(own)}</h2><p>{words}</p>"
            parts += _table(["case", "reason"], body)
    return f'<section class="failed">{parts}</section>' if parts else ""


def summary(content: Mapping[str, Any], bounds: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Means with intervals by region, the lesion-wise ones, and the rules for empty regions."""
    regions = content["regions"]
    body = ""
    for name, region in regions.items():
        cells = [
            _mean(region.get(key), bounds.get(name, {}).get(key), decimals)
            for key, (_, decimals, _) in TABLE.items()
        ]
        body += _line(escaped(name), _number(region["n"], 0), *cells)
    average = content["average"]
    cells = [_number(average.get(key), decimals) for key, (_, decimals, _) in TABLE.items()]
    body += _line("average", "", *cells)
    headings = ["region", "cases", *(heading for heading, *_ in TABLE.values())]
    caption = (
        "Mean [95 % interval]; below, median and sample standard deviation. The interval is a "
        "bootstrap over cases: how far the mean would move with other cases of the same kind, not "
        "with another training. Average: of the means of the regions."
    )
    parts = [_table(headings, body, caption, numbers=True)]
    parts += [_lesion_wise(regions, bounds, style) for style in STYLES]
    parts += [_empty(content), _definitions(content["conventions"])]
    return _section("summary", "".join(parts))


def cases(rows: Sequence[Row]) -> str:
    """The table of cases, worst first; sorting, filtering and the viewer come with page.js."""
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        table.setdefault(row["case"], {})[row["region"]] = finite(row)
    if not table:
        return ""
    regions = list(dict.fromkeys(row["region"] for row in rows))
    metrics = [m for m in COLUMNS if any(m in row for row in rows)]
    means = mean_dice(rows)
    body = ""
    for case in sorted(table, key=lambda case: (means.get(case, 2.0), case)):
        own = table[case]
        cells = [_cell(means.get(case), 3, "dice", first=True)]
        for metric in metrics:
            for i, name in enumerate(regions):
                value = own.get(name, {}).get(metric)
                cells.append(_cell(value, COLUMNS[metric][1], metric, first=i == 0))
        sides = [f"{name}: {SIDES[side]}" for name in regions
                 if (side := own.get(name, {}).get("empty")) in SIDES]  # fmt: skip
        cells.append(
            f'<td class="first m-empty" data-value="{len(sides)}">{escaped(", ".join(sides))}</td>'
        )
        name = escaped(case)
        head = f'<th scope="row"><span>{name}</span></th>'
        body += f'<tr data-case="{name}">{head}{"".join(cells)}</tr>\n'
    groups = [f'<th class="group m-{m}" colspan="{len(regions)}">{COLUMNS[m][0]}</th>'
              for m in metrics]  # fmt: skip
    sorts = [_heading("mean", "dice", first=True, order="ascending")]
    for metric in metrics:
        sorts += [_heading(name, metric, first=i == 0) for i, name in enumerate(regions)]
    choices = [(m, COLUMNS[m][0], COLUMNS[m][2]) for m in metrics]
    boxes = "".join(
        f'<label><input type="checkbox" data-group="{key}"{" checked" * shown}> {words}</label>'
        for key, words, shown in [*choices, ("empty", "Empty regions", True)]
    )
    return _section(
        "cases",
        f"""<p class="screen">Worst first. Choose a heading to sort, a case to see its scan.</p>
<div class="tools" hidden><label>Filter
<input type="search" id="filter" placeholder="part of a name"></label>
<span id="count" role="status"></span>
<fieldset><legend>Columns</legend>{boxes}</fieldset></div>
<div class="scroll" tabindex="0" role="region" aria-label="Table of cases"><table id="table"><thead>
<tr><td class="corner"></td><th class="group m-dice">Dice</th>{"".join(groups)}
<th class="group m-empty">Empty</th></tr>
<tr><th scope="col" class="corner"><button type="button">case</button></th>{"".join(sorts)}
{_heading("regions", "empty", first=True)}</tr></thead>
<tbody>
{body}</tbody></table></div>""",
    )


def lesions(rows: Sequence[Row]) -> str:
    """How many of the reference lesions were found, by their volume."""
    kinds = dict.fromkeys((row["style"], row["region"]) for row in rows)
    body = ""
    for style, region in kinds:
        own = [row for row in rows if (row["style"], row["region"]) == (style, region)]
        cells = []
        for low, high in BANDS:
            found = [bool(row["found"]) for row in own if low <= row["volume_ml"] < high]
            cells.append(f"{sum(found)} of {len(found)}" if found else "–")
        body += _line(escaped(region), escaped(style), *cells)
    if not body:
        return ""
    bands = [f"{low:g} to {high:g} ml" for low, high in BANDS[1:-1]]
    headings = ["region", "counted as", f"below {BANDS[0][1]:g} ml", *bands,
                f"{BANDS[-1][0]:g} ml and more"]  # fmt: skip
    caption = "Reference lesions that the prediction touches, by their volume."
    return _section("lesions", _table(headings, body, caption, numbers=True))


def pictures(listed: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> dict[str, str]:
    """Place in the page -> its pictures, embedded, with links to the files relative to the page."""
    strange = {p["section"] for p in listed} - PICTURES.keys()
    if strange:
        raise ValueError(
            f"picture of section {sorted(strange)}: expected one of {', '.join(PICTURES)}"
        )
    result = {}
    for section, place in PICTURES.items():
        own = [picture for picture in listed if picture["section"] == section]
        plots = "plot" if section in ("distributions", "training") else ""
        wide = "" if section == "distributions" else " wide"
        figures = "".join(_figure(picture, folder, plots) for picture in own)
        content = f'<div class="gallery{wide}">{figures}</div>'
        result[place] = _section(place, content) if own else ""
    return result


def run(about: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Where the numbers come from: command, device, versions, the whole configuration."""
    tables = [_table([], _flat(about))]
    tables.append(f"<details><summary>Configuration</summary>{_table([], _flat(config))}</details>")
    return _section("run", "".join(tables), "run")


def escaped(value: Any) -> str:
    """A value as text for HTML, inside elements and quoted attributes."""
    return html.escape(str(value), quote=True)


def _section(key: str, content: str, kind: str = "") -> str:
    return f'<section id="{key}" class="{kind}"><h2>{HEADINGS[key]}</h2>{content}</section>\n'


def _line(heading: str, *cells: str) -> str:
    return f'<tr><th scope="row">{heading}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>\n'


def _table(headings: Sequence[str], body: str, caption: str = "", numbers: bool = False) -> str:
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    head = f"<thead><tr>{head}</tr></thead>" if headings else ""
    caption = f'<p class="quiet">{caption}</p>' if caption else ""
    kind = ' class="numbers"' if numbers else ""
    return f'{caption}<div class="scroll"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _number(value: Any, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _mean(
    statistics: Mapping[str, Any] | None, bounds: Sequence[float] | None, decimals: int
) -> str:
    if not statistics or statistics.get("mean") is None:
        return "–"
    text = _number(statistics["mean"], decimals)
    if bounds:
        text += f" [{bounds[0]:.{decimals}f}, {bounds[1]:.{decimals}f}]"
    small = [f"{name} {statistics[key]:.{decimals}f}"
             for key, name in (("median", "median"), ("sd", "sd"))
             if statistics.get(key) is not None]  # fmt: skip
    return f"{text}<small>{', '.join(small)}</small>"


def _lesion_wise(regions: Mapping[str, Any], bounds: Mapping[str, Any], style: str) -> str:
    body = ""
    for name, region in regions.items():
        if f"{style}_tp" not in region:
            continue
        shown = (("dice", 3), ("hd95", 1), ("nsd", 3), ("f1", 3))
        cells = [
            _mean(
                region.get(f"{style}_{key}"), bounds.get(name, {}).get(f"{style}_{key}"), decimals
            )
            for key, decimals in shown
        ]
        counts = (region[f"{style}_{key}"] for key in ("tp", "fn", "fp"))
        cells += [f"{(c['mean'] or 0) * c['n']:.0f}" for c in counts]
        body += _line(escaped(name), *cells)
    headings = ["region", "Dice", "HD95 mm", "NSD", "F1", "found", "missed", "false"]
    table = _table(headings, body, escaped(STYLES[style].words), numbers=True)
    return f"<h3>Lesion-wise, {escaped(style)}</h3>{table}" if body else ""


def _empty(content: Mapping[str, Any]) -> str:
    """How each rule for empty regions reads and how often it applied."""
    body = ""
    for side, words in content["conventions"]["empty_rules"].items():
        counts = [str(region["empty"].get(side, 0)) for region in content["regions"].values()]
        where = "in neither" if side == "neither" else f"in {side}"
        body += _line(escaped(where), escaped(words), *counts)
    headings = ["empty", "what counts", *map(escaped, content["regions"])]
    caption = "Cases under each rule for a region that one side or both leave empty."
    return f"<h3>Empty regions</h3>{_table(headings, body, caption)}"


def _definitions(conventions: Mapping[str, Any]) -> str:
    words = {name: words for name, words in conventions.items() if isinstance(words, str)}
    body = "".join(_line(escaped(name), escaped(text)) for name, text in words.items())
    return f"<details><summary>How the metrics are defined</summary>{_table([], body)}</details>"


def _cell(value: Any, decimals: int, metric: str, first: bool) -> str:
    kind = f"n m-{metric}" + " first" * first
    if value is None:
        return f'<td class="{kind}" data-value="">–</td>'
    gauge = f' style="--v:{value:.3f}"' if metric == "dice" else ""
    kind += " gauge" if gauge else ""
    return f'<td class="{kind}" data-value="{value!r}"{gauge}>{value:.{decimals}f}</td>'


def _heading(words: str, metric: str, first: bool, order: str = "") -> str:
    sort = f' aria-sort="{order}"' if order else ""
    side = "" if metric == "empty" else "n "  # words stand on the left, numbers on the right
    return (
        f'<th scope="col" class="{side}m-{metric}{" first" * first}"{sort}>'
        f'<button type="button">{escaped(words)}</button></th>'
    )


def _figure(picture: Mapping[str, Any], folder: pathlib.Path, kind: str) -> str:
    image = base64.b64encode(pathlib.Path(picture["png"]).read_bytes()).decode("ascii")
    links = []
    for file in (picture["png"], picture.get("csv")):
        if file is not None:
            place = pathlib.PurePath(os.path.relpath(file, folder)).as_posix()
            links.append(f'<a href="{escaped(urllib.parse.quote(place))}">{escaped(place)}</a>')
    title = escaped(picture["title"])
    return (
        f'<figure class="{kind}"><h3>{title}</h3><img alt="{title}" '
        f'src="data:image/png;base64,{image}"><figcaption>{escaped(picture["caption"])} '
        f'<span class="screen">As files: {", ".join(links)}</span></figcaption></figure>'
    )


def _flat(values: Mapping[str, Any]) -> str:
    items = _items(values, "")
    return "".join(_line(escaped(key), f"<code>{escaped(value)}</code>") for key, value in items)


def _items(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
