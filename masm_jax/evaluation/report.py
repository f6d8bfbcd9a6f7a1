"""An evaluation as one HTML file that opens from the disk: tables, plots, scans in 3-D.

Nothing in the page comes from a network, which its content security policy also forbids. Whatever
comes from data (names of cases, paths, the configuration) goes through ``sections.escaped``.
"""

import base64
import hashlib
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from masm_jax.evaluation import sections
from masm_jax.evaluation.distributions import chosen, distributions, intervals
from masm_jax.evaluation.sections import escaped
from masm_jax.evaluation.tables import finite
from masm_jax.evaluation.views import view, views_spacing
from masm_jax.files import replacing

__all__ = ["chosen", "distributions", "intervals", "view", "views_spacing", "write"]

Row = Mapping[str, Any]
View = tuple[str, Mapping[str, Any]]

PAGE = pathlib.Path(__file__).parent / "page"
# What an evaluation writes beside the page.
BESIDE = ("metrics.csv", "lesions.csv", "summary.json", "predictions", "overlays")


def write(
    path: str | os.PathLike,
    *,
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[Row],
    lesions: Sequence[Row],
    views: Mapping[str, Mapping[str, Any]] | Iterable[View],
    pictures: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str],
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    notes: Sequence[str],
) -> None:
    """Write the report.

    Args:
        path: the HTML file; replaced if there, whole or not at all.
        title: heading of the page.
        summary: of ``tables.summarise``.
        rows: one per case and region, as in metrics.csv.
        lesions: one per reference lesion, as in lesions.csv.
        views: (case, ``view(...)``) pairs, or a dict of them. Taken one at a time: an iterator
            that reads each from a file never has two in memory.
        pictures: dicts with "section" (a key of ``sections.PICTURES``), "title", "caption", "png"
            and "csv" (None without), in the order to show. The PNG goes into the page.
        failed: case -> reason; of those in ``rows``, why not all is shown of them.
        config: of the run, nested as it is.
        about: "run", "step", "device", "date", "command", "versions" (a dict) and more of the kind.
        notes: what a reader must know first, a sentence each.
    """
    path = pathlib.Path(path)
    js, niivue = _script("page.js"), _script("niivue.js")
    about_niivue = (PAGE / "NIIVUE.md").read_text(encoding="utf-8")
    listed = {
        "summary": sections.summary(summary, summary.get("intervals") or intervals(rows)),
        "cases": sections.cases(rows),
        "lesions": sections.lesions(lesions),
        **sections.pictures(pictures, path.parent),
    }
    content: dict[str, str | Iterator[str]] = {
        "policy": _policy(js, niivue),
        "title": escaped(title),
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "lead": _lead(about, path.parent),
        "notes": sections.notes(notes),
        "links": "".join(
            f'<a href="#{key}">{sections.HEADINGS[key]}</a>'
            for key in (*listed, "run")
            if listed.get(key, True)
        ),
        "failed": sections.failed(failed, rows),
        **{key: listed[key] for key in ("summary", "cases", "lesions")},
        "pictures": "".join(listed[key] for key in sections.PICTURES.values()),
        "run": sections.run(about, config),
        "niivue_version": re.findall(r"Version: (\S+)", about_niivue)[0],
        "niivue_licence": escaped(about_niivue.split("```")[1].strip()),
        "views": _views(views.items() if isinstance(views, Mapping) else views),
        "niivue": niivue,
        "js": js,
    }
    template = (PAGE / "template.html").read_text(encoding="utf-8")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, part in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
            part = content[part] if i % 2 else part
            file.writelines([part] if isinstance(part, str) else part)


def _script(name: str) -> str:
    script = (PAGE / name).read_text(encoding="utf-8")
    assert not re.search(r"</script|<!--", script, re.IGNORECASE), f"{name} would end its element"
    return script


def _policy(*scripts: str) -> str:
    """Content security policy: these scripts by their hash and no other, and no network at all."""
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _views(views: Iterable[View]) -> Iterator[str]:
    for case, content in views:
        # "<" could end the element.
        text = json.dumps(finite(content), allow_nan=False).replace("<", "\\u003c")
        yield f'<script type="application/json" class="view" data-case="{escaped(case)}">'
        yield text
        yield "</script>\n"


def _lead(about: Mapping[str, Any], folder: pathlib.Path) -> str:
    facts = (("run", "run {}"), ("step", "step {}"), ("device", "on {}"), ("date", "{}"))
    known = (words.format(about[key]) for key, words in facts if about.get(key) is not None)
    files = [name for name in BESIDE if (folder / name).exists()]
    links = ", ".join(f'<a href="{urllib.parse.quote(name)}">{name}</a>' for name in files)
    return escaped(", ".join(known)) + (f". Beside this page: {links}" if files else "")
